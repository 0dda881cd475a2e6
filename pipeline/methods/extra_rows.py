"""Rows that a method adds to every step's batch, dealt to the ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.ranks import rank, world_size


@dataclass(frozen=True)
class ExtraRows:
    """rows: of a step, over all ranks. micro_batch_size: of the recipe; None: as large as it takes.

    Every rank has as many rows and micro-batches as the others: where the rows do not suffice, some
    are None, and nothing is predicted in them.
    """

    rows: int
    micro_batch_size: int | None

    @property
    def per_rank(self) -> int:
        return math.ceil(self.rows / world_size())

    @property
    def micro_batches(self) -> int:
        """Of a step and rank."""
        return math.ceil(self.per_rank / self._size)

    def deal(self, places: Sequence[int]) -> list[list[int | None]]:
        """This rank's part of a step's rows, by micro-batch."""
        mine: list[int | None] = list(places[rank() :: world_size()])
        mine += [None] * (self.per_rank - len(mine))
        return [mine[i : i + self._size] for i in range(0, len(mine), self._size)]

    @property
    def _size(self) -> int:
        return min(self.micro_batch_size or self.per_rank, self.per_rank)
