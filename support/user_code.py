"""A function from a file of the user's, which runs as Python would run it, and its results."""

import inspect
import math
import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path


class UserCodeError(ValueError):
    """The user's function failed in the middle of a run; the message is one line."""


def where_it_failed(error: BaseException) -> str:
    """An exception in one line, with file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    words = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {words}{place}"


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
    path, _, name = (spec, "", "") if Path(spec).is_file() else spec.rpartition(":")
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
