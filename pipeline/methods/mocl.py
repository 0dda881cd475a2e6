"""MoCL (Wang et al. 2024, arXiv 2404.00790): a stage's key is drawn toward the texts of the stage.

By the keys a text finds the adapters that it takes (`model/composed_lora.py`). 1 - cosine of a text
to the key of its stage is added to the loss, as in the authors' code, where the mean is over texts;
here each predicted token has its text's, so that it is the same however a batch is split.
"""

from typing import Any

from torch import Tensor

from pipeline.methods.method import Method, Start
from pipeline.model.composed_lora import composition_of
from pipeline.model.load import predicted_places
from pipeline.recipe import Recipe


class Mocl(Method):
    """The recipe's `mocl`, of composed adapters."""

    name = "mocl"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.mocl is not None
        self.factor = recipe.mocl.weight
        self._composition: Any = None

    def prepare(self, start: Start) -> None:
        self._composition = composition_of(start.engine.module)

    def weigh(self, losses: Tensor, logits: Tensor, targets: Tensor, inputs: dict) -> Tensor:
        rows = predicted_places(targets, len(losses)) // targets.shape[1]
        return losses + self.factor * self._composition.distance.index_select(0, rows)
