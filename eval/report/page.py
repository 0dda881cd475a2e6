"""The page of one run: `report/index.html`, `report.json` and the figures as SVG files."""

import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.analysis.accuracy import DEFINITIONS as ACCURACY_DEFINITIONS
from eval.analysis.accuracy import accuracy_matrix, estimates
from eval.analysis.curves import POINT_DEFINITIONS
from eval.analysis.load import Run, StageTime, load_run
from eval.analysis.log import PARTS
from eval.analysis.matrix import DEFINITIONS, METRICS, learning_curve
from eval.analysis.mixtures import domain_shares
from eval.analysis.points import stage_lengths
from eval.analysis.targets import targets_of
from eval.analysis.text import number, percent, short_float, signed, signed_percent
from eval.report import cells, run_plots, tasks, tuning
from eval.report.drawing import colours_of
from eval.report.end_tasks import end_tasks_of
from pipeline.checkpoint import replace_file

NAMES = {
    "acc": "ACC (mean final loss)",
    "bwt": "Backward transfer",
    "forgetting": "Forgetting",
    "fwt": "Forward transfer",
    "base_retention": "Base retention",
    "learned": "Learned",
    "forgotten": "Forgotten",
}
KINDS = {
    "q": "Query",
    "k": "Key",
    "v": "Value",
    "o": "Attention output",
    "ffn_in": "FFN, first layer",
    "ffn_out": "FFN, second layer",
}


def write_report(run_dir: Path | str) -> Path:
    """Write the report of a run, finished or under way, and return the path of its page.

    Writes index.html (one self-contained file), report.json and the figures into
    `<run_dir>/report`. `UserError` if `run_dir` is not a run folder.
    """
    run = load_run(Path(run_dir))
    figures = {}
    if run.evaluated >= 0:
        figures["domain_curves"] = run_plots.domain_curves(run.matrix)
    if any(step.get("loss") is not None for step in run.log.steps):
        figures["training_loss"] = run_plots.training_loss(run)
    shares = domain_shares(run.log)
    if any(share.last is not None for share in shares):
        figures["domain_training_loss"] = run_plots.domain_training_loss(run)

    learning = tuning.learning_of(run)
    detailed = tuning.has_points(run)
    if detailed:
        colours = colours_of(["run"])
        figures |= tuning.figures({"run": run}, {"run": learning}, colours, {})

    numbers = run_numbers(run, learning)
    if end_tasks := end_tasks_of({run.name: [run]}):
        numbers["end_tasks"] = end_tasks.numbers
        numbers["warnings"] += end_tasks.warnings
    overlaps = cells.overlaps(run)
    numbers["overlap_off_diagonal_mean"] = {
        kind: {str(overlap.stage): overlap.mean for overlap in shown}
        for kind, shown in overlaps.items()
    }
    threshold = next((o.get("threshold") for o in run.overlap.values()), None)
    completed, completions = tasks.completions(run)
    scores = accuracy_matrix(run)
    accuracies = (
        None if scores is None else (scores, cells.matrix_cells(scores, percent, signed_percent))
    )
    page = render(
        "run.html.j2",
        title=f"{run.name}: learning and forgetting",
        run=run,
        summary=numbers["summary"],
        warnings=numbers["warnings"],
        losses=cells.losses(run),
        figures=marked(figures),
        points=tasks.tables(run) if detailed else [],
        end_tasks=end_tasks,
        point_definitions=POINT_DEFINITIONS,
        unit=stage_lengths(run.recipe["stages"])[0],
        how_measured=tasks.how_measured(run),
        completed=completed,
        completions=completions,
        overlaps={KINDS.get(kind, kind): shown for kind, shown in overlaps.items()},
        chance_overlap=None if threshold is None else f"{1 - threshold:.2f}",
        metrics=[
            (NAMES[key], _metric(key, value), DEFINITIONS[key])
            for key, value in numbers["metrics"].items()
        ],
        shares=shares,
        corpora=cells.corpora(run),
        accuracies=accuracies,
        accuracy_metrics=accuracy_metrics(run),
        times=_time_table(run.times),
        targets=[target.told() for target in targets_of(run)],
        facts=_facts(run),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        versions="\n".join(f"{k} {v}" for k, v in run.environment.get("versions", {}).items()),
    )
    return write_folder(run.path / "report", page, numbers, figures)


