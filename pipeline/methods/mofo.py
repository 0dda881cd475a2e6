"""MoFO (Chen et al. 2024, arXiv 2407.20999): of every weight only the entries with the largest
momentum move.

AdamW's moments take in the whole gradient. Its update is then undone but where abs(exp_avg) is
among the largest `share` of its weight tensor, over all ranks (the paper's filter; its partition is
that of the parameter tensors). The threshold is exact: fp32 numbers that are not negative are in
the order of their bits, which are found from the highest down by counting.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.method import Method, Start
from pipeline.methods.weights import copies
from pipeline.quantity import as_written
from pipeline.ranks import summed
from pipeline.recipe import Recipe

DIGITS = ((20, 11), (10, 10), (0, 10))  # of 31 bits: (lowest bit, bits), from the highest down


class Mofo(Method):
    """The recipe's `mofo`."""

    name = "mofo"

    def __init__(self, recipe: Recipe):
        assert recipe.mofo is not None
        self.share = recipe.mofo.share
        self._engine: Any = None
        self._before: dict[tuple[str, int], Tensor] = {}

    def prepare(self, start: Start) -> None:
        self._engine = start.engine

    def edit(self, shards: Any, step: int, lr: float) -> None:
        """Remember the weights: the last place before the update."""
        self._before = {(s.name, s.start): s.tensor for s in copies(self._engine)}

    @torch.no_grad()
    def after_step(self, engine: Any, step: int, steps: int) -> None:
        trained = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        place = {name: i for i, name in enumerate(trained)}
        held = [(s.master, s.moments["exp_avg"].abs()) for s in engine.state_shards()]
        pieces = [(place[master.name], momentum) for master, momentum in held]
        least = least_kept(pieces, len(trained), self.share, engine.device)
        for (master, momentum), (weight, _) in zip(held, pieces, strict=True):
            before = self._before[master.name, master.start]
            moves = momentum.view(torch.int32) >= least[weight].to(momentum.device)
            master.tensor.copy_(torch.where(moves, master.tensor, before))
        self._before = {}
        engine.state_changed()


def least_kept(
    pieces: list[tuple[int, Tensor]], weights: int, share: float, device: torch.device
) -> Tensor:
    """int64 [weights]: the bits of the smallest of the largest `share` of each weight's numbers.

    All ranks call it. A rank may hold a part of a weight, none or all of it.

    Args:
        pieces: (which weight, fp32 [n], none negative) of this rank.
    """
    known = torch.zeros(weights, dtype=torch.int64, device=device)
    wanted = known  # so many of the largest are still to be found among those that begin as known
    part = as_written(share)
    for low, width in DIGITS:
        counts = torch.zeros(weights, 1 << width, dtype=torch.int64, device=device)
        for weight, numbers in pieces:
            bits = numbers.view(torch.int32) >> low
            if low + width < 31:
                bits = bits[(bits >> width) == known[weight].to(bits.device)]
            digits = bits & ((1 << width) - 1)
            counts[weight] += digits.bincount(minlength=1 << width).to(device)
        counts = summed(counts, device)
        if low + width == 31:
            wanted = -(-counts.sum(1) * part.numerator // part.denominator)
        above = counts.flip(1).cumsum(1).flip(1)  # how many have this digit or a higher one
        digit = (above >= wanted[:, None]).sum(1) - 1  # the highest that suffices
        higher = above - counts
        wanted = wanted - higher.gather(1, digit[:, None]).squeeze(1)
        known = (known << width) | digit
    return known
