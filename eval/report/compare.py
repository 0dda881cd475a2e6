"""Runs side by side: learning against forgetting, and what the difference can bear.

A run is compared at the same amount of learning or not at all: whatever slows learning down, a
mask as much as a smaller learning rate, also forgets less. The verdict is computed, and says
"within the noise" wherever a difference is smaller than twice its standard error.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from markupsafe import Markup

from eval.matrix import (
    DEFINITIONS,
    Curve,
    between,
    complete,
    curve_errors,
    equal_learning,
    learning_curve,
)
from eval.report import plots
from eval.report.load import Run, load_run
from eval.report.page import number, render, short_float, write_folder
from eval.report.plots import signed
from pipeline.errors import UserError

NOISE = 2.0  # standard errors; a smaller difference is called noise

CROWDED = 8  # runs; beyond it the figure labels methods instead of runs

CRITERIA = {
    "output": "migu",
    "random": "random rows",
    "weight": "weight magnitude",
    "gradient": "gradient magnitude",
}
FREE = ("mask", "optimizer", "seed", "name")
"""What compared runs may differ in; with the learning rate of single stages, and with how (not on
what) the evaluation ran."""
ALSO_FREE = (
    "evaluate.batch_size",
    "evaluate.overlap",
    "train.micro_batch_size",
    "train.publish_dtype",
)


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
    errors: tuple[float, float] | None  # standard errors of learned and forgotten
    forgotten_equal: float | None = None
    reason: str = ""  # why forgotten_equal is None
    final_loss: float | None = None  # mean over all evaluated domains
    tokens_per_second: float | None = None
    step_ratio: float | None = None  # median step time, relative to the first run's


@dataclass
class Group:
    """The repetitions of one setting: means, and standard deviations where there are several."""

    setting: str
    method: str
    lr: float
    runs: int
    learned: float
    forgotten: float
    forgotten_equal: float | None
    spread: dict[str, float]  # standard deviation over the seeds; empty for one run
    errors: tuple[float, float] | None


@dataclass
class Reading:
    """A method, read between its learning rates at the learning of another setting."""

    method: str
    at: str
    learned: float
    forgotten_read: float | None
    forgotten_measured: float
    noise: float | None
    reason: str = ""


@dataclass
class Comparison:
    """What the comparison page shows, and report.json holds."""

    rows: list[Row]
    groups: list[Group]
    level: float | None
    reach: list[float] | None
    readings: list[Reading]
    headline: str
    verdict: list[str]
    warnings: list[str] = field(default_factory=list)


def compare(run_dirs: list[Path | str]) -> Comparison:
    """Read two or more runs and compare them.

    `UserError` for a folder that is no run, a run given twice, or fewer than two runs.
    """
    folders = [Path(folder) for folder in run_dirs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("The same run folder is given twice; name every run once.")
    if len(folders) < 2:
        raise UserError("A comparison needs at least two run folders.")
    rows = _rows([load_run(folder) for folder in folders])
    equal = equal_learning({str(row.number): row.curve for row in rows if _learned_something(row)})
    for row in rows:
        row.forgotten_equal = equal["forgotten"].get(str(row.number))
        if row.forgotten_equal is None:
            row.reason = _why_not(row, equal["level"])
    groups = _groups(rows)
    readings = _readings(groups)
    return Comparison(
        rows=rows,
        groups=groups,
        level=equal["level"],
        reach=equal["range"],
        readings=readings,
        headline=_headline(groups, readings),
        verdict=_verdict(groups, rows, equal["level"], readings),
        warnings=_warnings(rows),
    )


def write_comparison(run_dirs: list[Path | str], out_dir: Path | str) -> Path:
    """Compare runs and write index.html, report.json and the figures to `out_dir`.

    Returns the path of the page. Raises as `compare`.
    """
    comparison = compare(run_dirs)
    rows, groups = comparison.rows, comparison.groups
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
        for group in groups:
            point = (group.learned, group.forgotten, short_float(group.lr))
            points.setdefault(group.method, []).append(point)
        by_method = {row.method: colours[str(row.number)] for row in rows}
        figures["methods"] = plots.methods(points, by_method)
    page = render(
        "compare.html.j2",
        title="Comparison: " + ", ".join(row.run.name for row in rows),
        comparison=comparison,
        crowded=len(rows) > CROWDED,
        rows=[_table_row(row, colours[str(row.number)]) for row in rows],
        groups=[_group_cells(group) for group in groups] if len(groups) < len(rows) else [],
        readings=[_reading_cells(reading) for reading in comparison.readings],
        trade_off=Markup(figures.get("trade_off", "")),
        methods=Markup(figures.get("methods", "")),
        level=number(comparison.level),
        reach=[number(end) for end in comparison.reach] if comparison.reach else None,
        definitions={
            key: DEFINITIONS[key] for key in ("learned", "forgotten", "forgotten_at_equal_learning")
        },
    )
    return write_folder(Path(out_dir), page, _as_json(comparison), figures)


def terminal_summary(comparison: Comparison) -> str:
    """The comparison as a short aligned table, for the terminal."""
    head = ("run", "method", "learned", "forgotten", "forgotten at equal learning")
    table = [head]
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
    return "\n".join(lines)


def method_label(mask: dict) -> str:
    """`ft`, `migu T=0.7`, `random rows T=0.7`, ..."""
    if not mask.get("enabled", True):
        return "ft"
    criterion = str(mask.get("criterion", "output"))
    return f"{CRITERIA.get(criterion, criterion)} T={mask.get('threshold', 0.7):g}"


def _rows(runs: list[Run]) -> list[Row]:
    recipes = [_flat(run.recipe) for run in runs]
    # What a masked run sets beyond the label is told where the masked runs do not agree on it.
    named = {"mask.enabled", "mask.threshold", "mask.criterion", "optimizer.lr"}
    masked = [r for r in recipes if r.get("mask.enabled", True)]
    said = {
        key: [repr(r.get(key)) for r in (masked if key.startswith("mask.") else recipes)]
        for key in sorted({key for recipe in recipes for key in recipe})
        if _is_free(key) and key not in named and key not in ("seed", "name")
    }
    telling = {key for key, values in said.items() if len(set(values)) > 1}
    rows = []
    for place, (run, recipe) in enumerate(zip(runs, recipes, strict=True), start=1):
        is_masked = recipe.get("mask.enabled", True)
        extra = [
            f"{key.split('.', 1)[1]} {_plain(recipe[key])}"
            for key in sorted(telling)
            if recipe.get(key) is not None and (is_masked or not key.startswith("mask."))
        ]
        method = ", ".join([method_label(run.recipe.get("mask") or {}), *extra])
        setting = f"{method}, lr {short_float(_lr(run))}"
        curve = learning_curve(run.matrix)
        trained = len(curve) > 1
        final = [v for v in run.matrix.values[run.evaluated] if v is not None]
        rows.append(
            Row(
                number=place,
                run=run,
                method=method,
                setting=setting,
                label=setting,
                curve=curve,
                learned=curve[-1][0] if trained else None,
                forgotten=curve[-1][1] if trained else None,
                errors=curve_errors(run.matrix, run.stderr),
                final_loss=statistics.mean(final) if run.evaluated > 0 and final else None,
                tokens_per_second=_tokens_per_second(run),
            )
        )
    settings = [row.setting for row in rows]
    first = _step_seconds(rows[0].run)
    for row in rows:
        if settings.count(row.setting) > 1:
            row.label = f"{row.setting}, seed {row.run.recipe.get('seed', '?')}"
        mine = _step_seconds(row.run)
        row.step_ratio = mine / first if mine and first else None
    return rows


def _groups(rows: list[Row]) -> list[Group]:
    groups = []
    for setting in dict.fromkeys(row.setting for row in rows):
        members = [row for row in rows if row.setting == setting and row.learned is not None]
        if not members:
            continue
        read = {
            key: complete([getattr(row, key) for row in members])
            for key in ("learned", "forgotten", "forgotten_equal")
        }
        series = {key: values for key, values in read.items() if values}
        means = {key: statistics.mean(values) for key, values in series.items()}
        spread = {}
        if len(members) > 1:
            spread = {key: statistics.stdev(values) for key, values in series.items()}
        errors = [row.errors for row in members if row.errors]
        groups.append(
            Group(
                setting=setting,
                method=members[0].method,
                lr=_lr(members[0].run),
                runs=len(members),
                learned=means["learned"],
                forgotten=means["forgotten"],
                forgotten_equal=means.get("forgotten_equal"),
                spread=spread,
                # The repetitions share the held-out text, so its error does not average out.
                errors=(
                    (max(e[0] for e in errors), max(e[1] for e in errors))
                    if len(errors) == len(members)
                    else None
                ),
            )
        )
    return groups


def _readings(groups: list[Group]) -> list[Reading]:
    """Every method with two or more learning rates, read at the learning of every other's runs."""
    points: dict[str, list[Group]] = {}
    for group in groups:
        points.setdefault(group.method, []).append(group)
    readings = []
    for method, own in points.items():
        if len({group.lr for group in own}) < 2:
            continue
        low, high = min(g.learned for g in own), max(g.learned for g in own)
        for other in groups:
            if other.method == method:
                continue
            read = between([(g.learned, g.forgotten) for g in own], other.learned)
            noises = complete([_noise(g, other, "forgotten", read=True) for g in own])
            readings.append(
                Reading(
                    method=method,
                    at=other.setting,
                    learned=other.learned,
                    forgotten_read=read,
                    forgotten_measured=other.forgotten,
                    noise=max(noises) if noises else None,
                    reason=""
                    if read is not None
                    else f"outside what runs of {method} learned ({low:.3f} to {high:.3f})",
                )
            )
    return readings


