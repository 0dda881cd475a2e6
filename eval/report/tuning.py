"""What the points of a run show: tasks over training, and learning against forgetting.

The figures are those of the paper's instruction tuning (Figures 3 and 12), for one run or several.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from eval.analysis.curves import LEARNING_CURVE, SINCE_STAGE_0
from eval.analysis.load import Run
from eval.analysis.noise import Measured, measured
from eval.analysis.points import Point, Score, position, stage_lengths
from eval.analysis.text import amount, percent, signed
from eval.report import point_plots, tasks
from eval.report.drawing import Mark

Read = Callable[[Point], Score | None]
MARKS = 12  # points of a run that are labelled one by one


def has_points(run: Run) -> bool:
    """Whether anything beside the losses at the ends of the stages was measured."""
    return any(point.step is not None or point.has_tasks for point in run.points)


def too_long(run: Run) -> list[str]:
    """Instruction examples that did not fit into a sequence."""
    found = [
        f"{data['too_long']:,} of {data['too_long'] + data.get('examples', 0):,} of stage {stage} "
        f"({run.matrix.stages[stage]})"
        for stage, data in run.examples.items()
        if data.get("too_long")
    ]
    return [f"Examples longer than a sequence, left out: {', '.join(found)}."] if found else []


def sentences(run: Run) -> list[str]:
    """How the tasks and, within an unfinished stage, the losses stand at the last point."""
    said = []
    last = run.points[-1] if run.points else None
    names = tasks.benchmark_names([run])
    if last and last.step is not None:
        changes = [
            f"{domain} {signed(now - before)}"
            for domain, before, now in zip(
                run.matrix.domains, run.matrix.values[0], last.loss, strict=True
            )
            if before is not None and now is not None
        ]
        where = f"Under way: the last point is {tasks.title(run, last)}"
        text = f", where the held-out losses since stage 0 are {', '.join(changes)} nats"
        said.append(f"{where}{text if changes else ''}.")
    for name, read in (("HumanEval pass@1", _greedy), ("the benchmarks' average", _average(names))):
        scores = [score for point in run.points if (score := read(point))]
        if len(scores) > 1:
            first, now = (f"{percent(score.value)}%" for score in (scores[0], scores[-1]))
            how = f"stayed at {now}" if first == now else f"went from {first} to {now}"
            said.append(f"{name[0].upper()}{name[1:]} {how}.")
    return said


@dataclass
class Learning:
    """Learning against forgetting at every point of a run: `learned` and `forgotten` of
    `eval/analysis/matrix.py`, and all trained and all base domains against stage 0."""

    curve: Measured
    since: Measured


def learning_of(run: Run) -> Learning:
    return Learning(measured(run, LEARNING_CURVE), measured(run, SINCE_STAGE_0))


def numbers(run: Run, learning: Learning) -> list[dict]:
    """Every point with all its numbers, for report.json."""
    unit, lengths = stage_lengths(run.recipe["stages"])
    names = tasks.benchmark_names([run])
    found = []
    for place, point in enumerate(run.points):
        mean = tasks.average(point, names)
        found.append(
            {
                "stage": point.stage,
                "name": run.matrix.stages[point.stage],
                "step": point.step,
                "progress": point.progress,
                "position": position(point, lengths),
                "unit": unit,
                "label": point.label,
                "loss": dict(zip(run.matrix.domains, point.loss, strict=True)),
                "stderr": dict(zip(run.matrix.domains, point.stderr, strict=True)),
                "learning_curve": _place(learning.curve, place),
                "since_stage_0": _place(learning.since, place),
                "humaneval": point.humaneval or None,
                "benchmarks": point.benchmarks or None,
                "average": mean and asdict(mean),
            }
        )
    return found


def figures(
    runs: Mapping[str, Run],
    learning: Mapping[str, Learning],
    colours: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, str]:
    """The figures that the runs have numbers for, by name: `tasks` (the paper's Figure 3),
    `benchmarks` (Figure 12), `pareto_tasks` and `pareto_loss`.

    The mappings share their keys, one for each line. With several runs,
    `pareto_loss` is drawn only where it is not the learning curve (several stages).
    """
    alone = len(runs) == 1
    names = tasks.benchmark_names(runs.values())
    panels: dict[str, dict[str, Read]] = {
        "tasks": {"HumanEval pass@1": _greedy, "Average of the benchmarks": _average(names)},
        "benchmarks": {name: _benchmark(name) for name in names},
    }
    found = {}
    unit, lengths = _axis(runs)
    for key, reads in panels.items():
        drawn: dict[str, dict[str, list[Mark]]] = {}
        for title, read in reads.items():
            lines = {k: _over_training(run, read, lengths[k]) for k, run in runs.items()}
            if any(lines.values()):
                drawn[title] = lines
        if drawn:
            stages = max(runs, key=lambda k: sum(lengths[k]))
            named = list(zip(lengths[stages], runs[stages].matrix.stages[1:], strict=True))
            found[key] = point_plots.over_training(key, drawn, colours, labels, unit, named)
    by_tasks = {k: _task_marks(run, names, alone) for k, run in runs.items()}
    if any(len(marks) > 1 for marks in by_tasks.values()):
        axes = ("HumanEval pass@1, %  (more →)", "average of the benchmarks, %  (↑ more)")
        found["pareto_tasks"] = point_plots.pareto("pareto_tasks", by_tasks, colours, labels, axes)
    by_loss = {k: _loss_marks(run, learning[k].since, alone) for k, run in runs.items()}
    same = not alone and all(run.matrix.last == 1 for run in runs.values())
    if any(len(marks) > 1 for marks in by_loss.values()) and not same:
        axes = ("learned, nats  (more →)", "forgotten, nats  (↓ less)")
        found["pareto_loss"] = point_plots.pareto("pareto_loss", by_loss, colours, labels, axes)
    return found


def _greedy(point: Point) -> Score | None:
    return point.greedy


def _average(names: Sequence[str]) -> Read:
    return lambda point: tasks.average(point, names)


def _benchmark(name: str) -> Read:
    return lambda point: point.scores.get(name)


def _axis(runs: Mapping[str, Run]) -> tuple[str, dict[str, list[float]]]:
    """The unit of a common axis over training, and the length of each run's stages in it."""
    given = {key: stage_lengths(run.recipe["stages"]) for key, run in runs.items()}
    units = {unit for unit, _ in given.values()}
    if len(units) == 1:
        return units.pop(), {key: lengths for key, (_, lengths) in given.items()}
    return "stages", {key: [1.0] * len(lengths) for key, (_, lengths) in given.items()}


def _over_training(run: Run, read: Read, lengths: Sequence[float]) -> list[Mark]:
    marks = []
    for point in run.points:
        score, x = read(point), position(point, lengths)
        if score is not None and x is not None:
            marks.append(Mark(x, 100 * score.value, y_error=_times_100(score.stderr)))
    return marks


def _task_marks(run: Run, names: Sequence[str], labelled: bool) -> list[Mark]:
    marks = []
    for point in run.points:
        learned, kept = point.greedy, tasks.average(point, names)
        if learned and kept:
            errors = _times_100(learned.stderr), _times_100(kept.stderr)
            text = _short(run, point) if labelled else ""
            marks.append(Mark(100 * learned.value, 100 * kept.value, *errors, text))
    return marks


def _loss_marks(run: Run, read: Measured, labelled: bool) -> list[Mark]:
    marks = []
    for point, place, error in zip(run.points, read.places, read.errors, strict=True):
        if place:
            x_error, y_error = error or (None, None)
            text = _short(run, point) if labelled else ""
            marks.append(Mark(*place, x_error, y_error, text))
    return marks


def _short(run: Run, point: Point) -> str:
    """What stands beside a point's dot: how far in its stage it is, or the name of the stage that
    ended there; nothing within stages where the dots are too many."""
    if point.stage == 0:
        return "start"
    if point.step is None and run.matrix.last > 1:
        return run.matrix.stages[point.stage]
    if point.step is not None and (len(run.points) > MARKS or point.progress is None):
        return ""
    return "end" if point.progress is None else amount(point.progress)


def _times_100(error: float | None) -> float | None:
    return None if error is None else 100 * error


def _place(read: Measured, index: int) -> dict | None:
    place, error = read.places[index], read.errors[index]
    if place is None:
        return None
    return {
        "learned": place[0],
        "forgotten": place[1],
        "learned_stderr": error and error[0],
        "forgotten_stderr": error and error[1],
    }
