"""The evaluated points of a run: stage 0, points within a stage, and the ends of the stages.

A point within a stage (`stages/01_code/step-000120/`) holds the same files as the end of a stage.
Any file may be missing: not asked for, not yet there, or failed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.analysis.files import (
    Damaged,
    Findings,
    finite,
    named,
    read_arrays,
    read_json,
    read_rows,
)
from eval.analysis.matrix import Matrix, complete
from eval.analysis.text import amount

LOSS = ("loss", "stderr")
NOISE = 2.0  # standard errors; a smaller difference is called noise
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
    sequences: dict[str, np.ndarray] | None  # losses and tokens of each sequence, by domain
    humaneval: dict  # humaneval.json
    benchmarks: dict  # benchmarks.json
    tasks: dict = field(default_factory=dict)  # tasks.json
    documents: dict[str, np.ndarray] = field(default_factory=dict)  # benchmarks.npz
    completions: list[dict] = field(default_factory=list)  # of HumanEval, the greedy ones
    damage: list[str] = field(default_factory=list)  # why no verdict rests on its tasks

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
    def task_scores(self) -> dict[str, Score]:
        """The exact matches of each task of the recipe, a share."""
        return _scores(self.tasks.get("tasks"))

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
        return bool(self.greedy or self.sampled or self.scores or self.skipped or self.task_scores)

    @property
    def skipped(self) -> dict[str, str]:
        """Benchmarks that were left out, with the reason."""
        return self.benchmarks.get("skipped") or {}

    def per_document(self) -> dict[str, np.ndarray]:
        """The result on each document of each benchmark, and of each problem of `humaneval`."""
        passed = {row["task_id"]: row["passed"] for row in self.completions}
        problems = np.array([passed[key] for key in sorted(passed)], dtype=float)
        return self.documents | ({"humaneval": problems} if passed else {})


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
    folder: Path,
    stages: Sequence[dict],
    matrix: Matrix,
    stderr: list[Row],
    shares: Mapping[int, float],
    findings: Findings,
) -> list[Point]:
    """All points of a run at which anything was measured, in their order.

    `stages` are those of the recipe; the losses at the ends of the stages are those of `matrix`.
    `shares` says of stages that ended early how much of their length they took.
    """
    points = []
    for stage, name in enumerate(matrix.stages):
        given = stages[stage - 1] if stage else {}
        unit = stage_unit(given)
        length = finite(given.get(unit))
        # Not by the name: a long one is shortened in its folder's.
        found = sorted((folder / "stages").glob(f"{stage:02d}_*"))
        home = found[0] if found else folder / "stages" / f"{stage:02d}_"
        within = [path for path in home.glob("step-*") if path.name[5:].isdigit()]
        for here in sorted(within, key=lambda path: int(path.name[5:])):
            step, record, results = int(here.name[5:]), {}, {}
            try:
                record = read_json(here / "eval.json") or {}
                where = f"at step {step} of stage {stage} ({name})"
                results = losses_of(record, here / "eval.json", where, findings) if record else {}
            except Damaged as damaged:
                findings.damaged(str(damaged))
            row, errors = ([results.get(d, {}).get(k) for d in matrix.domains] for k in LOSS)
            if results and None in row:
                findings.damaged(f"{named(here / 'eval.json')} lacks the loss of a domain.")
            point = Point(stage, step, None, None, here, "", row, errors, None, {}, {})
            _read_tasks(point, findings)
            files = (record, point.humaneval, point.benchmarks, point.tasks)
            known = [finite(file.get("progress")) for file in files]
            progress = next((value for value in known if value is not None), None)
            point.share = progress / length if progress is not None and length else None
            point.progress, point.label = progress, _label(unit, progress, step)
            points.append(point)
        share = shares.get(stage, 1.0)
        progress = None if length is None else round(share * length, 6)
        label = f"end, {_label(unit, progress, None)}" if stage else "before training"
        row, errors = matrix.values[stage], stderr[stage]
        end = Point(stage, None, progress, share, home, label, row, errors, None, {}, {})
        _read_tasks(end, findings)
        points.append(end)
    _read_sequences(points, matrix.domains, findings)
    points = [p for p in points if p.has_tasks or any(value is not None for value in p.loss)]
    _tell_missing_tasks(points, findings)
    return points


def losses_of(
    record: dict, path: Path, where: str, findings: Findings
) -> dict[str, dict[str, float | None]]:
    """The "loss", "stderr" and "unigram_loss" of each domain of an eval.json; a loss that is no
    finite number is left out, and found. Raises Damaged where there are no domains."""
    domains = record.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise Damaged(f"{named(path)} holds no domains and is left out.")
    results = {}
    for domain, result in domains.items():
        if not isinstance(result, dict):
            raise Damaged(f"{named(path)} holds no loss of {domain} and is left out.")
        loss, stderr = result.get("loss"), result.get("stderr")
        if finite(loss) is None:
            diverged = isinstance(loss, float)
            why = (
                "not a finite number: the run diverged" if diverged else "no number: it is damaged"
            )
            findings.damaged(f"The loss on {domain} {where} is {loss!r}, {why}. It is left out.")
        if stderr is not None and finite(stderr) is None:
            findings.damaged(f"The standard error of {domain} {where} is {stderr!r}, no number.")
        results[domain] = {key: finite(result.get(key)) for key in (*LOSS, "unigram_loss")}
    return results


def _read_sequences(points: list[Point], domains: Sequence[str], findings: Findings) -> None:
    """The losses by sequence, where each point that has losses has them: else the noise of a
    comparison would be another one without a word."""
    measured = [point for point in points if any(value is not None for value in point.loss)]
    for point in measured:
        path = point.folder / "sequences.npz"
        try:
            arrays = read_arrays(path)
            if arrays is not None:
                losses = dict(zip(domains, point.loss, strict=True))
                point.sequences = _sequences(arrays, {d: x for d, x in losses.items() if x}, path)
        except Damaged as damaged:
            findings.damaged(str(damaged))
    lacking = [p for p in measured if not (p.folder / "sequences.npz").exists()]
    for point in lacking if len(lacking) < len(measured) else ():
        name = named(point.folder / "sequences.npz")
        findings.damaged(f"{name} is missing, although other evaluations of the run have it.")


def _sequences(
    arrays: dict[str, np.ndarray], losses: dict[str, float], path: Path
) -> dict[str, np.ndarray]:
    for domain, loss in losses.items():
        summed, tokens = arrays.get(f"loss/{domain}"), arrays.get(f"tokens/{domain}")
        if summed is None or tokens is None or summed.shape != tokens.shape or summed.ndim != 1:
            raise Damaged(f"{named(path)} does not hold the sequences of {domain}.")
        total = tokens.sum()
        if not total > 0 or not math.isclose(summed.sum() / total, loss, rel_tol=1e-3):
            raise Damaged(f"{named(path)} is not of the evaluation in eval.json ({domain}).")
    return arrays


def _read_tasks(point: Point, findings: Findings) -> None:
    """HumanEval and the benchmarks of a point; what is damaged is left out, and told."""

    def damaged(error: Damaged) -> None:
        findings.warnings.append(str(error))
        point.damage.append(str(error))

    folder = point.folder
    try:
        point.humaneval = read_json(folder / "humaneval.json") or {}
        if problem := _humaneval_problem(point.humaneval):
            point.humaneval = {}
            raise Damaged(f"{named(folder / 'humaneval.json')} is left out: {problem}.")
    except Damaged as error:
        damaged(error)
    try:
        point.benchmarks = read_json(folder / "benchmarks.json") or {}
        if problem := _benchmarks_problem(point.benchmarks):
            point.benchmarks = {}
            raise Damaged(f"{named(folder / 'benchmarks.json')} is left out: {problem}.")
    except Damaged as error:
        damaged(error)
    try:
        point.tasks = read_json(folder / "tasks.json") or {}
        if problem := _scores_problem(point.tasks, "tasks"):
            point.tasks = {}
            raise Damaged(f"{named(folder / 'tasks.json')} is left out: {problem}.")
    except Damaged as error:
        damaged(error)
    try:
        point.documents = read_arrays(folder / "benchmarks.npz") or {}
    except Damaged as error:
        damaged(error)
    try:
        path = folder / "humaneval_completions.jsonl.gz"
        rows = read_rows(path) or []
        needed = {"task_id", "sample", "completion", "passed"}
        if not all(needed <= row.keys() and isinstance(row["passed"], bool) for row in rows):
            raise Damaged(f"{named(path)} does not hold completions and is left out.")
        # The others are samples, numbered from 0.
        point.completions = [row for row in rows if row["sample"] is None]
    except Damaged as error:
        damaged(error)


def _humaneval_problem(record: dict) -> str:
    for key in ("greedy", "sampled", "sandbox"):
        if not isinstance(record.get(key) or {}, dict):
            return f"{key} holds no keys"
    greedy = record.get("greedy") or {}
    if record and finite(greedy.get("pass@1")) is None:
        return "its pass@1 is no number"
    return ""


def _benchmarks_problem(record: dict) -> str:
    if not isinstance(record.get("skipped") or {}, dict):
        return "skipped holds no keys"
    return _scores_problem(record, "benchmarks")


def _scores_problem(record: dict, key: str) -> str:
    entries = record.get(key)
    if record and not isinstance(entries, dict):
        return f"it holds no {key}"
    for name, entry in (entries or {}).items():
        if not isinstance(entry, dict) or finite(entry.get("value")) is None:
            return f"the value of {name} is no number"
    return ""


def _tell_missing_tasks(points: list[Point], findings: Findings) -> None:
    """Results that other points of the run have."""
    for file in ("humaneval.json", "tasks.json", "benchmarks.json", "benchmarks.npz"):
        paths = [point.folder / file for point in points]
        if any(path.exists() for path in paths):
            lacking = [named(path) for path in paths if not path.exists()]
            findings.warnings += [f"{name} is missing, or not yet there." for name in lacking]


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