def _noise(a: Group, b: Group, what: str, read: bool = False) -> float | None:
    """Twice the standard error of the difference of two settings, None if it is not known.

    Held-out text and, where there are repetitions, seeds. What is `read` at equal learning
    inherits the error of what was learned too, through the slope of forgetting against learning.
    """
    squares = 0.0
    for group in (a, b):
        if group.errors is None:
            return None
        learned_error, forgotten_error = group.errors
        if what == "learned":
            squares += learned_error**2
        else:
            squares += forgotten_error**2
        if read and group.learned > 0:
            squares += (group.forgotten / group.learned * learned_error) ** 2
        squares += group.spread.get(what, 0.0) ** 2 / group.runs
    return NOISE * math.sqrt(squares)


def _verdict(
    groups: list[Group], rows: list[Row], level: float | None, readings: list[Reading]
) -> list[str]:
    if len(groups) < 2:
        return ["Fewer than two of these settings have finished a stage: nothing to compare yet."]
    said = []
    repeated = [group for group in groups if group.runs > 1]
    if not repeated:
        said.append(
            "Every setting was run with one seed, so how far these numbers move from seed to seed "
            "is not known; “noise” below is that of the held-out text alone."
        )
    elif len(repeated) < len(groups):
        said.append(
            "Only some settings were repeated with other seeds; for the rest, “noise” below is "
            "that of the held-out text alone."
        )
    else:
        counts = sorted({group.runs for group in groups})
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        said.append(
            f"Each setting was run with {seeds} seeds: numbers are means, and “noise” below is "
            "that of held-out text and seeds together."
        )
    if any(group.errors is None for group in groups):
        said.append(
            "Some evaluations carry no standard error, so some differences are stated without "
            "saying whether they exceed the noise."
        )
    if any(not row.run.finished for row in rows):
        said.append("Some runs are unfinished: their numbers are those of the stages so far.")
    said += [_pair(*pair, level) for pair in _pairs(groups)]
    for reading in readings:
        gap = _gap(reading)
        if gap is None:
            continue
        said.append(
            f"Between learning rates: at what {reading.at} learned ({reading.learned:.3f}), "
            f"{reading.method} forgets {reading.forgotten_read:.3f}, and {reading.at} forgot "
            f"{reading.forgotten_measured:.3f}: {_difference(gap, reading.noise)}."
        )
    return said


