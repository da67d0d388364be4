"""The folder of a run: flags, checkpoints and logs, so that a run that is killed at any moment goes
on.

In: the learner's state. Out: files that appear whole or not at all, and logs that grow by whole
lines. Nothing here knows how the policy learns.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from support.flags import parse_flags
from support.processes import own_rank
from support.shards import gathered
from support.user_code import file_and_name

ROOT = Path(__file__).resolve().parent.parent
LOGS = ("metrics.jsonl", "trajectories.jsonl", "evaluations.jsonl")
# What --resume may be given: how long, how often and with which means, but not what is learned.
MAY_CHANGE = (
    "steps eval_every eval_tasks dev_tasks test_tasks save_every processes threads workers slots"
    " kv_tokens micro_tokens check_logprobs log_with"
).split()
# What runs code, or lowers a guard. A run's folder may come from somebody else.
GUARDS = "reward python unsafe_python live search search_url engine engine_weights".split()
RESUME_HELP = (
    f"run to go on with, by its own flags. Only these may be changed: {', '.join(MAY_CHANGE)}. "
    f"These are not taken from the run and must be given again: {', '.join(GUARDS)}"
)


def choose_folder(out: str) -> Path:
    """Make --out, or the first free runs/run-N.

    Raises:
        ValueError: --out holds another run.
    """
    if out:
        if (Path(out) / "metrics.jsonl").exists():
            raise ValueError(
                f"--out {out} holds a run: go on with --resume {out}, or choose another folder"
            )
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path("runs") / f"run-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # one of two runs that start together gets it
            return folder


def lock(folder: Path) -> int:
    """Keep other runs out of a folder, as long as this process lives.

    Returns:
        A file descriptor; closing it ends the lock.

    Raises:
        ValueError: another run writes there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another run is writing into {folder}: choose another folder") from None
    return descriptor


def flags_of(parts: list) -> dict:
    """Name and value of each flag of these dataclass objects."""
    return {name: value for part in parts for name, value in asdict(part).items()}


def to_give_again(config: dict, parts: list) -> str:
    """What --resume needs besides the folder: the flags of GUARDS that a run has set, as words."""
    usual = {field.name: field.default for part in parts for field in fields(part)}
    unusual = {n: config[n] for n in GUARDS if n in usual and config.get(n, usual[n]) != usual[n]}
    words = " ".join(shlex.quote(f"--{name}={value}") for name, value in unusual.items())
    return words if words.isprintable() else ascii(words)


def take_config(resume: str, parts: list) -> None:
    """Give the flags of an earlier run to those that are not on the command line now.

    Args:
        resume: its folder.
        parts: dataclass objects with the flags.

    Raises:
        ValueError: there is no run in the folder, or it does not go on with these flags.
    """
    path = Path(resume) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {resume}: no run there")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"--resume {resume}: {path} is damaged") from None
    words = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    given = {word.lstrip("-").replace("-", "_") for word in words}
    kept = {name: v for name, v in config.items() if name in flags_of(parts) and name not in GUARDS}
    words = [f"--{name}={value}" for name, value in kept.items()]
    # The same parser reads them, so a value that no flag has is refused here, too.
    before = flags_of(parse_flags([type(part) for part in parts], "", words, f"train.py: {path}"))
    missing = to_give_again({k: v for k, v in config.items() if k not in given}, parts)
    if missing:
        raise ValueError(
            f"--resume {resume}: give {missing} again; what runs code or lowers a guard is taken "
            "from the command line only"
        )
    for part in parts:
        for name, value in asdict(part).items():
            if name not in given | {*GUARDS, "resume"}:
                setattr(part, name, before[name])
            elif name not in [*MAY_CHANGE, *GUARDS, "resume"] and value != before[name]:
                raise ValueError(
                    f"--resume goes on with --{name} {before[name]!r}, not {value!r}; "
                    f"only these may be changed: {', '.join(MAY_CHANGE)}"
                )


