"""The end of a run, as a few lines for the terminal."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from eval.analysis.accuracy import DEFINITIONS as ACCURACY_DEFINITIONS
from eval.analysis.accuracy import accuracy_matrix, estimates
from eval.analysis.end_tasks import read_end_tasks, table
from eval.analysis.load import Run, load_run
from eval.analysis.matrix import Matrix, learning_curve
from eval.analysis.points import Point, Score
from eval.analysis.text import percent
from eval.report import tasks as benchmarks
from eval.report.end_tasks import COLUMNS
from pipeline.progress import say


def print_summary(page: Path) -> None:
    """Held-out loss, accuracies and end tasks after every stage, what was learned and forgotten,
    HumanEval and benchmarks at every point, where the page is."""
    run = load_run(page.parent.parent)
    title = "held-out loss (nats per predicted token) after each stage"
    for line in matrix_lines(title, run.matrix, lambda loss: f"{loss:.3f}"):
        say(line)
    curve = learning_curve(run.matrix)
    if len(curve) > 1:
        learned, forgotten = curve[-1]
        say(f"learned {learned:.3f}, forgotten {forgotten:.3f} nats per token (mean over domains)")
    for warning in run.warnings:
        say(f"warning: {warning}")
    for line in [*accuracy_lines(run), *end_task_lines(run), *task_lines(run)]:
        say(line)
    say(f"report: {page}")


def matrix_lines(title: str, matrix: Matrix, text: Callable[[float], str]) -> list[str]:
    """Stage x domain (or task)."""
    width = max(12, *(len(s) + 4 for s in matrix.stages))
    lines = [f"\n{title}", " " * width + "".join(f"{d[:11]:>12}" for d in matrix.domains)]
    for stage, values in zip(matrix.stages, matrix.values, strict=True):
        cells = "".join(f"{'-' if v is None else text(v):>12}" for v in values)
        lines.append(f"  {stage:<{width - 2}}{cells}")
    return lines


def accuracy_lines(run: Run) -> list[str]:
    """The tasks' accuracies after every stage, and the metrics of the matrix; empty without."""
    matrix = accuracy_matrix(run)
    if matrix is None:
        return []
    found = []
    for key, estimate in estimates([matrix]).items():
        name = ACCURACY_DEFINITIONS[key].partition(":")[0]
        between = estimate.interval and " to ".join(percent(x) for x in estimate.interval)
        found.append(f"{name} {percent(estimate.value)}" + (f" ({between})" if between else ""))
    lines = matrix_lines("accuracy of the tasks after each stage, %", matrix, percent)
    return [*lines, ", ".join(found)]


def end_task_lines(run: Run) -> list[str]:
    """The end tasks' scores after every stage that was asked, means over their seeds, and the
    paper's numbers; empty without."""
    matrix, warnings = read_end_tasks(run)
    lines = [f"warning: {text}" for text in warnings]
    if matrix is None:
        return lines
    tasks = matrix.tasks
    rows: list[list[float | None]] = [
        [mean(seeds) if (seeds := matrix.at(stage, task, "score")) else None for task in tasks]
        for stage in matrix.values
    ]
    stages = [run.matrix.stages[stage] for stage in matrix.values]
    scores = Matrix(stages, tasks, {}, rows, lower_is_better=False)
    title = "end tasks after each stage: macro-F1 (of ChemProt micro-F1), %"
    shown = (f"{COLUMNS[key]} {percent(e.mean)}" for key, e in table([matrix]).items() if e)
    return [*lines, *matrix_lines(title, scores, percent), "; ".join(shown)]


def task_lines(run: Run) -> list[str]:
    """HumanEval and the benchmarks at every point, in % with standard errors; empty without."""
    points = [point for point in run.points if point.has_tasks]
    names = benchmarks.benchmark_names([run])
    columns: list[tuple[str, list[Score | None]]] = []
    if any(point.humaneval for point in points):
        columns.append(("HumanEval", [point.greedy for point in points]))
    columns += [(name, [point.scores.get(name) for point in points]) for name in names]
    if len(names) > 1:
        columns.append(("average", [benchmarks.average(point, names) for point in points]))
    if not columns:
        return benchmarks.warnings(run)
    titles = [_title(run, point) for point in points]
    width = max(map(len, titles)) + 2
    lines = ["\ntasks, % (± standard error)"]
    lines.append(" " * width + "".join(f"{name[:14]:>15}" for name, _ in columns))
    for row, title in enumerate(titles):
        cells = "".join(f"{_cell(scores[row]):>15}" for _, scores in columns)
        lines.append(f"  {title:<{width - 2}}{cells}")
    notes = (
        [f"HumanEval: {benchmarks.humaneval_note([run])}"] if columns[0][0] == "HumanEval" else []
    )
    notes += [f"{name}: {benchmarks.benchmark_note([run], name)}" for name in names]
    return [*lines, f"  {'; '.join(notes)}", *(f"  {text}" for text in benchmarks.warnings(run))]


def _title(run: Run, point: Point) -> str:
    name = run.matrix.stages[point.stage]
    return name if point.step is None else f"{name}, {point.label}"


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return percent(score.value) + ("" if score.stderr is None else f" ± {percent(score.stderr)}")
