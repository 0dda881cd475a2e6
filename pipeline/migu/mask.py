"""Select the rows to keep (paper, Eq. 3-5)."""

import math
from collections import defaultdict
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from pipeline.quantity import as_written


def kept_count(rows: int, threshold: float, rule: Literal["exact", "quantile"] = "exact") -> int:
    """How many of `rows` rows are updated.

    "exact" is the paper's d_out - floor(T * d_out) (Eq. 3). "quantile" is what the authors' code
    does, rows >= quantile(n, T): d_out - ceil(T * (d_out - 1)), without ties.
    """
    T = as_written(threshold)
    return rows - math.floor(T * rows) if rule == "exact" else rows - math.ceil(T * (rows - 1))


@torch.no_grad()
def select_rows(
    scores: Tensor,
    sizes: list[int],
    threshold: float,
    rule: Literal["exact", "quantile"] = "exact",
) -> Tensor:
    """The rows with the largest scores, layer by layer.

    Args:
        scores: fp32 [sum of sizes], the layers one after the other.
        sizes: rows of each layer.

    Returns:
        bool, shaped like `scores`: True where a row is kept. Among equal scores the earlier row
        wins under "exact", so that the count is exact; under "quantile" all of them are kept.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for index in _layers_by_width(tuple(sizes), scores.device):
        values = scores[index]
        if rule == "exact":
            order = values.argsort(dim=1, descending=True, stable=True)
            best = order[:, : kept_count(index.shape[1], threshold)]
            keep[index.gather(1, best)] = True
        else:
            keep[index] = values >= values.quantile(threshold, dim=1, keepdim=True)
    return keep


@lru_cache(maxsize=8)  # or the host would wait in every step for the numbers to reach a GPU
def _layers_by_width(sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """int64 [layers, width] for each width: where the rows of its layers are."""
    starts_of: dict[int, list[int]] = defaultdict(list)
    start = 0
    for size in sizes:
        starts_of[size].append(start)
        start += size
    return [
        torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)
        for size, starts in starts_of.items()
    ]
