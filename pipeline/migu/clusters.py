"""Rows in groups that are kept or masked together (the paper's appendix E, Figure 11).

Each layer's rows are partitioned once, by their weights or by how their magnitudes go together over
some texts; a row's score is then the mean of its group's. Which rows are kept in a step still has
the size that the threshold says: where that ends within a group, its earlier rows are kept.
"""

import torch
from torch import Tensor

from pipeline.migu.targets import Target

ROUNDS = 20  # of k-means


def k_means(rows: Tensor, count: int, seed: int) -> Tensor:
    """The group of each row, int64 [n], of `count` at most: Lloyd's algorithm from drawn rows.

    rows: fp32 [n, d].
    """
    count = min(count, len(rows))
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    groups = torch.cdist(rows, centres).argmin(1)
    for _ in range(ROUNDS):
        before = groups
        for group in groups.unique():  # one without rows stays where it is
            centres[group] = rows[groups == group].mean(0)
        groups = torch.cdist(rows, centres).argmin(1)
        if torch.equal(groups, before):
            break
    return groups


def random_groups(rows: int, count: int, seed: int) -> Tensor:
    """A control: groups of one size, drawn. int64 [rows]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows, generator=generator) % min(count, rows)


def grouped(targets: list[Target], groups: dict[str, Tensor]) -> Tensor:
    """Of all rows of the targets, one after the other, the number of their group, int64, every
    target with its own.

    groups: by the name of a layer's weight; the B of a LoRA layer has those of the layer that it
        adapts, and each row of an A is a group of its own, as a rank has no weights yet.
    """
    found, first = [], 0
    for target in targets:
        adapted, _, adapter = target.name.partition(".lora_B.")
        layer = f"{adapted}.weight" if adapter else target.name
        own = torch.arange(target.rows) if ".lora_A." in target.name else groups[layer]
        found.append(own + first)
        first += int(own.max()) + 1
    return torch.cat(found).to(targets[0].weight.device)


def group_means(scores: Tensor, groups: Tensor) -> Tensor:
    """Of each row the mean score of its group."""
    sums = torch.zeros(int(groups.max()) + 1, dtype=scores.dtype, device=scores.device)
    sizes = torch.zeros_like(sums).index_add_(0, groups, torch.ones_like(scores))
    sums.index_add_(0, groups, scores)
    return (sums / sizes.clamp_min(1))[groups]
