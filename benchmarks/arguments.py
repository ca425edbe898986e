"""Types of command line arguments: what no run can use is refused while parsing, by what came and what was expected."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from pathlib import Path


def count(text: str) -> int:
    """A whole number, at least 1."""
    if text.isdecimal() and int(text):
        return int(text)
    raise ArgumentTypeError(f"{text}, expected a whole number of at least 1")


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf:
        return number
    raise ArgumentTypeError(f"{text}, expected a number above 0")


def file(text: str) -> Path:
    """A file that is there."""
    if Path(text).is_file():
        return Path(text)
    raise ArgumentTypeError(f"{text}, expected a file that is there")


def folder(text: str) -> Path:
    """A folder that is there."""
    if Path(text).is_dir():
        return Path(text)
    raise ArgumentTypeError(f"{text}, expected a folder that is there")
