"""Decay toward the weights that a run or stage began with, instead of toward zero (L2-SP; Li et al.
2018, arXiv 1802.01483): the gradient of weight / 2 * |weights - start|^2 is added.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.methods.method import Method, Start
from pipeline.methods.weights import copies, masters
from pipeline.recipe import Recipe
from pipeline.shard import Shard, overlap


class L2ToStart(Method):
    """The recipe's `l2_to_start`. Memory: one fp32 copy of this rank's pieces."""

    name = "l2_to_start"
    kept_weights = 1
    needs = ("old weights",)

    def __init__(self, recipe: Recipe):
        assert recipe.l2_to_start is not None
        self.factor, self.of = recipe.l2_to_start.weight, recipe.l2_to_start.start
        self._engine: Any = None
        self._start: dict[str, Shard] = {}

    def prepare(self, start: Start) -> None:
        self._engine = start.engine
        first = self.of == "stage" or start.stage == 1 or not self._start
        if first:
            self._start = {s.name: s for s in copies(start.engine)}
        if first and self.of == "base" and start.stage > 1:  # a run that was interrupted
            base = dict(start.teacher("base").load_on_all(exact=True).named_parameters())
            for name, shard in self._start.items():
                shard.fill(base[name].detach())

    def edit(self, shards: Any, step: int, lr: float) -> None:
        now = {s.name: s for s in masters(self._engine)}
        for gradient in shards.gradient_shards(list(now)):
            master, first = now[gradient.name], self._start[gradient.name]
            here, there = overlap(gradient, master)
            moved = master.tensor[there] - first.tensor[there]
            gradient.tensor[here].add_(moved.to(gradient.tensor.dtype), alpha=self.factor)

    def state_shards(self) -> Iterator[Shard]:
        yield from self._start.values()
