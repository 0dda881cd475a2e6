"""O-LoRA (Wang et al. 2023, arXiv 2310.14152): a stage's adapter is held orthogonal to the earlier.

The penalty is weight * sum |A_earlier A_new^T| over the layers, as in the authors' code; its
gradient for A_new, weight * sign(A_new A_earlier^T) A_earlier, is added to the engine's pieces.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.method import Method, Start
from pipeline.model.lora import EARLIER
from pipeline.recipe import Recipe


class OLora(Method):
    """The recipe's `olora`, of incremental adapters."""

    name = "olora"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.olora is not None
        self.factor = recipe.olora.weight
        self._engine: Any = None
        self._earlier: dict[str, Tensor] = {}  # by the name of the new A: [earlier ranks, d_in]

    def prepare(self, start: Start) -> None:
        self._engine = start.engine
        names = [n for n, _ in start.engine.module.named_parameters() if ".lora_A." in n]
        old = [n for n in names if f".{EARLIER}." in n]
        self._earlier = {
            n.replace(f".{EARLIER}.", ".default."): a.clone()
            for n, a in start.engine.full_weights(names=old)
        }

    def edit(self, shards: Any, step: int, lr: float) -> None:
        if not self._earlier:  # the first stage
            return
        now = self._engine.full_weights(names=self._earlier)
        pulls = {name: orthogonality_gradient(a, self._earlier[name]) for name, a in now}
        for shard in shards.gradient_shards(list(self._earlier)):
            pull = pulls[shard.name].flatten()[shard.start : shard.start + shard.tensor.numel()]
            shard.tensor.add_(pull.to(shard.tensor), alpha=self.factor)


def orthogonality_gradient(new: Tensor, earlier: Tensor) -> Tensor:
    """Of sum |new earlier^T| with respect to `new` [r, d_in]; earlier [R, d_in]."""
    earlier = earlier.to(new)
    return torch.sign(new @ earlier.t()) @ earlier
