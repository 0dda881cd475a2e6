"""The evaluated points of a run: stage 0, points within a stage, and the ends of the stages.

A point within a stage (`stages/01_code/step-000120/`) holds the same files as the end of a stage.
Any file may be missing: not asked for, not yet there, or failed.
"""

import gzip
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.analysis.matrix import Matrix, complete
from eval.analysis.text import amount

FILES = ("eval.json", "humaneval.json", "benchmarks.json")
LOSS = ("loss", "stderr")
UNITS = ("epochs", "steps", "tokens")  # of a stage's length; runs that mix them: "stages"
Row = list[float | None]
"""A value per domain, in the order of the matrix; None where it is not known."""


@dataclass
class Score:
    """A number with its standard error (None: not known)."""

    value: float
    stderr: float | None = None


@dataclass
class Point:
    """One evaluation. Whatever was not measured, or not yet, is None or empty."""

    stage: int
    step: int | None  # optimizer step within the stage; None for the end of a stage, and stage 0
    progress: float | None  # within the stage, in the stage's own unit
    share: float | None  # of the stage that was trained, 0 to 1
    folder: Path
    label: str  # epoch 4
    loss: Row  # held-out, nats per predicted token
    stderr: Row
    humaneval: dict  # humaneval.json
    benchmarks: dict  # benchmarks.json

    @property
    def greedy(self) -> Score | None:
        """HumanEval pass@1 of the greedy completions."""
        greedy = self.humaneval.get("greedy") or {}
        return _score(greedy.get("pass@1"), greedy.get("stderr"))

    @property
    def sampled(self) -> dict[str, Score]:
        """HumanEval pass@k of the sampled completions, by `pass@k`."""
        return _scores(self.humaneval.get("sampled"))

    @property
    def scores(self) -> dict[str, Score]:
        """The value of each benchmark that was measured."""
        return _scores(self.benchmarks.get("benchmarks"))

    @property
    def average(self) -> Score | None:
        """The mean over the benchmarks that were measured, taken as independent; as that of
        benchmarks.json, which is left out there where a benchmark was skipped."""
        scores = list(self.scores.values())
        if not scores:
            return None
        errors = complete([score.stderr for score in scores])
        value = sum(score.value for score in scores) / len(scores)
        return Score(value, math.hypot(*errors) / len(errors) if errors else None)

    @property
    def has_tasks(self) -> bool:
        return bool(self.greedy or self.sampled or self.scores or self.skipped)

    @property
    def skipped(self) -> dict[str, str]:
        """Benchmarks that were left out, with the reason."""
        return self.benchmarks.get("skipped") or {}

    def per_document(self) -> dict[str, np.ndarray]:
        """The result on each document of each benchmark, and of each problem of `humaneval`."""
        found: dict[str, np.ndarray] = {}
        try:
            with np.load(self.folder / "benchmarks.npz") as arrays:
                found |= {name: arrays[name].astype(float) for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            pass  # differences are then not paired, which the page says
        passed = {row["task_id"]: row["passed"] for row in self.completions()}
        if passed:
            found["humaneval"] = np.array([passed[key] for key in sorted(passed)], dtype=float)
        return found

    def completions(self) -> list[dict]:
        """The greedy completions of HumanEval; none where the file is missing or damaged."""
        try:
            with gzip.open(self.folder / "humaneval_completions.jsonl.gz", "rt") as file:
                rows = [json.loads(line) for line in file]
        except (OSError, EOFError, ValueError):
            return []
        needed = {"task_id", "sample", "completion", "passed"}
        known = [row for row in rows if isinstance(row, dict) and needed <= row.keys()]
        return [row for row in known if row["sample"] is None]  # others are numbered from 0


def stage_lengths(stages: Sequence[dict]) -> tuple[str, list[float]]:
    """The unit in which all stages of a recipe are given, and the length of each in it;
    ("stages", ones) where they differ."""
    units = {stage_unit(stage) for stage in stages}
    unit = units.pop() if len(units) == 1 else "stages"
    if unit == "stages":
        return unit, [1.0] * len(stages)
    return unit, [float(stage[unit]) for stage in stages]


def stage_unit(stage: dict) -> str:
    """The unit of a stage's length; "stages" where the recipe gives none."""
    return next((unit for unit in UNITS if finite(stage.get(unit))), "stages")


def position(point: Point, lengths: Sequence[float]) -> float | None:
    """Where a point lies over all stages, from the length of each; None if not known."""
    if point.stage == 0:
        return 0.0
    if point.share is None:
        return None
    return sum(lengths[: point.stage - 1]) + point.share * lengths[point.stage - 1]


def load_points(
    folder: Path, stages: Sequence[dict], matrix: Matrix, stderr: list[Row], warnings: list[str]
) -> list[Point]:
    """All points of a run at which anything was measured, in their order.

    `stages` are those of the recipe; the losses at the ends of the stages are those of `matrix`.
    """
    points = []
    for stage, name in enumerate(matrix.stages):
        given = stages[stage - 1] if stage else {}
        unit = stage_unit(given)
        length = finite(given.get(unit))
        home = folder / "stages" / f"{stage:02d}_{name}"
        home = next(iter(sorted(home.parent.glob(f"{stage:02d}_*"))), home)
        within = [path for path in home.glob("step-*") if path.name[5:].isdigit()]
        for here in sorted(within, key=lambda path: int(path.name[5:])):
            step = int(here.name[5:])
            losses, humaneval, benchmarks = (read_json(here / f, warnings) or {} for f in FILES)
            known = [finite(file.get("progress")) for file in (losses, humaneval, benchmarks)]
            progress = next((value for value in known if value is not None), None)
            results = losses_of(losses, f"at step {step} of stage {stage} ({name})", warnings)
            row, errors = ([results.get(d, {}).get(k) for d in matrix.domains] for k in LOSS)
            share = progress / length if progress is not None and length else None
            label = _label(unit, progress, step)
            points.append(
                Point(stage, step, progress, share, here, label, row, errors, humaneval, benchmarks)
            )
        tasks = (read_json(home / file, warnings) or {} for file in FILES[1:])
        label = f"end, {_label(unit, length, None)}" if stage else "before training"
        row, errors = matrix.values[stage], stderr[stage]
        points.append(Point(stage, None, length, 1.0, home, label, row, errors, *tasks))
    return [p for p in points if p.has_tasks or any(value is not None for value in p.loss)]


def losses_of(record: dict, where: str, warnings: list[str]) -> dict[str, dict[str, float | None]]:
    """The "loss" and "stderr" of each domain of an eval.json; a loss that is no finite number is
    left out with a warning."""
    domains = record.get("domains")
    if not isinstance(domains, dict):
        return {}
    for domain, result in domains.items():
        if "loss" in result and finite(result["loss"]) is None:
            warnings.append(
                f"The loss on {domain} {where} is {result['loss']}, not a finite number: the run "
                "diverged. It is left out."
            )
    return {d: {key: finite(r.get(key)) for key in LOSS} for d, r in domains.items()}


def read_json(path: Path, warnings: list[str]) -> dict | None:
    """A JSON object, or None with a warning if the file is there and cannot be read."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        where = f"{path.parent.name}/{path.name}"
        warnings.append(f"{where} cannot be read and is left out: {error}")
        return None
    return content if isinstance(content, dict) else None


def finite(value: object) -> float | None:
    """The value as a finite float, None for whatever else JSON may hold."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _score(value: object, stderr: object) -> Score | None:
    known = finite(value)
    return None if known is None else Score(known, finite(stderr))


def _scores(entries: object) -> dict[str, Score]:
    """The entries of a mapping that hold a "value"."""
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and (score := _score(entry.get("value"), entry.get("stderr"))):
            found[name] = score
    return found


def _label(unit: str, progress: float | None, step: int | None) -> str:
    """epoch 4, step 120, 64M tokens; the step where the progress is not known."""
    if progress is None or unit == "stages":
        return "" if step is None else f"step {step:,}"
    return f"{amount(progress)} tokens" if unit == "tokens" else f"{unit[:-1]} {amount(progress)}"