def save_config(out: Path, parts: list) -> None:
    """Write what it takes to repeat a run: config.json with the flags, the commit and the versions
    of all packages, and a copy of the file that --reward names.
    """
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""  # no git, or no repository
    installed = importlib.metadata.distributions()
    versions = {str(package.metadata["Name"]): package.version for package in installed}
    packages = {"python": sys.version.split()[0]} | dict(sorted(versions.items()))
    config = flags_of(parts)
    if config["reward"]:
        file = Path(file_and_name(config["reward"])[0])
        code = file.read_bytes()
        (out / file.name).unlink(missing_ok=True)  # it may be a link to another file
        (out / file.name).write_bytes(code)
    about = {"commit": commit, "packages": packages}
    replace_text(out / "config.json", json.dumps(config | about, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Write a file; it appears whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def append_line(path: Path, record: dict) -> None:
    append(path, [json.dumps(record) + "\n"])


def append(path: Path, lines: list[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


def whole_lines(path: Path):
    """(line, object) of each line of a log, none if there is no such file. A line that is no object
    is left out: a run that was killed may have left half of its last one. NaN, which is no JSON,
    is read as None.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line, parse_constant=lambda name: None)
                if isinstance(record, dict):
                    yield line.rstrip("\n"), record


def read_lines(path: Path) -> list[dict]:
    """The objects of a log."""
    return [record for _, record in whole_lines(path)]


def cut_lines(path: Path, last_step: int) -> None:
    """Drop the lines after update `last_step` from a log: those updates will be done again. A line
    that was not written to its end goes too.
    """
    if not path.exists():
        return
    kept = []
    for line, record in whole_lines(path):
        if isinstance(record.get("step"), (int, float)) and record["step"] <= last_step:
            kept.append(line + "\n")
    replace_text(path, "".join(kept))


# ------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def save_atomically(folder: Path):
    """Gives a temporary folder to write into, which then takes the place of `folder`: a reader sees
    the old one, the new one, or none for an instant, but never a part of one.
    """
    temporary = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_model(folder: Path, model, tokenizer, **weights) -> None:
    """A folder that `--model` takes. Of a sharded model `state_dict` gives the whole weights."""
    with save_atomically(folder) as temporary:
        model.save_pretrained(temporary, **weights)
        tokenizer.save_pretrained(temporary)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def save(out: Path, step: int, model, optimizer, tokenizer, more: dict) -> None:
    """Write state/ (for --resume) and checkpoint/ (for users). The last two states are kept, in
    case one is damaged. Every rank calls this, and rank 0 writes.

    A state is one file whose name holds the start of its SHA-256. It appears whole, under its final
    name, or not at all.

    Args:
        step: updates that were done.
        more: "rollouts", the `state()` of each rank's rollouts (None in sync mode), and
            "curriculum", that of the stream of tasks.

    Raises:
        OSError: the disk is full, say; what was there before stays whole.
    """
    states, temporary = out / "state", out / "state" / "saving"
    weights, moments = model.state_dict(keep_vars=True), optimizer.state_dict()
    state = gathered({"step": step, "model": weights, "optimizer": moments})
    if own_rank():
        return
    states.mkdir(exist_ok=True)
    check_plain(more["rollouts"])
    try:
        torch.save(state | more, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, states / f"step-{step:06d}-{sha256(temporary)}.pt")
        sharded = isinstance(next(model.parameters()), DTensor)
        whole = {"state_dict": state["model"]} if sharded else {}
        save_model(out / "checkpoint", model, tokenizer, **whole)
    except (RuntimeError, SafetensorError) as error:  # as torch and safetensors say it
        full = shutil.disk_usage(out).free < 100e6
        words = "the disk is full" if full else str(error).splitlines()[0][:100]
        raise OSError(f"cannot write a checkpoint: {words}") from None
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(states.glob("step-*.pt"), key=lambda path: path.name[:11])[:-2]:
        old.unlink()


def read_state(file) -> dict:
    """A state: tensors and plain data, and nothing that could run code."""
    with torch.serialization.safe_globals([bytes]):  # torch writes b"" as a call of bytes
        return torch.load(file, map_location="cpu", weights_only=True)


def check_plain(rollouts: list[dict | None]) -> None:
    """Raise OSError if a state with these rollouts could not be read again. Looked at is what a
    tool or a manager of the user's own may have put there.
    """
    groups = [group for rollout in rollouts if rollout for group in rollout["groups"]]
    trajectories = [trajectory for group in groups for trajectory in group["trajectories"]]
    calls = [turn["calls"] for trajectory in trajectories for turn in trajectory["turns"]]
    file = io.BytesIO()
    try:
        torch.save([calls, [trajectory["memory"] for trajectory in trajectories]], file)
        file.seek(0)
        read_state(file)
    except Exception as error:  # as pickle says it, in many ways
        words = " ".join(str(error).split())[:200]
        raise OSError(f"trajectory.memory holds what no checkpoint can hold: {words}") from None


def load_state(out: Path) -> dict:
    """The newest whole state of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted((out / "state").glob("step-*.pt"), reverse=True):
        try:
            if path.stem != f"{path.stem[:11]}-{sha256(path)}":
                raise ValueError("checksum")
            return read_state(path)
        except Exception as error:
            words = f"{type(error).__name__}: {str(error)[:60]}"
            print(f"{path} is damaged ({words}): trying the one before", file=sys.stderr)
    raise FileNotFoundError(f"--resume: no whole state in {out}/state; start anew with --out")


def share_of(states: list, rank: int, ranks: int, tasks: int) -> dict | None:
    """What this rank has to go on with of the rollouts in a checkpoint, None if they hold nothing.
    With another number of ranks than before, the groups are dealt out anew. Each rank then begins
    with the first update whose tasks nobody had begun.

    Args:
        states: of the ranks that made the checkpoint.
        tasks: of one update, over all ranks.
    """
    states = [state for state in states if state]
    if not states:
        return None
    if len(states) == ranks:
        return states[rank]
    groups = [group for state in states for group in state["groups"]]
    shares = [max(1, len(range(old, tasks, len(states)))) for old in range(len(states))]
    begun = max(-(-state["next_number"] // share) for state, share in zip(states, shares))
    return {"next_number": begun * len(range(rank, tasks, ranks)), "groups": groups[rank::ranks]}
