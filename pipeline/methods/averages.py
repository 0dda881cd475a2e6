"""Publish an average of weights: of a stage's start and its end, or of the whole way between.

`StartAverage` is WiSE-FT (Wortsman et al. 2022, robust fine-tuning of zero-shot models): weights in
between forget less and have learned nearly as much. `Ema` is the exponential moving average of the
weights (Polyak averaging; Izmailov et al. 2018 for the plain mean).

What is averaged is published *and* gone on with: the next stage starts from it, so that a run
depends on what it published alone. Each rank averages its own pieces of the fp32 weights, under
every engine; memory: one copy of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.methods.method import Method, Start
from pipeline.methods.weights import change_masters, changed_masters, copies, masters
from pipeline.recipe import Recipe
from pipeline.shard import Shard


class StartAverage(Method):
    """The recipe's `publish_average`: start * (the stage's first weights) + (1 - start) * (its
    last)."""

    name = "publish_average"
    kept_weights = 1
    needs = ("old weights",)

    def __init__(self, recipe: Recipe):
        assert recipe.publish_average is not None
        self.share = recipe.publish_average.start
        self._first: list[Shard] = []

    def prepare(self, start: Start) -> None:
        self._first = copies(start.engine)

    def finish(self, engine: Any, stage: int) -> None:
        change_masters(engine, self._average)
        self._first = []

    @contextmanager
    def published(self, engine: Any) -> Iterator[None]:
        with changed_masters(engine, self._average):
            yield

    def state_shards(self) -> Iterator[Shard]:
        yield from self._first

    def _average(self, place: int, weight: Tensor) -> Tensor:
        return torch.lerp(weight, self._first[place].tensor, self.share)


class Ema(Method):
    """The recipe's `ema`: after every step, average = decay * average + (1 - decay) * weights; it
    starts from the stage's first weights."""

    name = "ema"
    kept_weights = 1

    def __init__(self, recipe: Recipe):
        assert recipe.ema is not None
        self.decay = recipe.ema.decay
        self._average: list[Shard] = []

    def prepare(self, start: Start) -> None:
        self._average = copies(start.engine)

    def after_step(self, engine: Any, step: int, steps: int) -> None:
        for average, shard in zip(self._average, masters(engine), strict=True):
            average.tensor.lerp_(shard.tensor, 1 - self.decay)

    def finish(self, engine: Any, stage: int) -> None:
        change_masters(engine, self._of)
        self._average = []

    @contextmanager
    def published(self, engine: Any) -> Iterator[None]:
        with changed_masters(engine, self._of):
            yield

    def state_shards(self) -> Iterator[Shard]:
        yield from self._average

    def _of(self, place: int, _weight: Tensor) -> Tensor:
        return self._average[place].tensor
