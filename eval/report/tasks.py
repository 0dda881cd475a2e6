"""HumanEval and the benchmarks: the table of a run's points, how they were measured, and what
differs between runs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.analysis.load import Run
from eval.analysis.matrix import complete
from eval.analysis.noise import NOISE
from eval.analysis.points import Point, Score
from eval.analysis.text import number, percent, printable
from eval.report.cells import Cell

SHOWN = 3  # completions that passed, and as many that failed
LINES = 12  # of each


def benchmark_names(runs: Iterable[Run]) -> list[str]:
    """The benchmarks that were measured at any point of any of the runs, in their order."""
    return list(dict.fromkeys(n for run in runs for p in run.points for n in p.scores))


def average(point: Point, names: Sequence[str]) -> Score | None:
    """The mean over the benchmarks `names`; None where one of them is missing, as the mean over
    the others does not compare."""
    return point.average if names and set(point.scores) == set(names) else None


@dataclass
class Table:
    """Something measured at every point, with standard errors."""

    title: str
    columns: list[tuple[str, str]]  # name, note
    rows: list[tuple[str, str, list[Cell]]]  # stage, label of the point, a cell per column


def tables(run: Run) -> list[Table]:
    """What was measured at each point: tasks, then held-out losses."""
    points, names = run.points, benchmark_names([run])
    columns: list[tuple[str, str, list[Cell]]] = []
    if any(point.humaneval for point in points):
        note = humaneval_note([run])
        columns.append(("HumanEval", f"greedy pass@1, {note}", [_cell(p.greedy) for p in points]))
        for kind in dict.fromkeys(kind for point in points for kind in point.sampled):
            cells = [_cell(point.sampled.get(kind)) for point in points]
            columns.append(("HumanEval", f"sampled {kind}, {note}", cells))
    for name in dict.fromkeys(name for point in points for name in point.task_scores):
        cells = [_cell(point.task_scores.get(name)) for point in points]
        columns.append((name, "exact match", cells))
    for name in dict.fromkeys([*names, *(n for p in points for n in p.skipped)]):
        cells = [
            Cell("skipped") if name in p.skipped else _cell(p.scores.get(name)) for p in points
        ]
        columns.append((name, benchmark_note([run], name), cells))
    if names:
        cells = [_cell(point.average) for point in points]
        for cell, point in zip(cells, points, strict=True):
            if point.average and average(point, names) is None:
                cell.note += f", of {len(point.scores)} only"
        columns.append(("Benchmarks", f"average of {len(names)}", cells))
    losses = []
    for place, domain in enumerate(run.matrix.domains):
        note = "trained" if domain in run.matrix.trained else "replayed"
        if domain in run.untrained:
            note = "never trained"
        losses.append((domain, note, [_loss_cell(p.loss[place], p.stderr[place]) for p in points]))
    titled = (("Tasks at every point, in %", columns), ("Held-out loss at every point", losses))
    return [_table(run, title, columns) for title, columns in titled if columns]


def _table(run: Run, title: str, columns: Sequence[tuple[str, str, list[Cell]]]) -> Table:
    rows = [
        (f"{p.stage} {run.matrix.stages[p.stage]}", p.label, [cells[i] for _, _, cells in columns])
        for i, p in enumerate(run.points)
    ]
    return Table(title, [(name, note) for name, note, _ in columns], rows)


def humaneval_note(runs: Iterable[Run]) -> str:
    """first 20 problems."""
    records = [point.humaneval for run in runs for point in run.points if point.humaneval]
    return _agreed(_extent(record, "problems") for record in records)


def benchmark_note(runs: Iterable[Run], name: str) -> str:
    """acc_norm, first 100 documents."""
    entries = [
        p.benchmarks["benchmarks"][name] for run in runs for p in run.points if name in p.scores
    ]
    return _agreed(f"{entry.get('metric')}, {_extent(entry, 'documents')}" for entry in entries)


def how_measured(*runs: Run) -> list[tuple[str, str]]:
    """(task, how it was measured), one entry for each way if the points do not agree."""
    found: dict[tuple[str, str], None] = {}
    for point in (point for run in runs for point in run.points):
        if point.humaneval:
            found["HumanEval", _about_humaneval(point.humaneval)] = None
        for name in point.scores:
            found[name, _about_benchmark(point.benchmarks, name)] = None
    order = {name: place for place, (name, _) in enumerate(found)}
    return sorted(found, key=lambda entry: order[entry[0]])


def warnings(run: Run) -> list[str]:
    """Benchmarks that were skipped, programs that ran unprotected, points measured differently."""
    skipped: dict[tuple[str, str], list[str]] = {}
    for point in run.points:
        for name, reason in point.skipped.items():
            skipped.setdefault((name, str(reason)), []).append(title(run, point))
    found = [
        f"{name} was skipped at {_some(where)}: {reason}"
        for (name, reason), where in skipped.items()
    ]
    if any((p.humaneval.get("sandbox") or {}).get("level") == "unsafe" for p in run.points):
        found.append("HumanEval's programs ran without a sandbox (level “unsafe”).")
    ways = [name for name, _ in how_measured(run)]
    found += [
        f"{name} was not measured alike at all points (see “How the tasks were measured”)."
        for name in dict.fromkeys(ways)
        if ways.count(name) > 1
    ]
    return found


def title(run: Run, point: Point) -> str:
    """stage 1 code (epoch 4)."""
    label = f" ({point.label})" if point.stage and point.label else ""
    return f"stage {point.stage} {run.matrix.stages[point.stage]}{label}"


@dataclass
class Completion:
    """A saved completion, its first lines."""

    task: str
    passed: bool
    reason: str
    text: str


def completions(run: Run) -> tuple[str, list[Completion]]:
    """Some greedy completions of the last point that saved them, failed ones first; before them,
    in a sentence, which they are of."""
    for point in reversed(run.points):
        if rows := point.completions:
            failed = [row for row in rows if not row["passed"]]
            passed = [row for row in rows if row["passed"]]
            told = f"{len(passed)} of {len(rows)} greedy completions passed at {title(run, point)}."
            if "cut_off" in point.humaneval:
                cut = point.humaneval["cut_off"]
                told += f" Of all completions, {cut} were cut off at the longest length allowed."
            shown = [*failed[:SHOWN], *passed[:SHOWN]]
            return told, [_completion(row) for row in shown]
    return "", []


@dataclass
class TaskDifference:
    """The accuracy of one setting minus that of another, at their ends."""

    value: float
    stderr: float | None  # of the documents, not of the seeds; None: not known
    paired: bool  # on the documents that both were measured on
    reason: str = ""  # why it is not paired

    @property
    def beyond_noise(self) -> bool:
        return self.stderr is not None and abs(self.value) > NOISE * self.stderr


def differences(
    first: Sequence[Point], second: Sequence[Point], names: Sequence[str]
) -> dict[str, TaskDifference]:
    """By task ("humaneval", benchmarks, "average"): the second setting minus the first, each given
    by the last points of its runs. Tasks that a run did not measure are left out.

    Where all runs were measured on the same documents in the same way, the standard error is that
    of the mean difference over the documents (of a setting's runs, the mean first), so that what
    makes a document hard for both cancels.
    """
    results = [[point.per_document() for point in side] for side in (first, second)]
    found: dict[str, TaskDifference] = {}
    for task in ("humaneval", *names):
        scores = [[_score(point, task) for point in side] for side in (first, second)]
        known = [[score for score in side if score] for side in scores]
        if known != scores:
            continue
        means = [float(np.mean([score.value for score in side])) for side in known]
        value = means[1] - means[0]
        documents = [[arrays.get(task) for arrays in side] for side in results]
        if len({_way(point, task) for point in (*first, *second)}) > 1:
            found[task] = TaskDifference(value, None, False, "not measured alike")
        elif (error := _paired_error(documents, means)) is not None:
            found[task] = TaskDifference(value, error, True)
        else:
            # Repetitions share the documents: their errors do not average out, one stands for all.
            independent = _hypot([score.stderr for side in known for score in side[:1]])
            reason = "results by document are missing"
            found[task] = TaskDifference(value, independent, False, reason)
    if names and all(name in found for name in names):
        parts = [found[name] for name in names]
        error = _hypot([part.stderr for part in parts])
        found["average"] = TaskDifference(
            sum(part.value for part in parts) / len(parts),
            None if error is None else error / len(parts),
            all(part.paired for part in parts),
        )
    return found


def _hypot(errors: Sequence[float | None]) -> float | None:
    known = complete(errors)
    return None if known is None else math.hypot(*known)


def _paired_error(
    documents: Sequence[Sequence[np.ndarray | None]], means: Sequence[float]
) -> float | None:
    """Standard error of the mean difference over the documents; None where they do not pair."""
    lengths = {0 if array is None else len(array) for side in documents for array in side}
    if len(lengths) != 1 or lengths.pop() < 2:
        return None
    first, second = (np.mean(np.array(side), axis=0) for side in documents)
    if not np.allclose([first.mean(), second.mean()], means, atol=1e-4):
        return None  # left by another evaluation
    difference = second - first
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _score(point: Point, task: str) -> Score | None:
    return point.greedy if task == "humaneval" else point.scores.get(task)


def _way(point: Point, task: str) -> str:
    if task == "humaneval":
        return _about_humaneval(point.humaneval, sandbox=False)
    return _about_benchmark(point.benchmarks, task)


def _about_humaneval(record: dict, sandbox: bool = True) -> str:
    level = record.get("sandbox") or {}
    sampled = record.get("sampled") or {}
    parts = [
        _extent(record, "problems"),
        f"template {record.get('template')}" if "template" in record else "",
        f"at most {record['max_new_tokens']} new tokens" if "max_new_tokens" in record else "",
        f"{sampled.get('samples')} samples a problem at temperature {sampled.get('temperature')}, "
        f"top_p {sampled.get('top_p')}"
        if sampled
        else "greedy only",
        f"sandbox: {level.get('level')} ({level.get('description')})" if sandbox and level else "",
    ]
    return "; ".join(part for part in parts if part)


def _about_benchmark(record: dict, name: str) -> str:
    entry = record["benchmarks"][name]
    shots = entry.get("shots")
    parts = [
        f"task {entry.get('task', name)}" + (f" {entry['version']}" if "version" in entry else ""),
        str(entry.get("metric")),
        f"{shots} shot" + ("" if shots == 1 else "s"),
        _extent(entry, "documents"),
        str(entry.get("source")),
        f"lm-eval {record.get('lm_eval')}",
    ]
    return "; ".join(parts)


def _extent(entry: dict, what: str) -> str:
    """first 100 documents, where a limit was set; all 1,267 documents."""
    count = entry.get(what)
    count = f"{count:,}" if isinstance(count, int) else "?"
    return f"first {count} {what}" if entry.get("limit") else f"all {count} {what}"


def _agreed(texts: Iterable[str]) -> str:
    known = list(dict.fromkeys(texts))
    return known[0] if len(known) == 1 else "differs" if known else ""


def _cell(score: Score | None) -> Cell:
    if score is None:
        return Cell("\N{EM DASH}")
    return Cell(
        percent(score.value), note="" if score.stderr is None else f"± {percent(score.stderr)}"
    )


def _loss_cell(value: float | None, stderr: float | None) -> Cell:
    return Cell(
        number(value), note="" if stderr is None or value is None else f"± {number(stderr)}"
    )


def _completion(row: dict) -> Completion:
    lines = str(row["completion"]).split("\n")
    text = "\n".join(lines[:LINES]) + ("\n…" if len(lines) > LINES else "")
    reason = printable(str(row.get("reason") or ""))
    return Completion(str(row["task_id"]), bool(row["passed"]), reason, printable(text[:2000]))


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} points, the first {names[0]}"
