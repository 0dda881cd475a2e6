"""Numbers as people write them."""

import re
from fractions import Fraction
from typing import Any

POWERS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def number(value: Any) -> Any:
    """2G, 1.5M or 300k as a number; anything else as it is."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGBT])\s*", value)
    if not found:
        raise ValueError("write a number, or one with k, M, G (or B) or T, as in 2G")
    return float(found[1]) * POWERS[found[2].upper()]


def as_written(value: float) -> Fraction:
    """A number to count with: 0.7 of 90 is 63, although the product of the floats is just below."""
    return Fraction(str(value))
