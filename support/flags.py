"""Command-line flags from dataclasses."""

import difflib
import sys

from transformers import HfArgumentParser


def parse_flags(dataclasses: tuple, doc: str) -> list:
    """The flags as instances of the dataclasses; a wrong flag ends the program with one line.

    Args:
        dataclasses: their fields are the flags. `transformers.hf_argparser.HfArg` gives a field its
            help, and a type `Literal["a", "b"]` its choices.
        doc: the script's docstring; its first paragraph heads --help.
    """
    parser = HfArgumentParser(dataclasses, description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (see --help)")
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        names = [name for arguments in dataclasses for name in arguments.__dataclass_fields__]
        initials = {"".join(word[0] for word in name.split("_")): name for name in names}
        nearby = initials | {name: name for name in names}  # "lr" stands for learning_rate
        given = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(given, nearby, 1)
        hint = f", did you mean --{nearby[near[0]]}?" if near else ""
        parser.error(f"unknown flag {unknown[0]}{hint}")
    return parsed
