"""A corpus in memory, whose tokens say where they come from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class MemoryDocument(NamedTuple):
    ids: np.ndarray
    word_starts: np.ndarray | None = None
    predicted: np.ndarray | None = None


class MemoryCorpus:
    """Documents of given lengths. Token i of all of them has the id `first` + i."""

    def __init__(self, lengths: Sequence[int], first: int = 100, prompts: bool = False):
        self.all_lengths = np.asarray(lengths, np.int64)
        self.ends = np.cumsum(self.all_lengths)
        self.first, self.prompts = first, prompts

    @property
    def documents(self) -> int:
        return len(self.all_lengths)

    @property
    def tokens(self) -> int:
        return int(self.all_lengths.sum())

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return self.all_lengths[places]

    def document(self, place: int) -> MemoryDocument:
        stop = int(self.ends[place])
        ids = np.arange(stop - self.all_lengths[place], stop) + self.first
        starts = np.arange(len(ids)) % 3 == 0
        predicted = np.arange(len(ids)) >= len(ids) // 2 if self.prompts else None
        return MemoryDocument(ids.astype(np.int32), starts, predicted)