def _headline(groups: list[Group], readings: list[Reading]) -> str:
    """What is decided at equal learning, by the reading between learning rates where there is one
    (it compares ends of whole sequences), else by the reading along the curves."""
    told = []
    for reading in readings:
        gap = _gap(reading)
        if gap is not None:
            told.append((reading.at, reading.method, gap, reading.noise))
    seeds = "one seed" if all(group.runs == 1 for group in groups) else "means over seeds"
    how = f"read between learning rates, {seeds}"
    if not told:
        how = f"read along each run, {seeds}"
        for first, second in _pairs(groups):
            gap = _equal_gap(first, second)
            if gap is not None:
                noise = _noise(first, second, "forgotten_equal", read=True)
                told.append((second.setting, first.setting, gap, noise))
    if not told:
        return "No two of these settings can be read at equal learning."
    decided = [
        f"{a} forgot {_difference(gap, noise, bare=True)} than {b}"
        for a, b, gap, noise in told
        if noise is not None and not _within(gap, noise)
    ]
    unknown = sum(noise is None for *_, noise in told)
    rest = len(told) - len(decided) - unknown
    parts = []
    if decided:
        parts.append(f"At equal learning ({how}), beyond the noise: {'; '.join(decided)}.")
        if rest:
            parts.append(f"{_count(rest, 'other comparison')} within the noise.")
    elif rest:
        parts.append(
            f"At equal learning ({how}), no difference in forgetting exceeds the "
            f"noise ({_count(rest, 'comparison', verb=False)})."
        )
    if unknown:
        parts.append(f"{_count(unknown, 'comparison')} of unknown noise.")
    return " ".join(parts)


