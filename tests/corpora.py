"""A corpus in memory, whose tokens say where they come from."""

from collections.abc import Sequence

import numpy as np

from pipeline.data.encode import Tokens


class MemoryCorpus:
    """Documents of given lengths. Token i of all of them has the id `first` + i."""

    def __init__(self, lengths: Sequence[int], first: int = 100, whole: bool = False):
        self.all_lengths = np.asarray(lengths, np.int64)
        self.documents, self.tokens = len(lengths), int(self.all_lengths.sum())
        self.first, self.whole = first, whole

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return self.all_lengths[places]

    def piece(self, place: int, start: int, stop: int) -> Tokens:
        numbers = np.arange(start, stop)
        ids = (numbers + self.first + self.all_lengths[:place].sum()).astype(np.int32)
        predicted = numbers >= self.all_lengths[place] // 2 if self.whole else None
        return Tokens(ids, numbers % 3 == 0, predicted)
