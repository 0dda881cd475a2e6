"""How large each output feature of a layer is on the text of each domain (the paper's Figures 1, 5
and 15 to 17): the magnitudes by which MIGU chooses rows, of checkpoints before and after training.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.measure.lm import separation_of_heldout
from pipeline.data.heldout import load_heldout
from pipeline.data.mlm import collate
from pipeline.errors import UserError
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import select_rows
from pipeline.migu.targets import Target, find_targets
from pipeline.model.attention import arrange
from pipeline.run.problems import near

BATCH = 16  # sequences


@dataclass
class Layer:
    """magnitudes: of each domain, float64 [rows], summing to 1."""

    name: str
    component: str
    magnitudes: dict[str, np.ndarray]


@torch.inference_mode()
def magnitudes_of(
    model: Any, heldout: Path, domains: list[str] | None, samples: int
) -> list[Layer]:
    """Of every layer that MIGU masks, over the first `samples` sequences of each domain.

    Raises:
        UserError: a domain that the held-out folder does not have.
    """
    _, data = load_heldout(heldout)
    names = domains or list(data)
    for name in names:
        if name not in data:
            raise UserError(f"--domains: {heldout} has no {name!r}{near(name, data)}")
    device, separation = next(model.parameters()).device, separation_of_heldout(model, heldout)
    targets = [t for t in find_targets(model, experts=True) if ".lora_A." not in t.name]
    recorder = MagnitudeRecorder(targets)
    found = {}
    for name in names:
        columns = [data[name][k][:samples].long() for k in ("input_ids", "labels", "segments")]
        for start in range(0, len(columns[0]), BATCH):
            rows = zip(*(c[start : start + BATCH].numpy() for c in columns), strict=True)
            batch = {k: v.to(device) for k, v in collate(list(rows)).items()}
            inputs, tokens = arrange(batch, separation, model)
            with recorder.recording(tokens.get("real"), tokens.get("decoder_real")):
                model(**inputs)
        found[name] = recorder.reduce().double().cpu().split([t.rows for t in targets])
    recorder.close()
    return [_layer(t, {n: found[n][i].numpy() for n in names}) for i, t in enumerate(targets)]


def _layer(target: Target, sums: dict[str, np.ndarray]) -> Layer:
    name = target.name.removesuffix(".weight")
    return Layer(name, target.component, {n: s / s.sum() for n, s in sums.items()})


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
