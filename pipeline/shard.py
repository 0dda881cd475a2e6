"""Row arithmetic on a slice of a weight-shaped tensor, wherever the slice is cut."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass
class Shard:
    """A live, contiguous, local piece of one weight (or of its gradient).

    tensor: 1-D view of the elements [start, start + numel) of the row-major weight of `shape`.
    ZeRO's partitions are cut anywhere, so a shard may begin and end in the middle of a row.
    What works on output features is for matrices, and for experts [experts, ., .], one matrix
    each, whose features follow each other.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    def fill(self, whole: Tensor) -> None:
        """Copy this piece from the whole weight, of any dtype and device."""
        piece = whole.reshape(-1)[self.start : self.start + self.tensor.numel()]
        with torch.no_grad():
            self.tensor.copy_(piece)

    def mask(self, keep: Tensor, output_dim: int = 0) -> None:
        """Multiply by `keep` (bool [output features]) along them, in place; `output_dim` is the
        dimension of a matrix that they are.

        A product, not an assignment: inf * 0 is nan, so an overflow in a masked row still shows.
        """
        factor = keep.to(self.tensor.dtype)  # a product of one type is faster
        for piece, features in self._pieces(output_dim):
            piece.mul_(factor[features].unsqueeze(1 - output_dim))

    def restore(self, old: Tensor, keep: Tensor, output_dim: int = 0) -> None:
        """Put back, in place, the output features that are not in `keep` from `old` (a clone)."""
        before = Shard(self.name, old, self.start, self.shape)
        pieces = zip(self._pieces(output_dim), before._pieces(output_dim), strict=True)
        for (piece, features), (old_piece, _) in pieces:
            kept = keep[features].unsqueeze(1 - output_dim)
            piece.copy_(torch.where(kept, piece, old_piece))

    def add_magnitudes(self, total: Tensor, output_dim: int = 0) -> None:
        """Add sum(abs(.)) of each output feature to `total` (fp32 [output features])."""
        for piece, features in self._pieces(output_dim):
            total[features] += piece.abs().float().sum(dim=1 - output_dim).to(total.device)

    def _pieces(self, output_dim: int) -> Iterator[tuple[Tensor, slice]]:
        """The end of a row, whole rows, the start of a row: (2-D view, which output features its
        dimension `output_dim` is of)."""
        height, width = self.shape[-2:]
        end = self.start + self.tensor.numel()
        at = self.start
        while at < end:
            row, column = divmod(at, width)
            rows = (end - at) // width if column == 0 else 0
            if output_dim:  # the next matrix has other features
                rows = min(rows, height - row % height)
            size = rows * width or min(width - column, end - at)
            piece = self.tensor[at - self.start : at - self.start + size].view(rows or 1, -1)
            first = row // height * width + column if output_dim else row
            yield piece, slice(first, first + piece.shape[output_dim])
            at += size


def overlap(first: Shard, second: Shard) -> tuple[slice, slice]:
    """Where two pieces of one weight hold the same elements, in the tensor of each: a rank may have
    a whole gradient, but a part of the weights that it updates."""
    start = max(first.start, second.start)
    size = max(0, min(s.start + s.tensor.numel() for s in (first, second)) - start)
    at = start - first.start, start - second.start
    return slice(at[0], at[0] + size), slice(at[1], at[1] + size)


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch and DeepSpeed call them


@dataclass
class StateShard:
    """A piece of one weight in the optimizer's fp32, and what the optimizer knows of it.

    moments: live, by name, 1-D fp32, of the same elements as `master`; adam: the optimizer's own
    record, whose `step` may be one for several weights.
    """

    master: Shard
    moments: dict[str, Tensor]
    adam: dict[str, Any]

    @property
    def step(self) -> int:
        """How many updates the moments are of."""
        return int(self.adam["step"])

    def set_step(self, step: int) -> None:
        kept = self.adam["step"]  # a tensor, or a number
        self.adam["step"] = torch.full_like(kept, step) if isinstance(kept, Tensor) else step


class ParameterShards:
    """The shards of a model whose parameters and gradients are where torch keeps them: whole
    tensors, or DTensors of FSDP2 whose local rows are this rank's shard."""

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters())

    def gradient_shards(self, names: list[str]) -> Iterator[Shard]:
        """To be called between the last backward and the step. A rank without a row of a weight
        skips it."""
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is not None:
                yield from _local(name, gradient)

    def weight_shards(self, names: list[str]) -> Iterator[Shard]:
        """Live, and what the optimizer updates."""
        for name in names:
            yield from _local(name, self._parameters[name].detach())

    master_shards = weight_shards

    def masters_changed(self) -> None:
        """To be called after a write into `master_shards`: here they are the model's weights."""


def _local(name: str, weight: Tensor) -> Iterator[Shard]:
    """This rank's piece of a weight or gradient as torch keeps it: the whole tensor, or the local
    rows of a DTensor that is sharded along dimension 0 (nothing where this rank has no row)."""
    shape = tuple(weight.shape)
    if not isinstance(weight, DTensor):
        yield Shard(name, weight.view(-1), 0, shape)
        return
    local = weight.to_local()
    if local.numel():
        _, (row, *_) = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        yield Shard(name, local.view(-1), row * prod(shape[1:]), shape)
