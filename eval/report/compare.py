"""Runs side by side: learning against forgetting, and what the difference can bear.

A run is compared at the same amount of learning or not at all: whatever slows learning down, a
mask as much as a smaller learning rate, also forgets less.
"""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from eval.matrix import DEFINITIONS, Curve, complete, equal_learning, learning_curve
from eval.report import plots, recipes, verdict
from eval.report.load import Run, load_run
from eval.report.noise import Noise
from eval.report.page import render, write_folder
from eval.report.settings import Pair, Reading, Setting, measure, pairs, readable
from eval.report.text import number, short_float
from pipeline.errors import UserError

CROWDED = 8  # runs; beyond it the figure labels methods instead of runs
COMPARED = ("learned", "forgotten", "forgotten_equal")


@dataclass
class Row:
    """One run of the comparison. Learned and forgotten in nats per token; None: not measured."""

    number: int  # counted from 1, as in the figures
    run: Run
    method: str  # without learning rate and seed
    setting: str  # with everything but the seed: runs that share it are repetitions
    label: str
    curve: Curve
    learned: float | None
    forgotten: float | None
    forgotten_equal: float | None = None
    reason: str = ""  # why forgotten_equal is None
    final_loss: float | None = None  # mean over all evaluated domains
    tokens_per_second: float | None = None
    step_ratio: float | None = None  # median step time, relative to the first run's


@dataclass
class Comparison:
    """What the comparison page shows, and report.json holds."""

    rows: list[Row]
    settings: list[Setting]
    level: float | None
    reach: list[float] | None
    pairs: list[Pair]
    readings: list[Reading]
    headline: str
    verdict: list[str]
    noise: str  # what "noise" means here
    warnings: list[str]


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
    rows = _rows(runs)

    equal = [place for place, row in enumerate(rows) if row.learned is not None and row.learned > 0]
    read = equal_learning({str(place): rows[place].curve for place in equal})
    level = read["level"]
    for place, row in enumerate(rows):
        row.forgotten_equal = read["forgotten"].get(str(place))
        if row.forgotten_equal is None:
            row.reason = _why_not(row, level)
    settings = _settings(rows)
    numbers = measure([row.curve for row in rows], settings, equal)
    for setting in settings:
        for key in COMPARED:
            setattr(setting, key, numbers[key, setting.name])

    noise = Noise(runs, settings, equal)
    told = [noise.pair(first, second) for first, second in pairs(settings)]
    readings = []
    for method, others in readable(settings).items():
        own = [setting for setting in settings if setting.method == method]
        low, high = min(s.learned for s in own), max(s.learned for s in own)
        for other in others:
            value = numbers["between", method, other.name]
            reading = Reading(method, other.name, other.learned, value, other.forgotten, None)
            if value is None:
                reading.reason = f"outside what runs of {method} learned ({low:.3f} to {high:.3f})"
            else:
                reading.difference = noise.reading(own, other, value)
            readings.append(reading)
    unfinished = any(not run.finished for run in runs)
    return Comparison(
        rows=rows,
        settings=settings,
        level=level,
        reach=read["range"],
        pairs=told,
        readings=readings,
        headline=verdict.headline(settings, told, readings),
        verdict=verdict.sentences(settings, told, readings, level, unfinished),
        noise=verdict.about_noise(noise, [run.name for run in runs]),
        warnings=_warnings(runs),
    )


def write_comparison(run_dirs: Sequence[Path | str], out_dir: Path | str) -> Path:
    """Compare runs and write index.html, report.json and the figures to `out_dir`.

    Returns the path of the page. Raises as `compare`.
    """
    comparison = compare(run_dirs)
    rows, settings = comparison.rows, comparison.settings
    colours = _colours(rows)
    figures = {}
    if any(row.curve for row in rows):
        figures["trade_off"] = plots.trade_off(
            {str(row.number): row.curve for row in rows},
            colours,
            _plot_labels(rows),
            comparison.level,
            comparison.reach,
            numbered=len(rows) > CROWDED,
        )
    if comparison.readings:
        points: dict[str, list[tuple[float, float, str]]] = {}
        for setting in settings:
            point = (setting.learned, setting.forgotten, short_float(setting.lr))
            points.setdefault(setting.method, []).append(point)
        by_method = {row.method: colours[str(row.number)] for row in rows}
        figures["methods"] = plots.methods(points, by_method)
    page = render(
        "compare.html.j2",
        title="Comparison: " + ", ".join(row.run.name for row in rows),
        comparison=comparison,
        crowded=len(rows) > CROWDED,
        colours=colours,
        repeated=len(settings) < len(rows),
        compared=COMPARED,
        difference=verdict.difference,
        trade_off=Markup(figures.get("trade_off", "")),
        methods=Markup(figures.get("methods", "")),
        definitions={
            key: DEFINITIONS[key] for key in ("learned", "forgotten", "forgotten_at_equal_learning")
        },
    )
    return write_folder(Path(out_dir), page, _as_json(comparison), figures)