def run_numbers(run: Run, learning: tuning.Learning) -> dict:
    """What report.json holds: every number of the page, with definitions and warnings."""
    matrix = run.matrix
    so_far = matrix.until(max(run.evaluated, 0))
    curve = learning_curve(matrix)
    metrics = {key: function(so_far) for key, function in METRICS.items()}
    metrics["learned"], metrics["forgotten"] = curve[-1] if len(curve) > 1 else (None, None)
    return {
        "name": run.name,
        "summary": summary(run),
        "finished": run.finished,
        "warnings": run.warnings + _missing(run),
        "stages": matrix.stages,
        "domains": matrix.domains,
        "trained": matrix.trained,
        "loss": matrix.values,
        "stderr": run.stderr,
        "unigram_loss": run.unigram,
        "metrics": metrics,
        "definitions": {key: DEFINITIONS[key] for key in metrics},
        "tasks": _task_numbers(run),
        "learning_curve": curve,
        "points": tuning.numbers(run, learning),
        "point_definitions": POINT_DEFINITIONS,
        "domains_of_stages": [vars(share) for share in domain_shares(run.log)],
        "corpora": run.log.corpora,
        "time": [vars(time) for time in run.times],
        "environment": run.environment,
        "recipe": run.recipe,
    }


def _task_numbers(run: Run) -> dict | None:
    matrix = accuracy_matrix(run)
    if matrix is None:
        return None
    return {
        "tasks": matrix.domains,
        "accuracy": matrix.values,
        "metrics": {key: vars(found) for key, found in estimates([matrix]).items()},
        "definitions": ACCURACY_DEFINITIONS,
    }


def accuracy_metrics(run: Run) -> list[tuple[str, str, str, str]]:
    """(name, value, interval, definition) of the metrics of the tasks' accuracies, in %."""
    matrix = accuracy_matrix(run)
    if matrix is None:
        return []
    done = max((t for t, row in enumerate(matrix.values) if None not in row), default=0)
    found = []
    for key, estimate in estimates([matrix.until(done)]).items():
        write = percent if key == "acc" else signed_percent
        interval = "" if estimate.interval is None else " to ".join(map(write, estimate.interval))
        name, _, definition = ACCURACY_DEFINITIONS[key].partition(": ")
        found.append((name, write(estimate.value), interval, definition))
    return found


def summary(run: Run) -> str:
    """What the run shows, in plain words and numbers."""
    matrix, stage = run.matrix, run.evaluated
    if run.stopped and stage <= 0:
        return f"{run.stopped} No stage was finished."
    if stage < 0:
        return "This run has started; nothing has been evaluated yet."
    if stage == 0 and not any(point.step for point in run.points):
        return "Only the model before training has been evaluated yet."
    words = [run.stopped] if run.stopped else []
    words += [f"After {stage} of {matrix.last} stage{'s' * (matrix.last > 1)}:"] if stage else []
    gains = {
        domain: gain
        for domain, own in matrix.trained.items()
        if own <= stage and (gain := matrix.gain(domain, 0, own)) is not None
    }
    if gains:
        each = _each({d: -gain for d, gain in gains.items()})
        mean = sum(gains.values()) / len(gains)
        direction = "lower" if mean >= 0 else "higher"
        words.append(
            f"right after its own stage, a domain's held-out loss was on average {abs(mean):.3f} "
            f"nats {direction} than before training ({each})."
        )
    lost = {}
    for domain in matrix.old(stage):
        best = matrix.best_row(domain, stage)
        gain = None if best is None else matrix.gain(domain, best, stage)
        if gain is not None:
            lost[domain] = -gain
    if lost:
        mean = sum(lost.values()) / len(lost)
        each = _each(lost)
        before = "higher than at its best" if mean >= 0 else "lower than its best until then"
        words.append(
            "The loss on what the model could forget in the latest stage is now on average "
            f"{abs(mean):.3f} nats {before} ({each})."
        )
    if matrix.alone and stage:
        words.append(
            "Each stage has a model of its own, so that none forgets what another one has learned: "
            "of a domain that is trained counts the row of its own stage."
        )
    return " ".join([*words, *tuning.sentences(run)])


def _each(changes: dict[str, float]) -> str:
    """Every domain's change; of more than five, the least and the greatest."""
    said = {domain: f"{domain} {signed(change)}" for domain, change in changes.items()}
    if len(said) <= 5:
        return ", ".join(said.values())
    ordered = sorted(changes, key=lambda domain: changes[domain])
    return f"from {said[ordered[0]]} to {said[ordered[-1]]}"


