"""Row arithmetic on a slice of a weight-shaped tensor, wherever the slice is cut."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Shard:
    """A live, contiguous, local piece of one weight (or of its gradient).

    tensor: 1-D view of the elements [start, start + numel) of the row-major weight of `shape`.
    ZeRO's partitions are cut anywhere, so a shard may begin and end in the middle of a row.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, int]

    def mask(self, keep: Tensor, output_dim: int = 0) -> None:
        """Multiply by `keep` (bool [shape[output_dim]]) along the output features, in place.

        A product, not an assignment: inf * 0 is nan, so an overflow in a masked row still shows.
        """
        for piece, row, column in self._pieces():
            if output_dim == 0:
                piece.mul_(keep[row : row + piece.shape[0], None])
            else:
                piece.mul_(keep[None, column : column + piece.shape[1]])

    def restore(self, old: Tensor, keep: Tensor, output_dim: int = 0) -> None:
        """Put back, in place, the output features that are not in `keep` from `old` (a clone)."""
        before = Shard(self.name, old, self.start, self.shape)
        for (piece, row, column), (old_piece, _, _) in zip(
            self._pieces(), before._pieces(), strict=True
        ):
            if output_dim == 0:
                kept = keep[row : row + piece.shape[0], None]
            else:
                kept = keep[None, column : column + piece.shape[1]]
            piece.copy_(torch.where(kept, piece, old_piece))

    def add_magnitudes(self, total: Tensor, output_dim: int = 0) -> None:
        """Add sum(abs(.)) of each output feature to `total` (fp32 [shape[output_dim]])."""
        for piece, row, column in self._pieces():
            first = row if output_dim == 0 else column
            sums = piece.abs().float().sum(dim=1 - output_dim).to(total.device)
            total[first : first + piece.shape[output_dim]] += sums

    def _pieces(self) -> Iterator[tuple[Tensor, int, int]]:
        """The end of a row, whole rows, the start of a row: (2-D view, first row, first column)."""
        columns = self.shape[1]
        end = self.start + self.tensor.numel()
        at = self.start
        while at < end:
            row, column = divmod(at, columns)
            rows = (end - at) // columns if column == 0 else 0
            size = rows * columns or min(columns - column, end - at)
            local = self.tensor[at - self.start : at - self.start + size]
            yield local.view(rows or 1, -1), row, column
            at += size
