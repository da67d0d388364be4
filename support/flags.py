"""Command-line flags from dataclasses."""

import sys

from transformers import HfArgumentParser


def parse_flags(dataclasses: tuple, doc: str) -> list:
    """Command-line flags as instances of the dataclasses; a wrong flag ends the program with one line.

    Args:
        doc: the script's docstring; its first paragraph heads --help.
    """
    parser = HfArgumentParser(dataclasses, description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (see --help)")
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {unknown[0]}")
    return parsed