def render(template: str, **content: object) -> str:
    """Fill one of the templates, everything escaped but what is marked as markup."""
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> Environment:
    """One for all pages of a process: to compile a template takes longer than to fill it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed}
    environment.filters |= {"percent": percent, "signed_percent": signed_percent}
    environment.filters["rate"] = short_float
    # A learning rate such as 1e-3 must not break at its hyphen.
    environment.filters["unbroken"] = lambda text: re.sub(r"(?<=\de)-(?=\d)", "\u2011", text)
    return environment


def marked(figures: dict[str, str]) -> dict[str, Markup]:
    """Figures for a template, in which those that were not drawn are empty."""
    return defaultdict(Markup, {name: Markup(svg) for name, svg in figures.items()})


def write_folder(folder: Path, page: str, numbers: dict, figures: dict[str, str]) -> Path:
    """Write page, numbers and figures, each in one stroke for whoever reads meanwhile; the page
    last, so that it never names what is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        replace_file(folder / f"{name}.svg", svg + "\n")
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    replace_file(folder / "report.json", text + "\n")
    path = folder / "index.html"
    replace_file(path, page)
    return path


def _metric(key: str, value: float | None) -> str:
    return number(value) if key == "acc" else signed(value)


def _missing(run: Run) -> list[str]:
    found = []
    for domain, record in run.log.bad_lines.items():
        example = next(iter(record.get("examples") or []), None)
        first = (
            ""
            if not example
            else (
                f", the first in {example.get('file')}, line {example.get('line')}: "
                f"{example.get('reason')}"
            )
        )
        found.append(f"{record.get('count')} unreadable line(s) of {domain} were skipped{first}.")
    found += tuning.too_long(run)
    found += tasks.warnings(run)
    missing = [
        f"{t} ({run.matrix.stages[t]})"
        for t, row in enumerate(run.matrix.values)
        if all(value is None for value in row)
    ]
    if missing:
        found.append(f"Not yet evaluated: stage {', '.join(missing)}.")
    elif any(value is None for row in run.matrix.values for value in row):
        found.append("Some domains were not evaluated after every stage.")
    return found


def _time_table(times: list[StageTime]) -> list[dict]:
    def cells(time: StageTime) -> list[str]:
        return [
            f"{time.steps:,}",
            f"{time.tokens:,}",
            number(time.tokens_per_second, 0),
            number(None if time.step_seconds is None else 1000 * time.step_seconds, 1),
            " / ".join(number(time.percents.get(part), 0) for part in PARTS),
            number(time.tflops, 2) + ("" if time.mfu is None else f" ({time.mfu:.0%})"),
            number(time.peak_memory_gb, 1),
            number(time.seconds, 1),
            number(time.publish_seconds, 1),
            number(time.eval_seconds, 1),
        ]

    rows = [
        {
            "name": f"{time.stage} {time.name}" + ("" if time.finished else " (under way)"),
            "cells": cells(time),
            "total": False,
        }
        for time in times
    ]
    if len(times) > 1:
        total = [f"{sum(t.steps for t in times):,}", f"{sum(t.tokens for t in times):,}"]
        sums = [
            number(sum(getattr(t, key) or 0 for t in times), 1)
            for key in ("seconds", "publish_seconds", "eval_seconds")
        ]
        cells_of_all = [*total, *[""] * 5, *sums]
        rows.append({"name": "all", "cells": cells_of_all, "total": True})
    return rows


def _facts(run: Run) -> list[tuple[str, str]]:
    environment, mask = run.environment, run.recipe.get("mask") or {}
    optimizer = run.recipe.get("optimizer") or {}
    model = run.recipe.get("model") or {}
    hardware = environment.get("hardware") or {}
    rows = environment.get("masked_rows") or {}
    parameters = environment.get("parameters")
    masked = "none"
    if mask.get("enabled"):
        masked = f"{mask.get('criterion', 'output')} criterion, T = {mask.get('threshold')}"
        if environment.get("masked_linears"):
            masked += f", {environment['masked_linears']} linear layers"
        if rows.get("total"):
            masked += f", {rows.get('kept', 0):,} of {rows['total']:,} rows kept each step"
    commit = str(environment.get("commit") or "")[:12]
    if commit and environment.get("dirty"):
        commit += ", with uncommitted changes"
    memory = f"{hardware['memory_gb']} GB" if "memory_gb" in hardware else None
    cores = f"{hardware['cores']} cores" if "cores" in hardware else None
    parts = [hardware.get("device"), hardware.get("name"), cores, memory]
    facts = {
        "Model": str(model.get("path") or "built from the recipe")
        + (f", {parameters:,} parameters" if parameters else ""),
        "Mask": masked,
        "Learning rate": short_float(optimizer["lr"]) if optimizer.get("lr") else None,
        "Seed": run.recipe.get("seed"),
        "Engine": environment.get("engine"),
        "Precision": environment.get("precision"),
        "Ranks": environment.get("ranks"),
        "Hardware": ", ".join(str(part) for part in parts if part) or None,
        "Started": environment.get("started"),
        "Commit": commit or None,
        "Command": environment.get("command"),
    }
    return [(key, str(value)) for key, value in facts.items() if value is not None]
