"""Distillation: on the new text the model stays close to what it was before the stage, or the run.

Hinton et al. 2015 (arXiv 1503.02531), as Learning without Forgetting uses it (Li and Hoiem 2016,
arXiv 1606.09282). It needs no old data; a frozen copy of the model reads every batch too.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.method import Method, Start, frozen_teacher
from pipeline.model.load import predict
from pipeline.recipe import Recipe


class Distill(Method):
    """The recipe's `kd`: loss + weight * T^2 KL(teacher || model) at the predicted positions."""

    name = "kd"
    live_teacher = True
    needs = ("old weights",)

    def __init__(self, recipe: Recipe):
        assert recipe.kd is not None
        self.settings = recipe.kd
        self._teacher: Any = None

    def prepare(self, start: Start) -> None:
        which = "base" if start.stage == 1 else self.settings.teacher
        self._teacher = frozen_teacher(start, which, "kd=null, or anchor={} in its place")

    def weigh(self, losses: Tensor, logits: Tensor, targets: Tensor, inputs: dict) -> Tensor:
        t = self.settings.temperature
        with torch.no_grad():
            theirs = predict(self._teacher, inputs, targets >= 0, None).float().div(t)
            theirs = theirs.log_softmax(-1)
        ours = logits.float().div(t).log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1)
        return losses + self.settings.weight * t * t * divergence

    def finish(self, engine: Any, stage: int) -> None:
        engine.release(self._teacher)
        self._teacher = None
