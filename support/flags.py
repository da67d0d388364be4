"""Command-line flags from dataclasses."""

import difflib
import sys
from pathlib import Path

from transformers import HfArgumentParser


def did_you_mean(word: str, names: dict[str, str], cutoff: float = 0.6) -> str:
    """The end of a line about a wrong word: what the nearest name means, "" if none is near.

    Args:
        names: what may have been meant -> how it is written.
        cutoff: how near a name must be, from 0 to 1 (equal).
    """
    near = difflib.get_close_matches(word, names, 1, cutoff)
    return f", did you mean {names[near[0]]}?" if near else ""


def try_files(*names: str) -> None:
    """Try the files that flags name ("" names none) before the work rather than after it. They are
    left as they were.

    Raises:
        OSError: one of them cannot be written.
    """
    for file in [Path(name) for name in names if name]:
        is_new = not file.exists()
        file.open("a").close()
        if is_new:
            file.unlink()


def parse_flags(dataclasses: tuple, doc: str, words=None, prog: str | None = None) -> list:
    """The flags as instances of the dataclasses; a wrong flag ends the program with one line.

    Args:
        dataclasses: their fields are the flags. `transformers.hf_argparser.HfArg` gives a field its
            help, and a type `Literal["a", "b"]` its choices.
        doc: the script's docstring; its first paragraph heads --help.
        words: the command line without the script (default: this process's).
        prog: begins the line of an error (default: the script's name).
    """
    about = {"description": doc.split("\n\n")[0], "prog": prog}
    parser = HfArgumentParser(dataclasses, allow_abbrev=False, **about)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (see --help)")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [name for arguments in dataclasses for name in arguments.__dataclass_fields__]
        nearby = {"".join(word[0] for word in name.split("_")): f"--{name}" for name in names}
        nearby |= {name: f"--{name}" for name in names}  # "lr" stands for learning_rate
        given = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        parser.error(f"unknown flag {unknown[0]}{did_you_mean(given, nearby)}")
    return parsed