def _count(number: int, noun: str, verb: bool = True) -> str:
    words = f"{number} {noun}" + ("" if number == 1 else "s")
    return words + (" is" if number == 1 else " are") * verb


def _pairs(groups: list[Group]) -> list[tuple[Group, Group]]:
    """The comparisons to tell: different methods at one learning rate; if there is no such pair,
    every setting against the first."""
    pairs = [(a, b) for a, b in combinations(groups, 2) if a.method != b.method and a.lr == b.lr]
    return pairs or [(groups[0], group) for group in groups[1:]]


def _gap(reading: Reading) -> float | None:
    if reading.forgotten_read is None:
        return None
    return reading.forgotten_measured - reading.forgotten_read


def _equal_gap(first: Group, second: Group) -> float | None:
    if first.forgotten_equal is None or second.forgotten_equal is None:
        return None
    return second.forgotten_equal - first.forgotten_equal


def _pair(first: Group, second: Group, level: float | None) -> str:
    learned = second.learned - first.learned
    forgot = second.forgotten - first.forgotten
    learned_noise = _noise(first, second, "learned")
    forgot_noise = _noise(first, second, "forgotten")
    a, b = first.setting, second.setting
    if first.lr == second.lr:
        a, b = first.method, f"{second.method} (both lr {short_float(first.lr)})"
    text = (
        f"Against {a}, {b} learned {_difference(learned, learned_noise)}, and forgot "
        f"{_difference(forgot, forgot_noise)}."
    )
    both = not _within(learned, learned_noise) and not _within(forgot, forgot_noise)
    if both and learned * forgot > 0:
        size = "smaller" if learned < 0 else "larger"
        text += f" A {size} learning rate moves both the same way."
    gap = _equal_gap(first, second)
    if gap is None:
        return text + " They cannot be read at equal learning."
    noise = _noise(first, second, "forgotten_equal", read=True)
    return text + f" At equal learning ({level:.3f}) it forgot {_difference(gap, noise)}."


def _within(difference: float, noise: float | None) -> bool:
    return noise is not None and abs(difference) < noise


def _difference(difference: float, noise: float | None, bare: bool = False) -> str:
    size = f"{abs(difference):.3f}"
    word = "less" if difference < 0 else "more"
    if bare:
        return f"{size} {word}"
    if float(size) == 0:
        return "the same"
    if noise is None:
        return f"{size} {word} (noise unknown)"
    if _within(difference, noise):
        return f"{size} {word}, within the noise of the evaluation (±{noise:.3f})"
    return f"{size} {word} (noise ±{noise:.3f})"


