"""`mask.clusters`: the groups of rows of a run, made once, from the base alone."""

from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.checkpoint import keep_file
from pipeline.methods.domain_text import domain_batches
from pipeline.methods.method import Start
from pipeline.migu.clusters import k_means, random_groups
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.targets import Target, find_targets
from pipeline.model.attention import arrange, separation_of
from pipeline.ranks import on_rank0

STREAM = 23  # of the seeds that are drawn from the recipe's
SEQUENCES = 64  # of the first stage's text, over which magnitudes go together


def row_groups(begun: Start) -> dict[str, Tensor] | None:
    """By a layer's weight, the group of each of its rows, int64 [rows]; None: the recipe has none.

    All ranks call it; rank 0 takes room for a whole model, the first time in a run.
    """
    mask = begun.recipe.mask
    if not mask.enabled or mask.clusters is None:
        return None
    path = begun.kept / "row_groups.safetensors"
    if not on_rank0(path.is_file):
        on_rank0(lambda: keep_file(path, save(_make(begun))))
    content = on_rank0(path.read_bytes)
    return load(content)


def _make(begun: Start) -> dict[str, Tensor]:
    recipe = begun.recipe
    net: Any = begun.teacher("base").load()
    net.requires_grad_(True)  # what is frozen is no target
    targets = find_targets(net, recipe.mask.components)
    net.requires_grad_(False)
    count, by = recipe.mask.clusters or 1, recipe.mask.cluster_by
    seeds = [recipe.seed * 1_000_003 + i for i in range(len(targets))]
    if by == "random":
        found = [random_groups(t.rows, count, s) for t, s in zip(targets, seeds, strict=True)]
    else:
        rows = _profiles(begun, net, targets) if by == "magnitude" else map(weight_rows, targets)
        found = [k_means(r, count, s) for r, s in zip(rows, seeds, strict=True)]
    return {t.name: g.cpu().contiguous() for t, g in zip(targets, found, strict=True)}


def weight_rows(target: Target) -> Tensor:
    """fp32 [rows, inputs]."""
    weight = target.weight.detach().float()
    return (weight.mT if target.output_dim else weight).flatten(0, -2).contiguous()


def _profiles(begun: Start, net: Any, targets: list[Target]) -> list[Tensor]:
    """Of each row its magnitudes in some texts, of length 1: rows that are large in the same texts
    are alike, however large they are. fp32 [rows, texts] a target."""
    recipe = begun.recipe
    separation, device = separation_of(net, recipe), next(net.parameters()).device
    recorder = MagnitudeRecorder(targets, recipe.mask.normalize)
    columns = []
    for _, batch in domain_batches(
        begun, recipe.stages[0].domains, SEQUENCES, (recipe.seed, STREAM)
    ):
        for i in range(len(batch["labels"])):
            one = {k: v[i : i + 1].to(device) for k, v in batch.items()}
            inputs, tokens = arrange(one, separation, net)
            with (
                torch.no_grad(),
                recorder.recording(tokens.get("real"), tokens.get("decoder_real")),
            ):
                net(**inputs)
            columns.append(recorder.take()[: sum(recorder.sizes)])
    recorder.close()
    whole = torch.stack(columns, dim=1)
    return [torch.nn.functional.normalize(p, dim=1) for p in whole.split(recorder.sizes)]
