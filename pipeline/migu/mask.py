"""Select the rows to keep (paper, Eq. 3-5)."""

import math
from collections import defaultdict
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


def kept_count(rows: int, threshold: float, rule: Literal["exact", "quantile"] = "exact") -> int:
    """How many of `rows` rows are updated.

    "exact" is the paper's d_out - floor(T * d_out) (Eq. 3). "quantile" is what the authors' code
    does, rows >= quantile(n, T): d_out - ceil(T * (d_out - 1)), without ties. T is taken as
    written: 0.7 * 90 is 63, although the product of the floats is just below it.
    """
    T = Fraction(str(threshold))
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
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    layers_of: dict[int, list[int]] = defaultdict(list)
    for start, size in zip(starts, sizes, strict=False):
        layers_of[size].append(start)
    for size, layer_starts in layers_of.items():  # all layers of a width at once
        index = torch.tensor(layer_starts, device=scores.device)[:, None]
        index = index + torch.arange(size, device=scores.device)  # [layers, size]
        values = scores[index]
        if rule == "exact":
            order = values.argsort(dim=1, descending=True, stable=True)
            best = order[:, : kept_count(size, threshold)]
            keep[index.gather(1, best)] = True
        else:
            keep[index] = values >= values.quantile(threshold, dim=1, keepdim=True)
    return keep
