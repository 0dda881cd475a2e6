"""Held-out loss of a model on every domain, and which rows the domains share.

In a run the engine computes it, sharded as it is (`measure_in_engine`); `launch/evaluate.py` loads
a published checkpoint. Each rank evaluates its share of the blocks. The result does not depend on
the number of ranks: blocks are formed before they are shared, and summed in their order.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from eval.measure.results import write_arrays, write_json
from pipeline.data.heldout import in_its_tokens, load_heldout
from pipeline.data.mlm import collate
from pipeline.data.objective import targets_of
from pipeline.engine.config import precision_of
from pipeline.errors import UserError
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import select_rows
from pipeline.migu.targets import find_targets
from pipeline.model.attention import Separation, arrange, separate_documents
from pipeline.model.load import PredictedPositions
from pipeline.model.prompt import prompt_of, without_prompt
from pipeline.progress import say
from pipeline.ranks import end_if_asked, on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.run.evaluation import RESULTS, Evaluation

Arrays = dict[str, Any]  # of numpy


def measure_in_engine(
    engine: Any, separation: Separation, task: Evaluation, recipe: Recipe
) -> None:
    """Write `eval.json` and `sequences.npz` of the weights that the engine holds. All ranks call
    it; none needs to hold the whole model."""
    share = (rank(), world_size())
    heldout = task.run / "heldout"
    # A prompt changes the model before it is trained: the base is measured without it.
    alone = without_prompt(engine.module) if task.stage == 0 else nullcontext()
    with alone, engine.evaluating():
        sums = _evaluate(
            engine.module,
            engine.forward,
            separation,
            engine.device,
            heldout,
            share,
            recipe.evaluate.batch_size,
            recipe.evaluate.overlap,
        )
    _add_up_losses(sums, engine.device)  # the magnitudes are already summed over the ranks
    info = {**task.describe(), "precision": precision_of(engine.config)}

    def write() -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        output = task.folder / RESULTS["heldout"]
        _write_result(sums, heldout, output, recipe.mask.threshold, info)

    on_rank0(write)


def losses_in_engine(
    engine: Any, separation: Separation | None, heldout: Path, domains: list[str], batch_size: int
) -> dict[str, float]:
    """Held-out loss (nats per predicted token) of some domains, of the weights that the engine
    holds; nothing is written. All ranks call it and get the same numbers."""
    assert separation is not None  # known with the engine
    share = (rank(), world_size())
    module, forward, device = engine.module, engine.forward, engine.device
    with engine.evaluating():
        sums = _evaluate(
            module, forward, separation, device, heldout, share, batch_size, False, domains
        )
    _add_up_losses(sums, engine.device)
    return _mean_losses(sums, heldout, domains)


@torch.inference_mode()
def losses_of(model: nn.Module, heldout: Path, batch_size: int = 32) -> dict[str, float]:
    """Held-out loss (nats per predicted token) of every domain, of a model that is whole."""
    separation, device = separation_of_heldout(model, heldout), next(model.parameters()).device
    sums = _evaluate(model, model, separation, device, heldout, (0, 1), batch_size, False)
    return _mean_losses(sums, heldout, load_heldout(heldout)[0]["domains"])


def _mean_losses(sums: Arrays, heldout: Path, domains: list[str]) -> dict[str, float]:
    manifest, data = load_heldout(heldout)
    tokens = {n: _predicted(data[n]["labels"].numpy(), manifest["objective"]) for n in domains}
    return {n: float(sums[f"loss/{n}"].sum() / tokens[n].sum()) for n in domains}


def _add_up_losses(sums: Arrays, device: torch.device) -> None:
    """Over the ranks, in place."""
    if world_size() > 1:
        for name in (n for n in sums if n.startswith("loss/")):
            losses = torch.from_numpy(sums[name]).to(device)
            dist.all_reduce(losses)
            sums[name] = losses.cpu().numpy()


@torch.inference_mode()
def evaluate_share(
    model: nn.Module,
    heldout: Path,
    output: Path,
    share: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    overlap: bool = True,
) -> None:
    """Evaluate blocks i with i % share[1] == share[0]; write the sums to `output` (.npz).

    For a process without a process group, whose model is whole; `merge_shares` follows. The model
    is asked how documents are kept apart in it.
    """
    separation, device = separation_of_heldout(model, heldout), next(model.parameters()).device
    sums = _evaluate(model, model, separation, device, heldout, share, batch_size, overlap)
    with output.open("wb") as file:
        np.savez(file, **sums)


def check_tokens(heldout: Path, model: str, load: Callable[[], Any]) -> None:
    """load: the model's tokenizer, or UserError where it has none.

    Raises:
        UserError: the held-out text is in other tokens than the model's.
    """
    try:
        tokenizer = load()
    except UserError:
        say(f"{model} has no tokenizer: whether {heldout} is in its tokens is not checked")
        return
    if not in_its_tokens(heldout, tokenizer):
        raise UserError(
            f"{heldout} is in other tokens than those of {model}: a loss on it would mean nothing. "
            "Give the held-out text of a run with the same tokenizer"
        )


def separation_of_heldout(model: nn.Module, heldout: Path) -> Separation:
    """How the documents of a held-out folder are kept apart in a model that is whole."""
    manifest, domains = load_heldout(heldout)
    length = next(iter(domains.values()))["labels"].shape[1]
    apart, together = manifest.get("keep_apart", "auto"), manifest["cross_document"]
    return separate_documents(model, manifest["objective"] == "causal", together, apart, length)


def _evaluate(
    model: nn.Module,
    forward: Callable[..., Any],
    separation: Separation,
    device: torch.device,
    heldout: Path,
    share: tuple[int, int],
    batch_size: int,
    overlap: bool,
    only: list[str] | None = None,
) -> Arrays:
    """Sums over this share's blocks: per domain (of `only`; default: all) the loss of each sequence
    and the magnitudes (with `overlap`), which the recorder adds up over the process group.

    Every share does the same number of forwards: where the model is sharded, each is a collective.
    """
    manifest, domains = load_heldout(heldout)
    domains = {n: d for n, d in domains.items() if only is None or n in only}
    # A layer's rows are its outputs': of an adapter B alone, which is masked by them.
    overlap = overlap and prompt_of(model) is None  # with a prompt no linear is trained
    found = find_targets(model, partly=True) if overlap else []
    linears = [t for t in found if ".lora_A." not in t.name]
    recorder = MagnitudeRecorder(linears) if overlap else None
    head = PredictedPositions(model)
    arrays: Arrays = {}
    # Rounds of one block a share; in a domain's last round some shares repeat a block for nothing.
    rounds = {n: -(-len(d["labels"]) // (batch_size * share[1])) for n, d in domains.items()}
    bar = tqdm(
        total=sum(rounds.values()),
        desc="held-out loss",
        unit="batch",
        disable=None if share[0] == 0 else True,
        leave=False,
    )
    for name, data in domains.items():
        losses = np.zeros(len(data["labels"]))
        for i in range(rounds[name]):
            if share[1] == world_size():  # all ranks are here
                end_if_asked()
            bar.update()
            start = (i * share[1] + share[0]) * batch_size
            mine = start < len(losses)
            start = start if mine else 0
            rows = slice(start, start + batch_size)
            columns = (data[k][rows].long().numpy() for k in ("input_ids", "labels", "segments"))
            batch = collate(list(zip(*columns, strict=True)))
            numbers = torch.arange(start, start + len(batch["labels"]))
            batch["sequence"] = numbers[:, None].expand_as(batch["labels"])
            batch = {k: v.to(device) for k, v in batch.items()}
            inputs, tokens = arrange(batch, separation, model)
            targets = targets_of(tokens["labels"], manifest["objective"])
            head.select(targets >= 0)
            recorded = (
                recorder.recording(tokens.get("real"), tokens.get("decoder_real"))
                if recorder and mine
                else nullcontext()
            )
            with recorded:
                logits = forward(**inputs).logits
            if not mine:
                continue
            loss = F.cross_entropy(logits.float(), targets[targets >= 0], reduction="none")
            sequence = tokens["sequence"][targets >= 0].cpu().numpy()
            np.add.at(losses, sequence, loss.double().cpu().numpy())
        arrays[f"loss/{name}"] = losses
        if recorder:
            arrays[f"magnitude/{name}"] = recorder.reduce().double().cpu().numpy()
    bar.close()
    head.close()
    if recorder:
        recorder.close()
        layers = [t.layers for t in linears]
        arrays["rows"] = np.repeat([t.rows // t.layers for t in linears], layers)
        arrays["components"] = np.repeat([t.component for t in linears], layers)
    return arrays


def merge_shares(
    parts: list[Path], heldout: Path, output: Path, threshold: float, info: dict[str, Any]
) -> None:
    """Add up what `evaluate_share` wrote, and write the result."""
    shares = [dict(np.load(p)) for p in parts]
    summed = {
        k: sum(s[k] for s in shares) if k.startswith(("loss/", "magnitude/")) else v
        for k, v in shares[0].items()
    }
    _write_result(summed, heldout, output, threshold, info)
    for part in parts:
        part.unlink()


def _write_result(
    summed: Arrays, heldout: Path, output: Path, threshold: float, info: dict[str, Any]
) -> None:
    """Write `eval.json` atomically: per domain the mean loss (nats per predicted token), its
    standard error over sequences (null for one), and the kept rows that domains share.

    Beside it `sequences.npz`, for differences between runs on the same text: per domain the summed
    loss `loss/<domain>` (float64) and the number of predicted tokens `tokens/<domain>` (int64) of
    each sequence.
    """
    manifest, domains = load_heldout(heldout)
    result: dict[str, Any] = {**info, "domains": {}}
    sequences: dict[str, Any] = {}
    for name, data in domains.items():
        tokens = _predicted(data["labels"].numpy(), manifest["objective"])
        losses = summed[f"loss/{name}"]
        sequences |= {f"loss/{name}": losses, f"tokens/{name}": tokens.astype(np.int64)}
        mean = losses.sum() / tokens.sum()
        # A ratio of sums over sequences: the linearised standard error.
        residuals = losses - mean * tokens
        n = len(losses)
        stderr = np.sqrt((residuals**2).sum() * n / (n - 1)) / tokens.sum() if n > 1 else None
        result["domains"][name] = {
            "loss": float(mean),
            "stderr": None if stderr is None else float(stderr),
            "tokens": int(tokens.sum()),
            "sequences": n,
            "unigram_loss": manifest["unigram_loss"][name],
        }
    if "rows" in summed:
        result["overlap"] = _overlap(
            {n: summed[f"magnitude/{n}"] for n in domains},
            summed["rows"].tolist(),
            summed["components"].tolist(),
            threshold,
        )
    write_arrays(output.with_name("sequences.npz"), sequences)
    write_json(output, result)


def _predicted(labels: np.ndarray, objective: str) -> np.ndarray:
    """Number of predicted tokens of each sequence."""
    return (targets_of(torch.from_numpy(labels), objective) >= 0).sum(dim=1).numpy()


def _overlap(
    magnitudes: dict[str, np.ndarray], rows: list[int], components: list[str], threshold: float
) -> dict[str, Any]:
    """Of the rows that MIGU would keep for domain i, the fraction it keeps for j too (Figure 5),
    averaged over the layers of each component: of experts over those that i has sent a token to."""
    keep = {}
    for name, m in magnitudes.items():
        scores = torch.from_numpy(m)
        found = select_rows(scores, rows, threshold).split(rows)
        keep[name] = [k & s.any() for k, s in zip(found, scores.split(rows), strict=True)]
    kinds: dict[str, list] = {}
    for kind in dict.fromkeys(components):
        layers = [i for i, c in enumerate(components) if c == kind]
        kinds[kind] = [
            [
                float(
                    np.mean(
                        [
                            float((keep[a][i] & keep[b][i]).sum() / keep[a][i].sum())
                            for i in layers
                            if keep[a][i].any()
                        ]
                    )
                )
                for b in magnitudes
            ]
            for a in magnitudes
        ]
    return {"domains": list(magnitudes), "threshold": threshold, "kinds": kinds}