def terminal_summary(comparison: Comparison) -> str:
    """The comparison as a short aligned table, for the terminal."""
    table = [("run", "method", "learned", "forgotten", "forgotten at equal learning")]
    for row in comparison.rows:
        equal = number(row.forgotten_equal) + (f" ({row.reason})" if row.reason else "")
        table.append((row.run.name, row.label, number(row.learned), number(row.forgotten), equal))
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    lines = []
    for line in table:
        left = f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}"
        lines.append(f"{left}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}  {line[4]}")
    level = comparison.level
    if level is not None:
        lines.append(f"nats per token; equal learning is read at {level:.3f} nats learned")
    return "\n".join([*lines, *textwrap.wrap(comparison.headline, 100)])


def _rows(runs: list[Run]) -> list[Row]:
    rows = []
    methods = recipes.methods_of(runs)
    settings = [
        f"{method}, lr {short_float(recipes.learning_rate(run))}"
        for method, run in zip(methods, runs, strict=True)
    ]
    first = _step_seconds(runs[0])
    for place, (run, setting) in enumerate(zip(runs, settings, strict=True)):
        curve = learning_curve(run.matrix)
        learned, forgotten = curve[-1] if len(curve) > 1 else (None, None)
        final = [v for v in run.matrix.values[run.evaluated] if v is not None]
        mine = _step_seconds(run)
        comparable = _machine(run) == _machine(runs[0])
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
                final_loss=statistics.mean(final) if run.evaluated > 0 and final else None,
                tokens_per_second=_tokens_per_second(run),
                step_ratio=mine / first if mine and first and comparable else None,
            )
        )
    return rows


def _settings(rows: list[Row]) -> list[Setting]:
    """The settings of which a run has been evaluated after training, in the order given."""
    settings = []
    for name in dict.fromkeys(row.setting for row in rows if row.learned is not None):
        members = [row for row in rows if row.setting == name and row.learned is not None]
        series = {key: complete([getattr(row, key) for row in members]) for key in COMPARED}
        spread = {k: statistics.stdev(v) for k, v in series.items() if v and len(members) > 1}
        rate = recipes.learning_rate(members[0].run)
        places = [row.number - 1 for row in members]
        settings.append(Setting(name, members[0].method, rate, places, spread=spread))
    return settings


def _warnings(runs: list[Run]) -> list[str]:
    found = recipes.differences(runs)
    if len({run.heldout for run in runs} - {None}) > 1:
        found.append("The runs were evaluated on different held-out text: losses do not compare.")
    first = runs[0].matrix
    for run in runs[1:]:
        for domain in (d for d in first.domains if d in run.matrix.domains):
            mine, theirs = run.matrix.value(0, domain), first.value(0, domain)
            if mine is not None and theirs is not None and abs(mine - theirs) > 1e-3:
                found.append(
                    f"{run.name} and {runs[0].name} do not start from the same loss on {domain} "
                    f"({mine:.3f} and {theirs:.3f}): not the same model or held-out text."
                )
    if len({_machine(run) for run in runs}) > 1:
        found.append(
            "The runs differ in hardware, threads, engine, precision or ranks: speeds do not "
            "compare."
        )
    for run in runs:
        found += [f"{run.name}: {warning}" for warning in run.warnings]
        if not run.finished:
            done = max(run.evaluated, 0)
            found.append(f"{run.name}: {done} of {run.matrix.last} stages evaluated.")
        for domain, record in run.bad_lines.items():
            found.append(
                f"{run.name}: {record.get('count')} unreadable line(s) of {domain} skipped."
            )
    return found


def _machine(run: Run) -> str:
    return repr([run.environment.get(k) for k in ("hardware", "engine", "precision", "ranks")])


def _why_not(row: Row, level: float | None) -> str:
    if row.learned is None:
        return "no stage evaluated yet"
    if row.learned <= 0:
        return "learned nothing"
    return f"its curve does not pass {number(level)}"


def _tokens_per_second(run: Run) -> float | None:
    timed = [s for s in run.steps if s.get("seconds")]
    seconds = sum(s["seconds"] for s in timed)
    return sum(s.get("tokens", 0) for s in timed) / seconds if seconds else None


def _step_seconds(run: Run) -> float | None:
    seconds = [s["seconds"] for s in run.steps if s.get("seconds")]
    return statistics.median(seconds) if seconds else None


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour per run, or per method where methods have several runs each."""
    methods = list(dict.fromkeys(row.method for row in rows))
    if 1 < len(methods) < len(rows) or len(rows) > len(plots.COLOURS):
        by_method = plots.colours_of(methods)
        return {str(row.number): by_method[row.method] for row in rows}
    return plots.colours_of(str(row.number) for row in rows)


def _plot_labels(rows: list[Row]) -> dict[str, str]:
    """What stands beside the end of each run's line; if they are many, one label per method (at
    its run that learned most) and the runs' numbers in their dots."""
    if len(rows) <= CROWDED:
        return {str(row.number): f"{row.number}  {row.label}" for row in rows}
    measured = [row for row in rows if row.learned is not None]
    furthest = {row.method: row for row in sorted(measured, key=lambda row: row.learned or 0.0)}
    return {str(row.number): method for method, row in furthest.items()}


def _as_json(comparison: Comparison) -> dict:
    rows = [
        {key: value for key, value in vars(row).items() if key != "run"} | {"name": row.run.name}
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
        "headline": comparison.headline,
        "verdict": comparison.verdict,
        "noise": comparison.noise,
        "warnings": comparison.warnings,
        "definitions": DEFINITIONS,
    }
