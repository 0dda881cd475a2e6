"""The end of a run, as a few lines for the terminal."""

from pathlib import Path

from eval.analysis.load import Run, load_run
from eval.analysis.matrix import learning_curve
from eval.analysis.points import Point, Score
from eval.analysis.text import percent
from eval.report import tasks
from pipeline.progress import say


def print_summary(page: Path) -> None:
    """Held-out loss after every stage, what was learned and forgotten, HumanEval and benchmarks at
    every point, where the page is."""
    run = load_run(page.parent.parent)
    matrix = run.matrix
    width = max(12, *(len(s) + 4 for s in matrix.stages))
    say("\nheld-out loss (nats per predicted token) after each stage")
    say(" " * width + "".join(f"{d[:11]:>12}" for d in matrix.domains))
    for stage, values in zip(matrix.stages, matrix.values, strict=True):
        cells = "".join("           -" if v is None else f"{v:12.3f}" for v in values)
        say(f"  {stage:<{width - 2}}{cells}")
    curve = learning_curve(matrix)
    if len(curve) > 1:
        learned, forgotten = curve[-1]
        say(f"learned {learned:.3f}, forgotten {forgotten:.3f} nats per token (mean over domains)")
    for warning in run.warnings:
        say(f"warning: {warning}")
    for line in task_lines(run):
        say(line)
    say(f"report: {page}")


def task_lines(run: Run) -> list[str]:
    """HumanEval and the benchmarks at every point, in % with standard errors; empty without."""
    points = [point for point in run.points if point.has_tasks]
    names = tasks.benchmark_names([run])
    columns: list[tuple[str, list[Score | None]]] = []
    if any(point.humaneval for point in points):
        columns.append(("HumanEval", [point.greedy for point in points]))
    columns += [(name, [point.scores.get(name) for point in points]) for name in names]
    if len(names) > 1:
        columns.append(("average", [tasks.average(point, names) for point in points]))
    if not columns:
        return tasks.warnings(run)
    titles = [_title(run, point) for point in points]
    width = max(map(len, titles)) + 2
    lines = ["\ntasks, % (± standard error)"]
    lines.append(" " * width + "".join(f"{name[:14]:>15}" for name, _ in columns))
    for row, title in enumerate(titles):
        cells = "".join(f"{_cell(scores[row]):>15}" for _, scores in columns)
        lines.append(f"  {title:<{width - 2}}{cells}")
    notes = [f"HumanEval: {tasks.humaneval_note([run])}"] if columns[0][0] == "HumanEval" else []
    notes += [f"{name}: {tasks.benchmark_note([run], name)}" for name in names]
    return [*lines, f"  {'; '.join(notes)}", *(f"  {text}" for text in tasks.warnings(run))]


def _title(run: Run, point: Point) -> str:
    name = run.matrix.stages[point.stage]
    return name if point.step is None else f"{name}, {point.label}"


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return percent(score.value) + ("" if score.stderr is None else f" ± {percent(score.stderr)}")
