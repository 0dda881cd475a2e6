"""Runs side by side: learning against forgetting, and what the difference can bear.

A run is compared at the same amount of learning or not at all: whatever slows learning down, a
mask as much as a smaller learning rate, also forgets less.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.analysis import labels
from eval.analysis.accuracy import DEFINITIONS as ACCURACY_DEFINITIONS
from eval.analysis.accuracy import Estimate, accuracy_matrix, estimates
from eval.analysis.at_equal_learning import DRAWS, AtEqualLearning
from eval.analysis.curves import POINT_DEFINITIONS
from eval.analysis.load import Run, load_run
from eval.analysis.matrix import DEFINITIONS, equal_learning
from eval.analysis.noise import Noise
from eval.analysis.points import Score
from eval.analysis.settings import (
    Pair,
    Reading,
    Setting,
    by_rate,
    measure,
    pairs,
    readable,
    readable_part,
)
from eval.analysis.text import number, percent, short_float, signed_percent
from eval.report import tasks, trade_off_plots, tuning, verdict
from eval.report.compared_runs import (
    COMPARED,
    TASKS,
    Cost,
    Row,
    machine_of,
    method_table,
    rows_of_runs,
    settings_of,
    why_not_equal,
)
from eval.report.drawing import COLOURS, colours_of
from eval.report.end_tasks import end_tasks_of
from eval.report.page import marked, render, write_folder
from eval.report.published import published
from eval.report.targets import ToTarget, to_targets
from eval.report.tasks import TaskDifference
from pipeline.errors import UserError

CROWDED = 8  # runs; beyond it the figure labels methods instead of runs


@dataclass
class Comparison:
    """What the comparison page shows, and report.json holds."""

    rows: list[Row]
    settings: list[Setting]
    level: float | None
    reach: list[float] | None
    pairs: list[Pair]
    readings: list[Reading]
    at_equal_learning: AtEqualLearning | None
    costs: dict[str, Cost]  # by method
    headline: str
    verdict: list[str]
    noise: str  # what "noise" means here
    benchmarks: list[str]  # of any of the runs
    task_differences: list[tuple[str, str, dict[str, TaskDifference]]]  # first, second, by task
    accuracies: dict[str, dict[str, Estimate]]  # by setting, the metrics of the tasks' accuracies
    to_targets: list[ToTarget]  # where all runs train to the same ones
    warnings: list[str]

    @property
    def damaged(self) -> list[str]:
        """The runs that no verdict rests on."""
        return [row.run.name for row in self.rows if row.run.damage]


def compare(run_dirs: Sequence[Path | str]) -> Comparison:
    """Read two or more runs and compare them.

    `UserError` for a folder that is no run, a run given twice, or fewer than two runs.
    """
    folders = [Path(folder) for folder in run_dirs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("The same run folder is given twice; name every run once.")
    if len(folders) < 2:
        raise UserError("A comparison needs at least two run folders.")
    runs = [load_run(folder) for folder in folders]
    rows = rows_of_runs(runs)

    equal = [place for place, row in enumerate(rows) if row.learned is not None and row.learned > 0]
    read = equal_learning({str(place): rows[place].curve for place in equal})
    level = read["level"]
    for place, row in enumerate(rows):
        row.forgotten_equal = read["forgotten"].get(str(place))
        if row.forgotten_equal is None:
            row.reason = why_not_equal(row, level)
    settings = settings_of(rows)
    numbers = measure([row.curve for row in rows], settings, equal)
    for setting in settings:
        for key in COMPARED:
            setattr(setting, key, numbers[key, setting.name])
    names = tasks.benchmark_names(runs)
    ends = {s.name: [end for i in s.runs if (end := rows[i].end)] for s in settings}
    task_differences = [
        (a.name, b.name, found)
        for a, b in pairs(settings)
        if not any(end.damage for end in (*ends[a.name], *ends[b.name]))
        and (found := tasks.differences(ends[a.name], ends[b.name], names))
    ]

    noise = Noise(runs, settings, equal)
    told = [noise.pair(first, second) for first, second in pairs(settings)]
    readings = []
    for method, others in readable(settings).items():
        own = by_rate(settings)[method]
        reached = [learned for learned, _ in readable_part([(s.learned, s.forgotten) for s in own])]
        low, high = min(reached, default=0.0), max(reached, default=0.0)
        for other in others:
            value = numbers["between", method, other.name]
            reading = Reading(method, other.name, other.learned, value, other.forgotten, None)
            if value is None:
                reading.reason = f"outside what runs of {method} learned ({low:.3f} to {high:.3f})"
            else:
                reading.difference = noise.reading(own, other, value)
            readings.append(reading)
    unfinished = any(not run.finished for run in runs)
    headline = verdict.headline(settings, told, readings, [r.name for r in runs if r.damage])
    if _other_losses(runs, 1e-2):
        headline = "No verdict: the losses of these runs do not compare, see the warnings."
    table, costs = method_table(rows)
    return Comparison(
        rows=rows,
        settings=settings,
        level=level,
        reach=read["range"],
        pairs=told,
        readings=readings,
        at_equal_learning=table,
        costs=costs,
        headline=headline,
        verdict=verdict.sentences(settings, told, readings, level, unfinished),
        noise=verdict.about_noise(
            {
                run.name: text
                for run, text in zip(runs, noise.paired, strict=True)
                if not run.damage
            },
            noise.beyond,
        ),
        benchmarks=names,
        task_differences=task_differences,
        accuracies=_accuracies(rows, settings),
        to_targets=to_targets(rows, settings),
        warnings=_warnings(runs),
    )


def _accuracies(rows: list[Row], settings: list[Setting]) -> dict[str, dict[str, Estimate]]:
    """Of the settings whose runs have all answered the same tasks to the end."""
    matrices = {s.name: [accuracy_matrix(rows[i].run) for i in s.runs] for s in settings}
    known = {name: [m for m in found if m] for name, found in matrices.items()}
    return {
        name: estimates(found)
        for name, found in known.items()
        if found
        and len(found) == len(matrices[name])
        and len({tuple(m.domains) for m in found}) == 1
    }


def write_comparison(run_dirs: Sequence[Path | str], out_dir: Path | str) -> Path:
    """Compare runs and write index.html, report.json and the figures to `out_dir`.

    Returns the path of the page. Raises as `compare`.
    """
    comparison = compare(run_dirs)
    rows, settings = comparison.rows, comparison.settings
    colours = _colours(rows)
    labels = _plot_labels(rows)
    figures = {}
    detailed = any(tuning.has_points(row.run) for row in rows)
    if any(row.curve for row in rows):
        figures["trade_off"] = trade_off_plots.trade_off(
            {str(row.number): row.curve for row in rows},
            colours,
            labels,
            comparison.level,
            comparison.reach,
            numbered=len(rows) > CROWDED,
            errors={str(row.number): row.curve_errors for row in rows} if detailed else {},
        )
    if comparison.readings:
        points = {
            method: [(s.learned, s.forgotten, short_float(s.lr)) for s in own]
            for method, own in by_rate(settings).items()
        }
        by_method = {row.method: colours[str(row.number)] for row in rows}
        figures["methods"] = trade_off_plots.methods(points, by_method)
    if detailed:
        named = {str(row.number): row.run for row in rows}
        learning = {str(row.number): row.learning for row in rows}
        figures |= tuning.figures(named, learning, colours, labels)
    alike: dict[str, list[Run]] = {}
    for row in rows:  # also those that have nothing to forget
        alike.setdefault(row.setting, []).append(row.run)
    end_tasks = end_tasks_of(alike)
    page = render(
        "compare.html.j2",
        title="Comparison: " + ", ".join(row.run.name for row in rows),
        comparison=comparison,
        crowded=len(rows) > CROWDED,
        colours=colours,
        repeated=len(settings) < len(rows),
        compared=COMPARED,
        draws=DRAWS,
        shown_tasks=[key for key in TASKS if any(getattr(row, key) for row in rows)],
        task_names=TASKS,
        task_notes=_task_notes(comparison),
        how_measured=tasks.how_measured(*(row.run for row in rows)),
        difference_columns=_difference_columns(comparison),
        end_tasks=end_tasks,
        accuracies=_accuracy_table(comparison),
        published=(theirs := published([row.run for row in rows])),
        accuracy_definitions=ACCURACY_DEFINITIONS,
        detailed=detailed,
        difference=verdict.difference,
        figures=marked(figures),
        definitions={
            key: DEFINITIONS[key] for key in ("learned", "forgotten", "forgotten_at_equal_learning")
        }
        | (POINT_DEFINITIONS if detailed else {}),
    )
    found = _as_json(comparison)
    if end_tasks:
        found["end_tasks"] = end_tasks.numbers
    if theirs:
        found["published"] = [asdict(p) for p in theirs]
    return write_folder(Path(out_dir), page, found, figures)


def terminal_summary(comparison: Comparison) -> str:
    """The comparison as a short aligned table, for the terminal."""
    table = [("run", "method", "learned", "forgotten", "forgotten at equal learning")]
    for row in comparison.rows:
        equal = number(row.forgotten_equal) + (f" ({row.reason})" if row.reason else "")
        table.append((row.run.name, row.label, number(row.learned), number(row.forgotten), equal))
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    lines = []
    for cells in table:
        left = f"{cells[0]:<{widths[0]}}  {cells[1]:<{widths[1]}}"
        lines.append(f"{left}  {cells[2]:>{widths[2]}}  {cells[3]:>{widths[3]}}  {cells[4]}")
    for row in comparison.rows:
        if row.humaneval or row.benchmarks:
            scores = {name: getattr(row, key) for key, name in TASKS.items()}
            said = [f"{name} {_percent(score)}" for name, score in scores.items() if score]
            lines.append(f"{row.run.name:<{widths[0]}}  {', '.join(said)}")
    for line in comparison.to_targets:
        lines.append(
            f"to the same target: {line.name}: forgotten {line.forgotten} in {line.seconds} s"
            + (f" ({line.reached} of {line.runs} runs reached it)" if line.missed else "")
        )
    level = comparison.level
    if level is not None:
        lines.append(f"nats per token; equal learning is read at {level:.3f} nats learned")
    for warning in comparison.warnings:
        lines += textwrap.wrap(f"warning: {warning}", 100, subsequent_indent="  ")
    return "\n".join([*lines, *textwrap.wrap(comparison.headline, 100)])


def _percent(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {percent(score.stderr)}"
    return f"{percent(score.value)}{error} %"


def _other_losses(runs: list[Run], tolerance: float) -> list[str]:
    """Why the losses of the runs do not compare, if they do not. tolerance: nats, of the base: that
    of other hardware and precisions is a few thousandths."""
    found = []
    if len({run.heldout for run in runs} - {None}) > 1:
        found.append("The runs were evaluated on different held-out text: losses do not compare.")
    first = runs[0].matrix
    for run in runs[1:]:
        for domain in (d for d in first.domains if d in run.matrix.domains):
            mine, theirs = run.matrix.value(0, domain), first.value(0, domain)
            if mine is not None and theirs is not None and abs(mine - theirs) > tolerance:
                found.append(
                    f"{run.name} and {runs[0].name} do not start from the same loss on {domain} "
                    f"({mine:.3f} and {theirs:.3f}): not the same model or held-out text."
                )
    return found


def _warnings(runs: list[Run]) -> list[str]:
    found = labels.differences(runs) + _other_losses(runs, 1e-3)
    if len({machine_of(run) for run in runs}) > 1:
        found.append(
            "The runs differ in hardware, threads, engine, precision or ranks: speeds do not "
            "compare."
        )
    paired = [any(point.sequences for point in run.points) for run in runs]
    for run, has_sequences in zip(runs, paired, strict=True):
        if any(paired) and not has_sequences and not run.damage and run.points:
            found.append(
                f"{run.name}: losses by sequence (sequences.npz) are missing, so that its noise is "
                "overstated: every evaluation is taken as independent."
            )
        found += [f"{run.name}: {warning}" for warning in run.warnings]
        if not run.finished:
            done = max(run.evaluated, 0)
            found.append(f"{run.name}: {done} of {run.matrix.last} stages evaluated.")
        for domain, record in run.log.bad_lines.items():
            found.append(
                f"{run.name}: {record.get('count')} unreadable line(s) of {domain} skipped."
            )
    said = {run.name: [*tasks.warnings(run), *tuning.too_long(run)] for run in runs}
    for text in dict.fromkeys(text for texts in said.values() for text in texts):
        names = [name for name, texts in said.items() if text in texts]
        found.append(f"{'All runs' if len(names) == len(runs) else labels.some(names)}: {text}")
    return found


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour per run, or per method where methods have several runs each."""
    methods = list(dict.fromkeys(row.method for row in rows))
    if 1 < len(methods) < len(rows) or len(rows) > len(COLOURS):
        by_method = colours_of(methods)
        return {str(row.number): by_method[row.method] for row in rows}
    return colours_of(str(row.number) for row in rows)


