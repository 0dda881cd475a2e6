"""Repair a published checkpoint without training, and measure on held-out text what that gives.

`pipeline/methods/repair.py` has the arithmetic; here is what it is applied to: where the base and
the held-out text of a run's checkpoint lie, the losses of a grid of shares, and the table of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from eval.analysis.load import Run, load_run
from eval.analysis.text import number, signed
from eval.measure.lm import check_tokens, losses_of
from pipeline.checkpoint import is_published, publish, verify
from pipeline.data.heldout import load_heldout
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.methods.repair import Edit, Weights, interpolate, write_repaired
from pipeline.model.gguf import local_weights
from pipeline.model.load import load_for_evaluation
from pipeline.model.weights import load_pretrained

Losses = dict[str, float]  # by domain, nats per predicted token


@dataclass
class Task:
    """A checkpoint, what it is moved toward, and on what that is measured."""

    checkpoint: Path
    base: str  # folder or hub id
    revision: str | None
    heldout: Path | None
    trained: list[str] | None  # domains between the base and the checkpoint; None: not known
    attention: str = "sdpa"  # that of the run; not every model has each


@dataclass
class Trade:
    """A repaired model. Nats per token, by domain and as means; None: there is no such domain.

    learned: mean fall of the loss since the base over the trained domains (where no recipe says
        which those are: those on which the checkpoint is better than the base).
    forgotten: mean rise since the base over the other domains.
    """

    what: str
    losses: Losses
    learned: float | None
    forgotten: float | None

    @property
    def gain(self) -> float | None:
        """Learned minus forgotten: what the best trade-off has most of."""
        if self.learned is None or self.forgotten is None:
            return None
        return self.learned - self.forgotten


def find(checkpoint: Path, toward: str | None, heldout: Path | None) -> Task:
    """What a checkpoint in a run's folder says of itself, with what is given over it.

    Args:
        checkpoint: a published folder, or a run's, of which the last stage is taken.
        toward: folder or hub id; default: what the run started from.
        heldout: a run's folder or its `heldout`; default: of the checkpoint's run.

    Raises:
        UserError: it cannot be told what to move toward; something is not there or damaged.
    """
    if (checkpoint / "recipe.yaml").is_file():
        stages = sorted(checkpoint.glob("stages/[0-9]*/checkpoint"))
        if not stages or stages[-1].parent.name.startswith("00_"):
            raise UserError(f"{checkpoint}: no stage of this run is published yet")
        checkpoint = stages[-1]
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: no such folder; give the folder of a checkpoint or of a run"
        )
    run = next((p for p in checkpoint.resolve().parents if (p / "recipe.yaml").is_file()), None)
    trained, base, revision, attention = None, toward, None, "sdpa"
    if run is not None:
        known = load_run(run)
        model = known.recipe.get("model") or {}
        attention = model.get("attention") or attention
        if base is None:
            own = run / "stages/00_base/checkpoint"
            base, revision = (
                (str(own), None) if own.is_dir() else (model["path"], model["revision"])
            )
        ended, begun = _stage_of(checkpoint, run), 0 if toward is None else _stage_of(base, run)
        if ended is not None and begun is not None:
            trained = _trained(known, begun, ended)
        heldout = heldout or run / "heldout"
    if base is None:
        raise UserError(
            f"{checkpoint} lies in no run's folder, so it does not say what it was trained from; "
            "name that model with --toward"
        )
    if heldout is not None and not is_published(heldout) and is_published(heldout / "heldout"):
        heldout = heldout / "heldout"
    if heldout is not None and not is_published(heldout):
        raise UserError(f"--heldout {heldout}: no held-out text there; give a run's folder")
    for folder in (checkpoint, Path(base)):
        if is_published(folder):
            verify(folder)
    return Task(checkpoint, base, revision, heldout, trained, attention)


def _trained(run: Run, begun: int, ended: int) -> list[str] | None:
    """The domains between two stages, also those that were trained on before; None where it is not
    known from which stage another one started."""
    start_from = run.recipe.get("start_from", "previous")
    if start_from == "nearest" or (start_from == "base" and begun > 0):
        return None
    stages = range(begun + 1 if start_from == "previous" else ended, ended + 1)
    return [d for d in run.matrix.trained if any(run.matrix.trains(t, d) for t in stages)]


def _stage_of(checkpoint: str | Path, run: Path) -> int | None:
    """0 for what the run built; None where a checkpoint is not the run's."""
    stages, folder = run / "stages", Path(checkpoint).resolve()
    return int(folder.relative_to(stages).parts[0][:2]) if stages in folder.parents else None


