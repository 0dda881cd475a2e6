"""The files of a run folder, read so that a damaged one can be told and never ends a report."""

import gzip
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class Damaged(Exception):
    """A file is there and does not hold what it should; says which and why."""


@dataclass
class Findings:
    """What there is to say about a run's files."""

    warnings: list[str] = field(default_factory=list)  # everything
    damage: list[str] = field(default_factory=list)  # of these, why no verdict rests on its losses

    def damaged(self, text: str) -> None:
        self.warnings.append(text)
        self.damage.append(text)


def read_json(path: Path) -> dict | None:
    """A JSON object; None where there is no file. Raises Damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The numeric arrays of an .npz; None where there is no file. Raises Damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return {name: arrays[name].astype(float) for name in arrays.files}
    except Exception as error:  # whatever zip, zlib and numpy make of half an archive
        raise _damaged(path, str(error) or type(error).__name__) from None


def read_rows(path: Path) -> list[dict] | None:
    """The objects of a .jsonl.gz; None where there is no file. Raises Damaged."""
    if not path.exists():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except Exception as error:  # as above
        raise _damaged(path, str(error) or type(error).__name__) from None
    if not all(isinstance(row, dict) for row in rows):
        raise _damaged(path, "a line of it is no object")
    return rows


def finite(value: object) -> float | None:
    """The value as a finite float, None for whatever else JSON may hold."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def named(path: Path) -> str:
    """A file of a stage, or of a point within one, as messages name it."""
    return "/".join(path.parts[-3 if path.parent.name.startswith("step-") else -2 :])


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(f"{named(path)} cannot be read and is left out: {' '.join(reason.split())}")
