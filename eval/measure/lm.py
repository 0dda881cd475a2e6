"""Held-out loss of a checkpoint on every domain, and which rows the domains share.

Runs in a process of its own (`launch/evaluate.py`), one per rank, each on its share of the blocks.
The result does not depend on the number of ranks: blocks are formed before they are shared, and
summed in their order.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from eval.measure.results import write_arrays, write_json
from pipeline.data.heldout import load_heldout
from pipeline.data.mlm import collate_causal, collate_mlm
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import select_rows
from pipeline.migu.targets import find_targets
from pipeline.model.load import PredictedPositions


@torch.inference_mode()
def evaluate_share(
    model: nn.Module,
    heldout: Path,
    output: Path,
    share: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    overlap: bool = True,
) -> None:
    """Evaluate blocks i with i % share[1] == share[0]; write the sums to `output` (.npz)."""
    device = next(model.parameters()).device
    manifest, domains = load_heldout(heldout)
    masked = manifest["objective"] == "masked"
    # A layer's rows are its outputs': of an adapter B alone, which is masked by them.
    linears = [t for t in find_targets(model) if ".lora_A." not in t.name] if overlap else []
    recorder = MagnitudeRecorder(linears) if overlap else None
    head = PredictedPositions(model)
    collate = collate_mlm if masked else collate_causal
    arrays: dict[str, Any] = {}
    count = sum(-(-len(d["labels"]) // batch_size) for d in domains.values())
    bar = tqdm(
        total=count,
        desc="held-out loss",
        unit="batch",
        disable=None if share[0] == 0 else True,
        leave=False,
    )
    for name, data in domains.items():
        losses = np.zeros(len(data["labels"]))
        starts = range(0, len(losses), batch_size)
        for block, start in enumerate(starts):
            bar.update()
            if block % share[1] != share[0]:
                continue
            rows = slice(start, start + batch_size)
            columns = (data[k][rows].long().numpy() for k in ("input_ids", "labels", "segments"))
            batch = collate(
                list(zip(*columns, strict=True)), cross_document=manifest["cross_document"]
            )
            batch = {k: v.to(device) for k, v in batch.items()}
            targets = batch.pop("labels")
            if not masked:
                targets = F.pad(targets[:, 1:], (0, 1), value=-100)
            head.select(targets >= 0)
            with recorder.recording() if recorder else nullcontext():
                logits = model(**batch).logits
            loss = F.cross_entropy(logits.float(), targets[targets >= 0], reduction="none")
            sequence = (targets >= 0).nonzero()[:, 0].cpu().numpy()
            np.add.at(losses, start + sequence, loss.double().cpu().numpy())
        arrays[f"loss/{name}"] = losses
        if recorder:
            arrays[f"magnitude/{name}"] = recorder.reduce().double().cpu().numpy()
    bar.close()
    head.close()
    if recorder:
        recorder.close()
        arrays["rows"] = np.array([t.rows for t in linears])
        arrays["components"] = np.array([t.component for t in linears])
    with output.open("wb") as file:
        np.savez(file, **arrays)


def merge_shares(
    parts: list[Path], heldout: Path, output: Path, threshold: float, info: dict[str, Any]
) -> None:
    """Add the shares up and write `eval.json` atomically: per domain the mean loss (nats per
    predicted token), its standard error over sequences, and the kept rows that domains share.

    Beside it `sequences.npz`, for differences between runs on the same text: per domain the summed
    loss `loss/<domain>` (float64) and the number of predicted tokens `tokens/<domain>` (int64) of
    each sequence.
    """
    from safetensors import safe_open

    manifest, domains = load_heldout(heldout)
    shares = [dict(np.load(p)) for p in parts]
    summed = {
        k: sum(s[k] for s in shares) for k in shares[0] if k.startswith(("loss/", "magnitude/"))
    }
    result: dict[str, Any] = {**info, "domains": {}}
    sequences: dict[str, Any] = {}
    for name, data in domains.items():
        tokens = _predicted(data["labels"].numpy(), manifest["objective"])
        losses = summed[f"loss/{name}"]
        sequences |= {f"loss/{name}": losses, f"tokens/{name}": tokens.astype(np.int64)}
        mean = losses.sum() / tokens.sum()
        # A ratio of sums over sequences: the linearised standard error.
        residuals = losses - mean * tokens
        stderr = (
            np.sqrt((residuals**2).sum() * len(losses) / max(1, len(losses) - 1)) / tokens.sum()
        )
        with safe_open(heldout / f"{name}.safetensors", "np") as file:
            unigram = float(file.metadata()["unigram_loss"])
        result["domains"][name] = {
            "loss": float(mean),
            "stderr": float(stderr),
            "tokens": int(tokens.sum()),
            "sequences": len(losses),
            "unigram_loss": unigram,
        }
    if "rows" in shares[0]:
        result["overlap"] = _overlap(
            {n: summed[f"magnitude/{n}"] for n in domains},
            shares[0]["rows"].tolist(),
            shares[0]["components"].tolist(),
            threshold,
        )
    write_arrays(output.with_name("sequences.npz"), sequences)
    write_json(output, result)
    for part in parts:
        part.unlink()


def _predicted(labels: np.ndarray, objective: str) -> np.ndarray:
    """Number of predicted tokens of each sequence; a causal LM does not predict the first."""
    return ((labels if objective == "masked" else labels[:, 1:]) >= 0).sum(axis=1)


def _overlap(
    magnitudes: dict[str, np.ndarray], rows: list[int], components: list[str], threshold: float
) -> dict[str, Any]:
    """Of the rows that MIGU would keep for domain i, the fraction it keeps for j too (Figure 5),
    averaged over the layers of each component."""
    keep = {
        name: select_rows(torch.from_numpy(m), rows, threshold).split(rows)
        for name, m in magnitudes.items()
    }
    kinds: dict[str, list] = {}
    for kind in dict.fromkeys(components):
        layers = [i for i, c in enumerate(components) if c == kind]
        kinds[kind] = [
            [
                float(
                    np.mean(
                        [float((keep[a][i] & keep[b][i]).sum() / keep[a][i].sum()) for i in layers]
                    )
                )
                for b in magnitudes
            ]
            for a in magnitudes
        ]
    return {"domains": list(magnitudes), "threshold": threshold, "kinds": kinds}
