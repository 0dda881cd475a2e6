"""How large each output feature of a layer is on the text of each domain (the paper's Figures 1, 5
and 15 to 17): the magnitudes by which MIGU chooses rows, of checkpoints before and after training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.measure.lm import separation_of_heldout
from pipeline.data.heldout import load_heldout
from pipeline.data.mlm import collate
from pipeline.errors import UserError, near
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.targets import Target, find_targets
from pipeline.model.attention import arrange

BATCH = 16  # sequences


Found = tuple[str, str, dict[str, np.ndarray]]
"""A layer's name and component, and of each domain its magnitudes: float64 [rows], summing to 1."""


@torch.inference_mode()
def magnitudes_of(
    model: Any, heldout: Path, domains: list[str] | None, samples: int
) -> list[Found]:
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
    targets = [t for t in find_targets(model, partly=True) if ".lora_A." not in t.name]
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
    layers: list[Found] = []
    for i, target in enumerate(targets):
        layers += _layers(target, {n: found[n][i].numpy() for n in names})
    return layers


def _layers(target: Target, sums: dict[str, np.ndarray]) -> list[Found]:
    """One; of a mixture one for each expert that every domain has sent a token to."""
    name = target.name.removesuffix(".weight")
    if not target.experts:
        return [(name, target.component, {n: s / s.sum() for n, s in sums.items()})]
    experts = zip(*(s.reshape(target.experts, -1) for s in sums.values()), strict=True)
    return [
        (f"{name}.{e}", target.component, {n: s / s.sum() for n, s in zip(sums, own, strict=True)})
        for e, own in enumerate(experts)
        if all(s.any() for s in own)
    ]