def _warnings(rows: list[Row]) -> list[str]:
    found = []
    recipes = [_flat(row.run.recipe) for row in rows]
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [repr(recipe.get(key)) for recipe in recipes]
        if not _is_free(key) and len(set(values)) > 1:
            each = "; ".join(
                f"{row.run.name}: {_plain(recipe.get(key))}"
                for row, recipe in zip(rows, recipes, strict=True)
            )
            found.append(f"The runs differ in {key} ({each}), so a difference may come from that.")
    heldout = {_heldout(row.run) for row in rows} - {None}
    if len(heldout) > 1:
        found.append("The runs were evaluated on different held-out text: losses do not compare.")
    first = rows[0].run.matrix
    for row in rows[1:]:
        matrix = row.run.matrix
        for domain in first.domains:
            mine = matrix.value(0, domain) if domain in matrix.domains else None
            theirs = first.value(0, domain)
            if mine is not None and theirs is not None and abs(mine - theirs) > 1e-3:
                found.append(
                    f"{row.run.name} and {rows[0].run.name} do not start from the same loss on "
                    f"{domain} ({mine:.3f} and {theirs:.3f}): not the same model or held-out text."
                )
    hardware = {repr(row.run.environment.get("hardware")) for row in rows}
    engines = {
        repr([row.run.environment.get(key) for key in ("engine", "precision", "ranks")])
        for row in rows
    }
    if len(hardware) > 1 or len(engines) > 1:
        found.append(
            "The runs differ in hardware, engine, precision or ranks: speeds do not compare."
        )
    for row in rows:
        found += [f"{row.run.name}: {warning}" for warning in row.run.warnings]
        if not row.run.finished:
            done = max(row.run.evaluated, 0)
            found.append(f"{row.run.name}: {done} of {row.run.matrix.last} stages evaluated.")
        for domain, record in row.run.bad_lines.items():
            found.append(
                f"{row.run.name}: {record.get('count')} unreadable line(s) of {domain} skipped."
            )
    return found


def _learned_something(row: Row) -> bool:
    return row.learned is not None and row.learned > 0


def _why_not(row: Row, level: float | None) -> str:
    if row.learned is None:
        return "no stage evaluated yet"
    if row.learned <= 0:
        return "learned nothing"
    return f"its curve does not pass {number(level)}"


def _heldout(run: Run) -> str | None:
    """The digests of the held-out text, as one string."""
    try:
        manifest = json.loads((run.path / "heldout" / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return json.dumps(manifest.get("files", manifest), sort_keys=True)


def _is_free(key: str) -> bool:
    stage_rate = key.startswith("stages.") and key.endswith(".lr")
    return key.split(".")[0] in FREE or key in ALSO_FREE or stage_rate


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested keys as dotted ones; lists of mappings by index, other lists as they are."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return short_float(value) if isinstance(value, float) and 0 < value < 1e-2 else str(value)


def _lr(run: Run) -> float:
    return float((run.recipe.get("optimizer") or {}).get("lr") or 0.0)


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


def _table_row(row: Row, colour: str) -> dict:
    done = f", {max(row.run.evaluated, 0)} of {row.run.matrix.last} stages"
    return {
        "number": row.number,
        "colour": colour,
        "label": row.label,
        "name": row.run.name + ("" if row.run.finished else done),
        "learned": signed(row.learned),
        "forgotten": signed(row.forgotten),
        "equal": signed(row.forgotten_equal),
        "reason": row.reason,
        "final_loss": number(row.final_loss),
        "tokens_per_second": number(row.tokens_per_second, 0),
        "step_ratio": "—" if row.step_ratio is None else f"{row.step_ratio:.2f} x",
    }


def _group_cells(group: Group) -> list[str]:
    def cell(key: str) -> str:
        mean = signed(getattr(group, key))
        return f"{mean} ± {group.spread[key]:.3f}" if key in group.spread else mean

    cells = [cell(key) for key in ("learned", "forgotten", "forgotten_equal")]
    return [group.setting, str(group.runs), *cells]


def _reading_cells(reading: Reading) -> list[str]:
    gap = _gap(reading)
    return [
        reading.method,
        reading.at,
        signed(reading.learned),
        signed(reading.forgotten_read),
        signed(reading.forgotten_measured),
        reading.reason if gap is None else _difference(gap, reading.noise),
    ]


def _as_json(comparison: Comparison) -> dict:
    rows = [
        {key: value for key, value in vars(row).items() if key != "run"} | {"name": row.run.name}
        for row in comparison.rows
    ]
    return {
        "runs": rows,
        "settings": [vars(group) for group in comparison.groups],
        "equal_learning": {"level": comparison.level, "range": comparison.reach},
        "between_learning_rates": [vars(reading) for reading in comparison.readings],
        "headline": comparison.headline,
        "verdict": comparison.verdict,
        "warnings": comparison.warnings,
        "definitions": DEFINITIONS,
    }
