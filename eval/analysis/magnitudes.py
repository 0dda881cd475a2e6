"""The magnitudes of a layer by domain, and the rows that MIGU would keep by them."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from pipeline.errors import UserError, near
from pipeline.migu.mask import select_rows


@dataclass
class Layer:
    """magnitudes: of each domain, float64 [rows], summing to 1."""

    name: str
    component: str
    magnitudes: dict[str, np.ndarray]


def choose(layers: list[Layer], name: str | None) -> Layer:
    """The layer of that name, or the first FFN linear of the last block, as in Figure 1.

    Raises:
        UserError: there is no such layer.
    """
    if name is None:
        first = [layer for layer in layers if layer.component == "ffn_in"]
        return (first or layers)[-1]
    known = [layer.name for layer in layers]
    if name not in known:
        raise UserError(f"--layer: there is no masked layer {name!r}{near(name, known)}")
    return layers[known.index(name)]


def overlap_of(layer: Layer, threshold: float) -> np.ndarray:
    """[domains, domains]: of the rows that are kept for one, the share kept for the other too."""
    kept = [
        select_rows(torch.from_numpy(m), [len(m)], threshold) for m in layer.magnitudes.values()
    ]
    return np.array([[float((a & b).sum() / a.sum()) for b in kept] for a in kept])


def mean_overlap(layer: Layer, threshold: float) -> float:
    """Of two different domains, on average; nan for one domain."""
    table = overlap_of(layer, threshold)
    pairs = [table[i, j] for i, j in combinations(range(len(table)), 2)]
    return float(np.mean(pairs)) if pairs else float("nan")
