"""Types of the command line's options: what cannot be is refused as it is parsed, with the option's name."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from flowkernels._checks import is_path

MOST_STEPS = 10_000
MOST = 10**9  # samples, iterations and the like


def integer(least: int, most: int = MOST) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None
        if value is None or value < least:
            _refuse(f"an integer of at least {least}", text)
        if value > most:
            _refuse(f"an integer of at most {most:,}", text)
        return value

    return parse


def number(expected: str, ok: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number for which `ok` holds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and ok(value)):
            _refuse(expected, text)
        return value

    return parse


positive = integer(1)
steps = integer(1, MOST_STEPS)
seed = integer(-(2**63), 2**64 - 2)  # of torch's generators, with one after it
above_0 = number("a positive number", lambda a: a > 0)
from_0 = number("a number of at least 0", lambda a: a >= 0)
from_0_below_1 = number("a number in [0, 1)", lambda a: 0 <= a < 1)


def path(text: str) -> Path:
    if text == "" or not is_path(text):
        _refuse("a path", text)
    return Path(text)


def _refuse(expected: str, text: str) -> None:
    raise argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")


def shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
