"""SSU, source-shielded updates (arXiv 2512.04844): the columns of each weight that the source text
uses most are frozen.

A column's score is sum_i |W_ij| times the norm of the input feature j over source text, which the
base wrote itself or which is a domain; the share with the largest scores gets no gradient. AdamW
begins anew with every stage, so it does not move them.
"""

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.checkpoint import keep_file
from pipeline.data.mlm import collate
from pipeline.methods.method import Method, Start
from pipeline.methods.sampled_text import sampled_sequences
from pipeline.model.attention import arrange, separation_of
from pipeline.model.blocks import block_linears
from pipeline.quantity import as_written
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe

BATCH = 16  # sequences


class SourceColumns(Method):
    """The recipe's `ssu`."""

    name = "ssu"
    needs = ("old weights",)

    def __init__(self, recipe: Recipe):
        assert recipe.ssu is not None
        self.settings, self._recipe = recipe.ssu, recipe
        self._keep: dict[str, tuple[Tensor, int]] = {}  # by weight: bool [inputs]; its dimension

    def check(self, net: nn.Module) -> None:
        list(block_linears(net))

    def begin(self, start: Start) -> None:
        found = on_rank0(partial(self._choose, start))
        self._keep = {n: (torch.tensor(keep), dim) for n, (keep, dim) in found.items()}

    def edit(self, shards: Any, step: int, lr: float) -> None:
        for shard in shards.gradient_shards(list(self._keep)):
            keep, dim = self._keep[shard.name]
            shard.mask(keep.to(shard.tensor.device), dim)

    def _choose(self, start: Start) -> dict[str, tuple[list[bool], int]]:
        """Once; the choice is kept in the run folder."""
        kept = start.kept / self.name / "columns.json"
        if kept.is_file():
            return {n: (k, d) for n, (k, d) in json.loads(kept.read_text("utf-8")).items()}
        net = start.teacher("base").load()
        norms = input_norms(net, self._batches(start, net))
        found = {}
        share = as_written(self.settings.share)
        for name, norm in norms.items():
            module: Any = net.get_submodule(name)
            dim = 0 if isinstance(module, Conv1D) else 1  # of the inputs
            scores = module.weight.detach().float().abs().sum(1 - dim) * norm
            frozen = scores.argsort(descending=True)[: int(share * len(scores))]
            keep = torch.ones(len(scores), dtype=torch.bool).index_fill(0, frozen.cpu(), False)
            found[f"{name}.weight"] = keep.tolist(), dim
        keep_file(kept, json.dumps(found))
        return found

    def _batches(self, start: Start, net: Any) -> Iterable[tuple[dict[str, Any], Tensor | None]]:
        """(inputs of the model's forward, which of their tokens are real), of the source text."""
        device, count = next(net.parameters()).device, self.settings.sequences
        separation = separation_of(net, self._recipe)
        if self.settings.text == "self":
            sampled = sampled_sequences("self", lambda: net, start.tokenizer, self._recipe, count)
            sequences = [s for _, s in sampled]
        else:
            sequences = list(start.domain(self.settings.text, count))
        rows = [(ids := s.ids.astype("int64"), ids, s.segments) for s in sequences]
        for first in range(0, len(rows), BATCH):
            batch = {k: v.to(device) for k, v in collate(rows[first : first + BATCH]).items()}
            inputs, tokens = arrange(batch, separation, net)
            yield inputs, tokens.get("real")


@torch.no_grad()
def input_norms(
    net: Any, batches: Iterable[tuple[dict[str, Any], Tensor | None]]
) -> dict[str, Tensor]:
    """By linear of the blocks: the L2 norm of each input feature over all real tokens, fp32."""
    sums: dict[str, Tensor] = {}
    real_now: list[Tensor | None] = [None]

    def observe(name: str, _module: nn.Module, inputs: tuple) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        if real_now[0] is not None and real_now[0].numel() == len(x):
            x = x * real_now[0].reshape(-1, 1)
        sums[name] = sums.get(name, 0) + x.square().sum(0)

    hooks = [
        module.register_forward_pre_hook(partial(observe, name))
        for name, module in block_linears(net)
    ]
    for inputs, real in batches:
        real_now[0] = real
        net.base_model(**inputs)
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt().cpu() for name, total in sums.items()}
