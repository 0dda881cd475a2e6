"""Compared runs, one row each, and the settings that they are repetitions of."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from eval.analysis import labels
from eval.analysis.at_equal_learning import AtEqualLearning, at_equal_learning
from eval.analysis.curves import Place, curve_of, learning_points, on_the_curve
from eval.analysis.load import Run
from eval.analysis.matrix import Curve, complete
from eval.analysis.points import Point, Score
from eval.analysis.settings import Setting
from eval.analysis.text import number, short_float
from eval.report import tasks, tuning

COMPARED = ("learned", "forgotten", "forgotten_equal")
AS = " (as "  # then the name of a run, where a name alone does not tell which runs it is of
TASKS = {"humaneval": "HumanEval", "benchmarks": "Benchmarks"}


@dataclass
class Row:
    """One run of the comparison. Learned and forgotten in nats per token; None: not measured."""

    number: int  # counted from 1, as in the figures
    run: Run
    method: str  # without learning rate and seed
    setting: str  # with everything but the seed: runs that share it are repetitions
    label: str
    curve: Curve  # through all evaluated points, also those within stages
    learned: float | None
    forgotten: float | None
    learning: tuning.Learning  # the same with standard errors, aligned with run.points
    end: Point | None  # the last evaluated point of training
    humaneval: Score | None  # there
    benchmarks: Score | None  # there, the mean over all benchmarks of the compared runs
    forgotten_equal: float | None = None
    reason: str = ""  # why forgotten_equal is None
    final_loss: float | None = None  # mean over all evaluated domains
    tokens_per_second: float | None = None
    step_ratio: float | None = None  # median step time, relative to the first run's

    @property
    def curve_errors(self) -> list[Place | None]:
        """The standard errors of the points of `curve`."""
        known = zip(self.learning.curve.places, self.learning.curve.errors, strict=True)
        read = on_the_curve(self.run, [(errors,) if place else None for place, errors in known])
        return [errors for (errors,) in read]

    @property
    def errors(self) -> Place | None:
        """The standard errors of learned and forgotten."""
        return self.curve_errors[-1] if len(self.curve) > 1 else None


def rows_of_runs(runs: list[Run]) -> list[Row]:
    rows = []
    names = tasks.benchmark_names(runs)
    # Only runs that differ in rate and seed alone may lie on one curve.
    methods = _told_apart(runs, labels.methods_of(runs), labels.without_rate)
    settings = [
        f"{method}, lr {short_float(labels.learning_rate(run))}"
        for method, run in zip(methods, runs, strict=True)
    ]
    settings = _told_apart(runs, settings, labels.without_seed)
    first = _step_seconds(runs[0])
    for place, (run, setting) in enumerate(zip(runs, settings, strict=True)):
        curve, points, learning = curve_of(run), learning_points(run), tuning.learning_of(run)
        if run.damage:  # what is left would be read as less learning
            curve = []
        learned, forgotten = curve[-1] if len(curve) > 1 else (None, None)
        trained = [point for point in points or run.points if point.stage]
        end = trained[-1] if trained else None
        final = [v for v in run.matrix.values[run.evaluated] if v is not None]
        mine = _step_seconds(run)
        comparable = machine_of(run) == machine_of(runs[0])
        repeated = settings.count(setting) > 1
        rows.append(
            Row(
                number=place + 1,
                run=run,
                method=methods[place],
                setting=setting,
                label=setting + (f", seed {run.recipe.get('seed', '?')}" if repeated else ""),
                curve=curve,
                learned=learned,
                forgotten=forgotten,
                learning=learning,
                end=end,
                humaneval=end.greedy if end else None,
                benchmarks=tasks.average(end, names) if end else None,
                final_loss=statistics.mean(final) if run.evaluated > 0 and final else None,
                tokens_per_second=_tokens_per_second(run),
                step_ratio=mine / first if mine and first and comparable else None,
            )
        )
    return rows


def _told_apart(runs: list[Run], names: list[str], shared_by: Callable[[Run], str]) -> list[str]:
    """The names with, where runs of one name differ in what `shared_by` gives, the name of the
    first run like it."""
    kinds = list(zip(names, map(shared_by, runs), strict=True))
    return [
        f"{name}{AS}{runs[kinds.index(kind)].name})"
        if len({other for of, other in kinds if of == name}) > 1
        else name
        for name, kind in zip(names, kinds, strict=True)
    ]


def settings_of(rows: list[Row]) -> list[Setting]:
    """The settings of which a run has been evaluated after training, in the order given."""
    settings = []
    for name in dict.fromkeys(row.setting for row in rows if row.learned is not None):
        members = [row for row in rows if row.setting == name and row.learned is not None]
        series = {key: complete([getattr(row, key) for row in members]) for key in COMPARED}
        spread = {k: statistics.stdev(v) for k, v in series.items() if v and len(members) > 1}
        rate = labels.learning_rate(members[0].run)
        places = [row.number - 1 for row in members]
        setting = Setting(name, members[0].method, rate, places, spread=spread)
        for key in TASKS:
            scores = [getattr(row, key) for row in members]
            if values := complete([score and score.value for score in scores]):
                setattr(setting, key, statistics.mean(values))
                if len(values) > 1:
                    setting.spread[key] = statistics.stdev(values)
        settings.append(setting)
    return settings


@dataclass(frozen=True)
class Cost:
    """Of a method's runs on the same machine, the medians.

    step: its time over the reference's. minutes: of a run's training, publishing and evaluating.
    memory_gb: at the peak (`Speed`).
    """

    step: float
    minutes: float
    memory_gb: float | None


def method_table(rows: list[Row]) -> tuple[AtEqualLearning | None, dict[str, Cost]]:
    """Every method over its learning rates and seeds against fine-tuning (or else the first one),
    and what it costs."""
    ends: dict[str, dict[int, dict[float, Place]]] = {}
    runs: dict[str, list[Run]] = {}
    for row in rows:
        if row.learned is None or row.forgotten is None or not row.run.finished:
            continue
        seed = int(row.run.recipe.get("seed") or 0)
        rate = labels.learning_rate(row.run)
        ends.setdefault(row.method, {}).setdefault(seed, {})[rate] = (row.learned, row.forgotten)
        if _step_seconds(row.run) and machine_of(row.run) == machine_of(rows[0].run):
            runs.setdefault(row.method, []).append(row.run)
    plain = [m for m in ends if m.partition(AS)[0] in ("ft", "lora", "qlora")]
    reference = (plain or list(ends) or [""])[0]
    found = at_equal_learning(ends, reference)
    if found is None or reference not in runs:
        return found, {}
    steps = {m: statistics.median(_step_seconds(r) or 0 for r in mine) for m, mine in runs.items()}
    costs = {}
    for method, mine in runs.items():
        peaks = complete([_peak_memory(run) for run in mine])
        costs[method] = Cost(
            steps[method] / steps[reference],
            statistics.median(_minutes(run) for run in mine),
            statistics.median(peaks) if peaks else None,
        )
    return found, costs


def why_not_equal(row: Row, level: float | None) -> str:
    if row.run.damage:
        return "damaged: no verdict"
    run = row.run
    if row.learned is None:
        alone = run.evaluated > 0 and not run.matrix.old(run.matrix.last)
        if not alone and run.evaluated and not run.matrix.old(run.evaluated):
            return "there was nothing to forget yet"
        return "it has nothing to forget" if alone else "no stage evaluated yet"
    if row.learned <= 0:
        return "learned nothing"
    return f"its curve does not pass {number(level)}"


def machine_of(run: Run) -> str:
    return repr([run.environment.get(k) for k in ("hardware", "engine", "precision", "ranks")])


def _tokens_per_second(run: Run) -> float | None:
    timed = [s for s in run.log.steps if s.get("seconds")]
    seconds = sum(s["seconds"] for s in timed)
    return sum(s.get("tokens", 0) for s in timed) / seconds if seconds else None


def _minutes(run: Run) -> float:
    parts = ("seconds", "publish_seconds", "eval_seconds")
    return sum(end.get(part) or 0.0 for end in run.log.ends.values() for part in parts) / 60


def _peak_memory(run: Run) -> float | None:
    known = [s["peak_memory_gb"] for s in run.log.steps if s.get("peak_memory_gb")]
    return max(known, default=None)


def _step_seconds(run: Run) -> float | None:
    seconds = [s["seconds"] for s in run.log.steps if s.get("seconds")]
    return statistics.median(seconds) if seconds else None
