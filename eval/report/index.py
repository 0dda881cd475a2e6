"""The page of all runs of a folder: `index.html` and its numbers, `index.json`.

The page is one file without outside resources. Its own script (sorting, filtering) and style are
the only ones that it allows (a content security policy by their digests); without the script
everything is there, unsorted.
"""

import base64
import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from math import hypot
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from markupsafe import Markup

from eval.analysis.falls import HUMANEVAL, Fall, describe, falls, measures
from eval.analysis.labels import methods_of, without_seed
from eval.analysis.load import Run
from eval.analysis.matrix import acc, learning_curve
from eval.analysis.points import NOISE
from eval.analysis.text import printable, signed, signed_percent
from eval.report.page import render
from pipeline.checkpoint import replace_file

TEMPLATES = Path(__file__).parent / "templates"
WIDTH, HEIGHT = 84, 22  # of a trend, in pixels
Trend = list[tuple[int, float, float | None]]
"""(stage, value, standard error) at the ends of the stages."""


@dataclass
class Entry:
    """A folder, as the index shows it."""

    folder: str  # below the root, with slashes
    state: Literal["finished", "unfinished", "stopped", "damaged", "unreadable"]
    problems: list[str] = field(default_factory=list)  # damage, and what could not be evaluated
    name: str = ""
    method: str = ""
    model: str = ""
    setting: str = ""  # the same for runs of one recipe but for seed and name
    started: str = ""
    stage: int = -1  # the last that was evaluated
    stages: list[str] = field(default_factory=list)  # from 0
    learned: float | None = None
    forgotten: float | None = None
    final_loss: float | None = None
    scores: dict[str, Trend] = field(default_factory=dict)
    losses: dict[str, Trend] = field(default_factory=dict)  # by domain
    falls: list[Fall] = field(default_factory=list)
    page: bool = False  # whether the run has a page of its own


@dataclass
class Series:
    """One number of one setting at the end of each of its finished runs that has it, by time."""

    setting: str
    what: str
    kind: Literal["score", "loss"]
    runs: list[str]  # folders
    values: list[float]
    worse: list[bool]  # than the run before, beyond the noise
    change: float  # of the last
    noise: float | None


def entry_of(run: Run, folder: str) -> Entry:
    """Everything about a run that its folder's files say."""
    so_far = run.matrix.until(max(run.evaluated, 0))
    curve = learning_curve(run.matrix)
    learned, forgotten = curve[-1] if len(curve) > 1 else (None, None)
    ends = [point for point in run.points if point.step is None]
    scores: dict[str, Trend] = {}
    losses: dict[str, Trend] = {}
    for point in ends:
        for what, score in measures(point).items():
            scores.setdefault(what, []).append((point.stage, score.value, score.stderr))
        for domain, value, error in zip(run.matrix.domains, point.loss, point.stderr, strict=True):
            if value is not None:
                losses.setdefault(domain, []).append((point.stage, value, error))
    tasks = [text for point in run.points for text in point.damage]
    whole: Literal["finished", "unfinished"] = "finished" if run.finished else "unfinished"
    return Entry(
        folder=folder,
        state="damaged" if run.damage else "stopped" if run.stopped else whole,
        problems=list(dict.fromkeys([run.stopped] * bool(run.stopped) + run.damage + tasks)),
        name=run.name,
        method=methods_of([run])[0],
        model=str((run.recipe.get("model") or {}).get("path") or "from scratch"),
        setting=hashlib.sha256(without_seed(run).encode()).hexdigest()[:12],
        started=str(run.environment.get("started") or ""),
        stage=run.evaluated,
        stages=run.matrix.stages,
        learned=learned,
        forgotten=forgotten,
        final_loss=acc(so_far),
        scores=scores,
        losses=losses,
        falls=falls(run),
    )


def from_json(content: dict[str, Any]) -> Entry:
    """What `asdict` made of an entry. Raises TypeError where it is of another kind."""
    known = [Fall(**fall) for fall in content.get("falls", [])]
    return Entry(**{**content, "falls": known})


def over_time(entries: list[Entry]) -> list[Series]:
    """Settings that finished more than once, run after run."""
    settings: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.state == "finished":
            settings[entry.setting].append(entry)
    found = []
    for repeated in settings.values():
        ordered = sorted(repeated, key=lambda entry: (_moment(entry.started), entry.folder))
        kinds: tuple[tuple[Literal["score", "loss"], dict[str, None]], ...] = (
            ("score", {what: None for entry in ordered for what in entry.scores}),
            ("loss", {what: None for entry in ordered for what in entry.losses}),
        )
        for kind, names in kinds:
            for what in names:
                found += _series(kind, what, ordered)
    return found


def _series(kind: Literal["score", "loss"], what: str, ordered: list[Entry]) -> list[Series]:
    trends = [(e, (e.scores if kind == "score" else e.losses).get(what)) for e in ordered]
    # What is missing there (skipped, failed, not yet measured) is not that of an earlier stage.
    ends = [(e, trend[-1]) for e, trend in trends if trend and trend[-1][0] == len(e.stages) - 1]
    if len(ends) < 2:
        return []
    worse, change, noise = [False], 0.0, None
    for (_, (_, before, error)), (_, (_, now, other)) in pairwise(ends):
        change = now - before
        noise = None if error is None or other is None else NOISE * hypot(error, other)
        loss = change if kind == "loss" else -change
        worse.append(noise is not None and loss > noise)
    label = ends[-1][0].method
    folders, values = [e.folder for e, _ in ends], [end[1] for _, end in ends]
    return [Series(label, what, kind, folders, values, worse, change, noise)]