def _plot_labels(rows: list[Row]) -> dict[str, str]:
    """What stands beside the end of each run's line; if they are many, one label per method (at
    its run that learned most) and the runs' numbers in their dots."""
    if len(rows) <= CROWDED:
        return {str(row.number): f"{row.number}  {row.label}" for row in rows}
    measured = [row for row in rows if row.learned is not None]
    furthest = {row.method: row for row in sorted(measured, key=lambda row: row.learned or 0.0)}
    return {str(row.number): method for method, row in furthest.items()}


def _task_notes(comparison: Comparison) -> dict[str, str]:
    """On what each task was measured, for the heads of the table's columns."""
    runs, names = [row.run for row in comparison.rows], comparison.benchmarks
    return {
        "humaneval": f"greedy pass@1, {tasks.humaneval_note(runs)}",
        "benchmarks": f"average of {len(names)}",
        **{name: tasks.benchmark_note(runs, name) for name in names},
    }


def _accuracy_table(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """A row per setting: (its name, each metric in %, with its interval)."""
    return [
        (name, [_estimate(key, found.get(key)) for key in ACCURACY_DEFINITIONS])
        for name, found in comparison.accuracies.items()
    ]


def _estimate(key: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return number(None)
    write = percent if key == "acc" else signed_percent
    interval = "" if not estimate.interval else f" ({' to '.join(map(write, estimate.interval))})"
    return write(estimate.value) + interval


def _difference_columns(comparison: Comparison) -> dict[str, str]:
    """The tasks that differ in some pair of settings, with their names."""
    names = {
        "humaneval": "HumanEval",
        **{n: n for n in comparison.benchmarks},
        "average": "average",
    }
    known = {task for _, _, found in comparison.task_differences for task in found}
    return {task: name for task, name in names.items() if task in known}


def _as_json(comparison: Comparison) -> dict:
    rows = [
        {key: value for key, value in vars(row).items() if key not in ("run", "end", "learning")}
        | {key: score and asdict(score) for key in TASKS for score in [getattr(row, key)]}
        | {"name": row.run.name, "errors": row.errors}
        | {"points": tuning.numbers(row.run, row.learning)}
        for row in comparison.rows
    ]
    settings = [
        asdict(setting) | {"runs": [comparison.rows[place].number for place in setting.runs]}
        for setting in comparison.settings
    ]
    return {
        "runs": rows,
        "settings": settings,
        "equal_learning": {"level": comparison.level, "range": comparison.reach},
        "pairs": [asdict(pair) for pair in comparison.pairs],
        "between_learning_rates": [asdict(reading) for reading in comparison.readings],
        "at_equal_learning": comparison.at_equal_learning and asdict(comparison.at_equal_learning),
        "costs": {method: asdict(cost) for method, cost in comparison.costs.items()},
        "task_differences": [
            {"first": a, "second": b, "tasks": {task: asdict(d) for task, d in found.items()}}
            for a, b, found in comparison.task_differences
        ],
        "accuracies": {
            name: {key: asdict(estimate) for key, estimate in found.items()}
            for name, found in comparison.accuracies.items()
        },
        "to_the_same_target": [asdict(row) for row in comparison.to_targets],
        "headline": comparison.headline,
        "verdict": comparison.verdict,
        "noise": comparison.noise,
        "warnings": comparison.warnings,
        "definitions": DEFINITIONS | POINT_DEFINITIONS,
    }
