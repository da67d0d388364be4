"""A function from a file of the user's, which runs as Python would run it, and its results."""

import inspect
import math
import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

from context import Trajectory
from reward import Reward, reward
from support import endings


class UserCodeError(ValueError):
    """The user's function failed in the middle of a run; the message is one line."""


def where_it_failed(error: BaseException) -> str:
    """An exception in one line, with file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    words = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {words}{place}"


def file_and_name(spec: str) -> tuple[str, str]:
    """The two parts of "file.py:function"; the name is "" where only the file is given."""
    file, _, name = (spec, "", "") if Path(spec).is_file() else spec.rpartition(":")
    return file, name


def load_function(spec: str, flag: str) -> tuple[str, Callable]:
    """The function that `spec` names, and its name.

    Modules beside the file can be imported from it; a module of this project wins over one of the
    same name.

    Args:
        spec: "file.py:function", or "file.py" if the file defines one function only, apart from
            those whose name begins with "_".
        flag: the flag that gave the spec; it begins the line of an error.

    Raises:
        ValueError: there is no such file or function, or the file does not run; one line.
    """
    path, name = file_and_name(spec)
    if not Path(path).is_file():
        raise ValueError(f"{flag} {spec}: give file.py:function; there is no file {path or spec!r}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(1, folder)  # the first entry is the folder of this project's script
    module = types.ModuleType("user_code")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{flag} {spec}: {path} does not run ({words})") from None
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == "user_code" and key[0] != "_"
    ]
    if not name and len(own) != 1:
        there = f"it defines {', '.join(own)}" if own else "it defines none"
        raise ValueError(f"{flag} {spec}: name the function, as in {path}:function ({there})")
    name = name or own[0]
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: no function {name!r} in {path}")
    return name, function


def finite(value) -> float:
    """A real number of any kind (numpy's, bool, Fraction) as a float.

    Raises:
        ValueError: it is none, or not finite; the message is the value or its type.
    """
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # of a kind whose conversion fails in its own way
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(str(value) if isinstance(value, float) else type(value).__name__)
    return number


def load_reward(spec: str) -> Callable[[Trajectory], Reward]:
    """The reward function that `--reward` names; "" gives `reward` itself.

    A user's function returns a Reward or any finite real number. It is called only for trajectories
    whose format is fine: of the others `reward` says that the format failed.

    Args:
        spec: "file.py:function", or "file.py" if the file defines one function only.

    Raises:
        ValueError: the function cannot be loaded; one line.
        UserCodeError: from the function that is returned: it failed, or gave no finite number.
    """
    if not spec:
        return reward
    name, function = load_function(spec, "--reward")

    def user_reward(trajectory: Trajectory) -> Reward:
        endings.check()  # rewards may be slow
        plain = reward(trajectory)
        if not plain.format_ok:
            return plain
        try:
            value = function(trajectory)
        except (Exception, SystemExit) as error:  # never a silent 0
            task, words = trajectory.task.id, where_it_failed(error)
            raise UserCodeError(f"the reward failed on task {task!r}: {words}") from None
        if not isinstance(value, Reward):
            value = Reward(value, plain.correct, parts={name: value})
        try:
            parts = {
                str(part).encode("utf-8", "replace").decode(): finite(number)
                for part, number in dict(value.parts or {}).items()
            }
            return Reward(finite(value.total), finite(value.correct), bool(value.format_ok), parts)
        except (TypeError, ValueError) as error:
            raise UserCodeError(
                f"--reward {spec} gave {error} for task {trajectory.task.id}: "
                "a finite number or a Reward of finite numbers is needed"
            ) from None

    return user_reward