def write_index(root: Path, entries: list[Entry], made: str, notes: list[str]) -> Path:
    """Write `index.json` and `index.html` of a folder of runs, each in one stroke; the page.

    Args:
        made: the time, as the page shows it.
        notes: what there is to say about the whole (evaluations that are left for the next time).
    """
    series = over_time(entries)
    numbers = {
        "made": made,
        "notes": notes,
        "runs": [asdict(entry) for entry in entries],
        "over_time": [asdict(one) for one in series],
    }
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    replace_file(root / "index.json", text + "\n")
    page = root / "index.html"
    replace_file(page, _page(root, entries, series, made, notes))
    return page


def _page(
    root: Path, entries: list[Entry], series: list[Series], made: str, notes: list[str]
) -> str:
    style, own, script = (
        (TEMPLATES / name).read_text(encoding="utf-8")
        for name in ("base.css", "index.css", "index.js")
    )
    style += own
    names = list(dict.fromkeys(what for entry in entries for what in entry.scores))
    newest = sorted(entries, key=lambda entry: (-_moment(entry.started), entry.folder))
    rows = [_row(entry, names) for entry in newest]
    return render(
        "index.html.j2",
        title=f"Runs in {printable(root.resolve().name)}",
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
        rows=rows,
        names=names,
        states={state: count for state in STATES if (count := _count(entries, state))},
        attention=[row for row in rows if row["problems"] or row["fallen"]],
        series=[_series_row(one) for one in series],
        made=made,
        notes=notes,
    )


STATES = ("finished", "unfinished", "stopped", "damaged", "unreadable")


def _count(entries: list[Entry], state: str) -> int:
    return sum(entry.state == state for entry in entries)


def _row(entry: Entry, names: list[str]) -> dict[str, Any]:
    fallen: dict[str, list[Fall]] = defaultdict(list)
    for fall in entry.falls:
        if fall.kind == "score":
            fallen[fall.what].append(fall)
    forgotten = {fall.what for fall in entry.falls if fall.kind == "loss"}
    benchmarks = {n: trend for n, trend in entry.scores.items() if n != HUMANEVAL}
    means = []
    if len({tuple(stage for stage, *_ in trend) for trend in benchmarks.values()}) == 1:
        stages = zip(*benchmarks.values(), strict=True)
        means = [sum(value for _, value, _ in at) / len(at) for at in stages]
    return {
        "entry": entry,
        "name": printable(entry.name or entry.folder),
        "folder": printable(entry.folder),
        "href": f"./{quote(entry.folder)}/report/index.html" if entry.page else None,
        "moment": _moment(entry.started),
        "date": entry.started[:16].replace("T", " "),
        "problems": [printable(text) for text in entry.problems],
        "fallen": [describe(f, entry.stages) for f in entry.falls if f.kind == "score"],
        "forgotten": ", ".join(map(printable, sorted(forgotten))),
        "average": _cell([100 * mean for mean in means]),
        "cells": [_score_cell(entry.scores.get(n, []), fallen.get(n, []), entry) for n in names],
    }


def _score_cell(trend: Trend, fallen: list[Fall], entry: Entry) -> dict[str, Any]:
    cell = _cell([100 * value for _, value, _ in trend], [f"stage {stage}" for stage, *_ in trend])
    cell["fell"] = "; ".join(describe(fall, entry.stages) for fall in fallen)
    if len(trend) > 1:
        cell["change"] = signed_percent(trend[-1][1] - trend[0][1])
    return cell


def _series_row(one: Series) -> dict[str, Any]:
    factor = 100 if one.kind == "score" else 1
    cell = _cell([factor * value for value in one.values], [printable(r) for r in one.runs])
    show = signed_percent if one.kind == "score" else signed
    fell = [printable(run) for run, worse in zip(one.runs, one.worse, strict=True) if worse]
    noise = "not known" if one.noise is None else show(one.noise).lstrip("+")
    return {
        "what": printable(one.what),
        "unit": "%" if one.kind == "score" else "nats",
        "setting": printable(one.setting),
        "runs": len(one.runs),
        "cell": cell,
        "digits": 1 if one.kind == "score" else 3,
        "change": show(one.change),
        "noise": noise,
        "fell": fell,
    }


def _cell(values: list[float], names: list[str] | None = None) -> dict[str, Any]:
    """A number with the line that led to it."""
    labels = names or [f"stage {i}" for i in range(len(values))]
    said = ", ".join(f"{n} {v:.3g}" for n, v in zip(labels[-12:], values[-12:], strict=True))
    return {
        "value": values[-1] if values else None,
        "line": _line(values) if len(values) > 1 else "",
        "said": said,
        "fell": "",
        "change": "",
    }


def _line(values: list[float]) -> str:
    """The points of a polyline through the values, in a box of WIDTH x HEIGHT."""
    low, high = min(values), max(values)
    step = (WIDTH - 6) / (len(values) - 1)
    room = HEIGHT - 6
    points = []
    for i, value in enumerate(values):
        height = (value - low) / (high - low) if high > low else 0.5
        points.append(f"{3 + i * step:.1f},{HEIGHT - 3 - height * room:.1f}")
    return " ".join(points)


def _moment(started: str) -> float:
    """Seconds since 1970; 0 for what is no date."""
    try:
        moment = datetime.fromisoformat(started)
        zone = moment.tzinfo or timezone.utc
        return moment.replace(tzinfo=zone).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