def base_in_files(task: Task, temporary: Path) -> Path:
    """A folder in which the base's weights have the names of the checkpoint's: as it was published,
    or what transformers makes in `temporary` of any other model when it is loaded and saved."""
    if is_published(Path(task.base)):
        return Path(task.base)
    config = json.loads((task.checkpoint / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if kind is None:
        raise UserError(f"{task.checkpoint}: its config.json names no architecture of transformers")
    source = local_weights(task.base)
    net: Any = load_pretrained(kind, source, dtype=torch.float32, revision=task.revision)
    net.save_pretrained(temporary)
    return temporary


def measure_shares(
    task: Task, base: Path, shares: Sequence[float], batch_size: int
) -> dict[str, Losses]:
    """The losses at shares of the base: "0" (the checkpoint), `shares` and "1" (the base).

    Memory: three times the weights, in fp32.
    """
    assert task.heldout is not None
    Weights(task.checkpoint)  # refuses an adapter
    check_tokens(task.heldout, str(task.checkpoint), lambda: load_tokenizer(str(task.checkpoint)))
    model, start = _loaded(task, task.checkpoint), _loaded(task, base)
    before = dict(start.named_parameters())
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrong = [n for n, p in after.items() if n not in before or before[n].shape != p.shape]
    if wrong:
        raise UserError(
            f"{base}: {wrong[0]} is not as in {task.checkpoint}: not the model it was trained from"
        )
    found = {}
    for share in sorted({0.0, *shares, 1.0}):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(interpolate(before[name], after[name], share))
        found[f"{share:g}"] = losses_of(model, task.heldout, batch_size)
    return found


def measure_folder(task: Task, folder: Path, batch_size: int) -> Losses:
    """The losses of a checkpoint on the held-out text of the task."""
    assert task.heldout is not None
    return losses_of(_loaded(task, folder), task.heldout, batch_size)


def write(task: Task, base: Path, edit: Edit, what: str, out: Path) -> None:
    """Publish the checkpoint after the edit; its manifest says what was done to it."""
    done = {"checkpoint": str(task.checkpoint), "toward": task.base, "repair": what}
    publish(out, partial(write_repaired, task.checkpoint, base, edit), {"repaired": done})


MEANING = (
    "learned: mean fall of the loss since the base on the trained domains; forgotten: mean rise on "
    "the others"
)


def trade_offs(losses: dict[str, Losses], trained: list[str] | None) -> list[Trade]:
    """Learned and forgotten of each model, against the base (share 1)."""
    if not losses:
        return []
    tuned, base = losses["0"], losses["1"]
    new = [d for d in base if d in trained] if trained is not None else None
    if new is None:
        new = [d for d in base if tuned[d] < base[d]]
    old = [d for d in base if d not in new]
    return [
        Trade(
            what,
            found,
            _mean([base[d] - found[d] for d in new]),
            _mean([found[d] - base[d] for d in old]),
        )
        for what, found in losses.items()
    ]


def best_of(trades: list[Trade]) -> Trade | None:
    """The one that has most learned minus forgotten; None where that is not known."""
    known = [t for t in trades if t.gain is not None]
    return max(known, key=lambda t: t.gain or 0.0, default=None)


def table(trades: list[Trade]) -> str:
    """The trade-offs as an aligned table for the terminal."""
    best = best_of(trades)
    lines = [["base's share", "learned", "forgotten", *trades[0].losses, ""]]
    ends = {"0": "0 (the checkpoint)", "1": "1 (the base)"}
    for trade in trades:
        mark = "<- best trade-off" if trade is best else ""
        numbers = [number(loss) for loss in trade.losses.values()]
        name = ends.get(trade.what, trade.what)
        lines.append([name, signed(trade.learned), signed(trade.forgotten), *numbers, mark])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{text:>{w}}" for text, w in zip(line[1:-1], widths[1:-1], strict=True))
        + f"  {line[-1]}"
        for line in lines
    ]
    return "\n".join([*(row.rstrip() for row in rows), MEANING])


def _loaded(task: Task, folder: Path) -> Any:
    assert task.heldout is not None
    objective = load_heldout(task.heldout)[0]["objective"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_for_evaluation(folder, objective, task.attention, device=device)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
