"""Half fine-tuning (Hui et al. 2024, arXiv 2404.18466): each stage trains a random half of the
matrices of every block and leaves the other half as it is.

Of a block's attention matrices, and of those of its feed-forward part, half are drawn (rounded
down); embeddings, norms and the head train. A frozen matrix has a gradient of zero, so AdamW, which
begins anew with every stage, does not move it.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from pipeline.methods.method import Method, Start
from pipeline.migu.targets import component_of
from pipeline.model.blocks import block_linears, find_blocks
from pipeline.recipe import Recipe


class Half(Method):
    """The recipe's `hft`."""

    name = "hft"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        self.frozen: list[str] = []
        self._recipe = recipe

    def check(self, net: nn.Module) -> None:
        _names(net)

    def prepare(self, start: Start) -> None:
        seed = self._recipe.stage_seed(start.stage) * 1_000_003
        generator = torch.Generator().manual_seed(seed)
        self.frozen = []
        for names in _names(start.engine.module):
            order = torch.randperm(len(names), generator=generator).tolist()
            self.frozen += [names[i] for i in order[: len(names) // 2]]

    def edit(self, shards: Any, step: int, lr: float) -> None:
        for shard in shards.gradient_shards(self.frozen):
            shard.tensor.zero_()


def _names(net: nn.Module) -> list[list[str]]:
    """The weights of each block's attention, and of each one's feed-forward part."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for block in find_blocks(net):
        for name, _ in block_linears(net):
            if name.startswith(f"{block}."):
                kind = "ffn" if component_of(name).startswith("ffn") else "attention"
                groups[block, kind].append(f"{name}.weight")
    return list(groups.values())
