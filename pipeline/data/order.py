"""The order of the documents: a seeded permutation of any size that takes no memory.

A Feistel network of alternating halves (Luby and Rackoff 1988) is a bijection on the numbers of b
bits, whatever its round function; numbers that fall outside of the size are sent through it again
until they fall inside (cycle walking: Black and Rogaway 2002). So the document at any place of the
order is computed from the place alone, and seeking costs nothing.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
SMALLEST = 4  # bits; fewer would leave some permutations of a handful of documents out of reach


class Permutation:
    """The numbers 0..size-1 in another order, the same wherever it is computed.

    Args:
        size: from 1 to 2**62.
        seed: non-negative numbers; every other tuple gives another order.
    """

    def __init__(self, size: int, seed: Sequence[int]):
        self.size = size = int(size)
        bits = max(SMALLEST, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = np.random.SeedSequence(list(seed)).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at the places: int64 [n] from int64 [n], each in 0..size-1."""
        found = self._scramble(places.astype(np.uint64))
        outside = np.flatnonzero(found >= self.size)
        while len(outside):
            again = self._scramble(found[outside])
            found[outside] = again
            outside = outside[again >= self.size]
        return found.astype(np.int64)

    def _scramble(self, numbers: np.ndarray) -> np.ndarray:
        high, low = numbers >> self._low_bits, numbers & self._low
        for i in range(0, ROUNDS, 2):
            high = high ^ (_mix(low ^ self._keys[i]) & self._high)
            low = low ^ (_mix(high ^ self._keys[i + 1]) & self._low)
        return (high << self._low_bits) | low


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the number (the finalizer of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
