"""The figures of the reports, each as one SVG string.

Figures are deterministic to the byte (fixed hash salt, no date), keep their text as text, and have
a white ground of their own, so that they read the same on a light and on a dark page.
"""

import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from eval.analysis.load import Run
from eval.analysis.matrix import Curve, Matrix
from eval.report.cells import change_of

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#B07D00",
    "#3A9BD9",
    "#6A3D9A",
    "#555555",
    "#882255",
    "#7A8B00",
)
"""Okabe and Ito's colour-blind safe palette, its yellow and sky blue darkened for thin lines."""

UNIT_LABELS = {
    "epochs": "epochs",
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "stages": "stages",
}
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
SHRINK, GROW = 0.6, 1.1  # a figure follows the screen's width between these shares of its size
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.grid": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "grid.color": PALE,
}


@dataclass
class Mark:
    """A dot of a figure, with its standard errors (None: not known) and what stands beside it."""

    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    text: str = ""


@matplotlib.rc_context(STYLE)
def domain_curves(matrix: Matrix) -> str:
    """Change of each domain's loss since stage 0 over the stages; a ring marks its own stage."""
    figure = _figure(5.7, 3.8)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, lw=1)
    ends: list[tuple[float, float, str, str]] = []
    for domain, colour in zip(matrix.domains, _colours(len(matrix.domains)), strict=True):
        points = [
            (t, change)
            for t in range(len(matrix.stages))
            if (change := change_of(matrix, t, domain)) is not None
        ]
        if not points:
            continue
        dashed = "--" if domain in matrix.base else "-"
        axes.plot(*zip(*points, strict=True), color=colour, lw=2, ls=dashed, marker="o", ms=4)
        own = [(t, change) for t, change in points if matrix.trains(t, domain)]
        if own:
            axes.plot(*zip(*own, strict=True), "o", ms=11, mfc="none", mec=colour, mew=2)
        ends.append((*points[-1], domain, colour))
    last = matrix.last
    axes.set(ylabel="change of loss, nats", xlim=(-0.15, last + 0.15))
    ticks = [f"{t}\n{_short(name, 10)}" for t, name in enumerate(matrix.stages)]
    if last > 4:  # no room side by side
        ticks = [f"{t} {_short(name, 16)}" for t, name in enumerate(matrix.stages)]
        axes.tick_params(axis="x", rotation=40)
    axes.set_xticks(range(last + 1), ticks)
    if last > 4:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.grid(axis="y")
    _end_labels(axes, ends, at=last + 0.22)
    return _svg(figure, "domain_curves", "Change of the loss of each domain over the stages")


@matplotlib.rc_context(STYLE)
def training_loss(run: Run) -> str:
    """Training loss over the steps of all stages: raw, and as a running median."""
    figure = _figure(5.7, 3.2)
    axes = figure.subplots()
    start = 0
    bounds, names = [], []
    palette = _colours(len(run.matrix.domains))
    for stage in sorted({step["stage"] for step in run.log.steps}):
        steps = [s for s in run.log.steps if s["stage"] == stage and s.get("loss") is not None]
        if not steps:
            continue
        x = np.array([start + s["step"] for s in steps], dtype=float)
        y = np.array([s["loss"] for s in steps], dtype=float)
        end = int(x[-1])
        x, y = _thin(x), _thin(y)
        name = str(steps[0].get("domain", stage))
        known = [d for d in run.matrix.domains if d in name.split("+")]
        colour = palette[run.matrix.domains.index(known[0])] if known else INK
        axes.plot(x, y, color=colour, lw=0.8, alpha=0.35)
        axes.plot(x, _running_median(y, max(3, len(y) // 12)), color=colour, lw=2)
        bounds.append((start, end))
        start = end
        names.append((f"{stage}  {_short(name, 14)}", colour))
    for (low, high), (name, colour) in zip(bounds, names, strict=True):
        centre = (low + high) / 2
        axes.annotate(
            name, (centre, 1.02), xycoords=("data", "axes fraction"), color=colour, ha="center"
        )
        if low:
            axes.axvline(low, color=PALE, lw=1.2, zorder=0)
    axes.set(xlabel="optimizer step, over all stages", ylabel="training loss, nats")
    axes.set_xlim(0, max(start, 1))
    axes.grid(axis="y")
    return _svg(figure, "training_loss", "Training loss over the steps")


@matplotlib.rc_context(STYLE)
def trade_off(
    curves: dict[str, Curve],
    colours: dict[str, str],
    labels: dict[str, str],
    level: float | None,
    reach: list[float] | None,
    numbered: bool = False,
    errors: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> str:
    """Forgetting against learning: a line per run, a dot per stage, a large dot at its end.

    `level` is the amount of learning at which the runs are read, `reach` the range in which all of
    them can be. `numbered` writes the runs' names, then short numbers, into their last dots; a run
    without a label gets none. `errors` are the standard errors of the dots.
    """
    figure = _figure(5.9, 4.4)
    axes = figure.subplots()
    ends = []
    for name, curve in curves.items():
        if not curve:
            continue
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=colours[name], lw=1.6, marker="o", ms=4, alpha=0.9)
        for point, error in zip(curve, (errors or {}).get(name, ()), strict=False):
            _error_bars(axes, Mark(*point, *(error or (None, None))), colours[name])
        dot = 14 if numbered else 11
        axes.plot(x[-1], y[-1], "o", ms=dot, color=colours[name], mec="white", mew=1.5, zorder=5)
        if numbered:
            text = axes.text(x[-1], y[-1], name, color="white", size=8, ha="center", zorder=6)
            text.set_verticalalignment("center_baseline")
        if name in labels:
            ends.append((x[-1], y[-1], labels[name], colours[name]))
    if reach:
        axes.axvspan(*reach, color="#f3f3f0", lw=0, zorder=0)
    if level is not None:
        axes.axvline(level, color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"equal learning: {level:.3f}",
            (level, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            color=GREY,
            size=10,
        )
    axes.set(xlabel="learned, nats  (more →)", ylabel="forgotten, nats  (↓ less)")
    axes.axhline(0, color=GREY, lw=0.8)
    axes.grid()
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.1)
    _end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return _svg(figure, "trade_off", "Forgetting against learning, one line per run")


@matplotlib.rc_context(STYLE)
def methods(
    points: dict[str, list[tuple[float, float, str]]],
    colours: dict[str, str],
) -> str:
    """Final points (learned, forgotten, learning rate) of each method, joined across its rates."""
    figure = _figure(5.7, 3.8)
    axes = figure.subplots()
    ends = []
    for place, (method, ordered) in enumerate(points.items()):
        above = place % 2 == 0  # neighbouring lines are labelled on their two outer sides
        ordered = sorted(ordered)
        x, y = [p[0] for p in ordered], [p[1] for p in ordered]
        axes.plot(x, y, color=colours[method], lw=2, marker="o", ms=8, mec="white")
        for learned, forgotten, rate in ordered:
            axes.annotate(
                rate,
                (learned, forgotten),
                xytext=(-6, 6) if above else (6, -13),
                textcoords="offset points",
                ha="right" if above else "left",
                size=9,
                color=colours[method],
            )
        ends.append((x[-1], y[-1], method, colours[method]))
    axes.set(xlabel="learned, nats  (more →)", ylabel="forgotten, nats  (↓ less)")
    axes.grid()
    axes.set_axisbelow(True)
    axes.margins(x=0.16, y=0.14)
    _end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return _svg(figure, "methods", "Final learning and forgetting of each method across its rates")


@matplotlib.rc_context(STYLE)
def over_training(
    name: str,
    panels: Mapping[str, Mapping[str, Sequence[Mark]]],
    colours: Mapping[str, str],
    labels: Mapping[str, str],
    unit: str,
    stages: Sequence[tuple[float, str]],
) -> str:
    """Scores in % over training, a panel each, a line per run: (length, name) of each stage, whose
    boundaries are marked where they are several, and `unit` is that of the lengths."""
    dashes = _dashes(colours, labels)
    labels = _labels_of({k for p in panels.values() for k in p if p[k]}, colours, labels)
    whole = sum(length for length, _ in stages) > 2  # ticks at whole epochs, steps or stages
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(4.6, 3.0 * columns + 0.9 * (columns == 2)), 3.0 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        drawn = {key: marks for key, marks in lines.items() if marks}
        for key, marks in drawn.items():
            colour = colours[key]
            x, y = [mark.x for mark in marks], [mark.y for mark in marks]
            dash: Any = {"ls": dashes[key], "label": labels.get(key)}
            axes.plot(x, y, color=colour, lw=1.8, marker="o", ms=4.5, **dash)
            known = [mark for mark in marks if mark.y_error is not None]
            if len(drawn) > 1 and len(known) == len(marks) > 1:
                low = [mark.y - (mark.y_error or 0) for mark in marks]
                high = [mark.y + (mark.y_error or 0) for mark in marks]
                axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            else:
                for mark in known:
                    _error_bars(axes, mark, colour)
        axes.set_title(f"{title}, %", pad=22 if len(stages) > 1 else 6)
        _stage_bounds(axes, stages)
        axes.set(xlabel=UNIT_LABELS[unit])
        if unit == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y")
        axes.margins(x=0.05, y=0.12)
        low, high = axes.get_ylim()
        room = max(0.0, 2 - (high - low)) / 2  # no panel magnifies less than two points
        axes.set_ylim(max(low - room, -0.05 * (high - low + 2 * room)), high + room)
    if len(colours) > 1 and labels:
        _legend(figure, labels)
    return _svg(figure, name, "Scores over training: " + ", ".join(panels))


@matplotlib.rc_context(STYLE)
def pareto(
    name: str,
    lines: Mapping[str, Sequence[Mark]],
    colours: Mapping[str, str],
    labels: Mapping[str, str],
    axis_labels: tuple[str, str],
) -> str:
    """What was learned (x) against what was kept or lost (y): a line per run through its points,
    with error bars both ways; a ring at its start, a large dot at its end."""
    figure = _figure(5.9, 4.4)
    axes = figure.subplots()
    ends = []
    dashes = _dashes(colours, labels)
    labels = _labels_of({key for key in lines if lines[key]}, colours, labels)
    for key, marks in lines.items():
        if not marks:
            continue
        colour = colours[key]
        x, y = [mark.x for mark in marks], [mark.y for mark in marks]
        axes.plot(x, y, color=colour, ls=dashes[key], lw=1.6, marker="o", ms=4, alpha=0.9)
        for mark in marks:
            _error_bars(axes, mark, colour)
        axes.plot(x[0], y[0], "o", ms=8, mfc="white", mec=colour, mew=1.6, zorder=5)
        axes.plot(x[-1], y[-1], "o", ms=11, color=colour, mec="white", mew=1.5, zorder=5)
        if key in labels:
            ends.append((x[-1], y[-1], labels[key], colour))
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    axes.grid()
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.1)
    for marks in lines.values():
        _mark_texts(axes, marks)
    _end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return _svg(figure, name, f"{axis_labels[1]} against {axis_labels[0]}")


def _mark_texts(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write the text of each mark beside it, those of the two ends first; none over another."""
    width, height = (high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
    written: list[Mark] = []
    for mark in [*marks[:1], *marks[:0:-1]]:
        near = (m for m in written if abs(m.y - mark.y) < 0.05 * height)
        if not mark.text or any(abs(m.x - mark.x) < 0.11 * width for m in near):
            continue
        written.append(mark)
        rises = marks[-1].y > marks[0].y  # the text stands beside the line, not on it
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            xytext=(7, -12) if rises else (7, 7),
            textcoords="offset points",
            size=9,
            zorder=7,
        )


def _dashes(colours: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """Solid for the first line of a colour; dashes, which tell the others of that colour apart
    where each has a label."""
    if len(labels) < len(colours):
        return dict.fromkeys(colours, "-")
    found: dict[str, str] = {}
    for key, colour in colours.items():
        before = sum(colours[other] == colour for other in found)
        found[key] = ("-", "--", ":", "-.")[before % 4]
    return found


def _labels_of(
    drawn: Collection[str], colours: Mapping[str, str], labels: Mapping[str, str]
) -> dict[str, str]:
    """The labels of the lines that are drawn. Where only some lines have one, it stands for their
    colour: if its own line is missing, another of that colour takes it."""
    found = {}
    for key, text in labels.items():
        alike = [k for k in colours if k in drawn and colours[k] == colours[key]]
        if key in drawn:
            found[key] = text
        elif len(labels) < len(colours) and alike:
            found[alike[0]] = text
    return found


def _error_bars(axes: Axes, mark: Mark, colour: str) -> None:
    bars: Any = {"color": colour, "lw": 0.9, "alpha": 0.45, "zorder": 2}
    if mark.x_error:
        axes.plot([mark.x - mark.x_error, mark.x + mark.x_error], [mark.y] * 2, **bars)
    if mark.y_error:
        axes.plot([mark.x] * 2, [mark.y - mark.y_error, mark.y + mark.y_error], **bars)


def _legend(figure: Figure, labels: Mapping[str, str]) -> None:
    """One legend below all panels, in the order of `labels`; the figure grows by its height."""
    known = {}
    for axes in figure.axes:
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True):
            known[text] = line
    texts = list(labels.values())
    width, height = figure.get_size_inches()
    columns = 2 if width > 6 and max(map(len, texts)) < 6 * width else 1
    figure.set_size_inches(width, height + 0.24 * -(-len(texts) // columns))
    lines = [known[text] for text in texts]
    short = [_short(text, int(12 * width / columns)) for text in texts]
    figure.legend(lines, short, loc="outside lower left", ncols=columns, frameon=False)


def _stage_bounds(axes: Axes, stages: Sequence[tuple[float, str]]) -> None:
    """A line at each boundary and the stages' names above, where there are several."""
    start = 0.0
    for length, name in stages if len(stages) > 1 else ():
        if start:
            axes.axvline(start, color=GREY, lw=1, ls=":", zorder=0)
        axes.annotate(
            _short(name, 12),
            (start + length / 2, 1.03),
            xycoords=("data", "axes fraction"),
            ha="center",
            color=GREY,
            size=9,
        )
        start += length


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """One colour per name, in order."""
    names = list(names)
    return dict(zip(names, _colours(len(names)), strict=True))


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _thin(values: np.ndarray, most: int = 400) -> np.ndarray:
    """Means of neighbours, so that a long stage still gives a small figure."""
    if len(values) <= most:
        return values
    return np.array([part.mean() for part in np.array_split(values, most)])


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(window) for window in windows])


def _end_labels(
    axes: Axes, ends: Sequence[tuple[float, float, str, str]], at: float, leaders: bool = False
) -> None:
    """Write each (x, y, text, colour) at x = `at`, moved up or down until no two overlap."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    height = figure.get_size_inches()[1] * 72 * 0.78  # of the axes, in points, about
    gap = (high - low) * 15 / height
    placed = _spread([y for _, y, _, _ in ends], gap, low, high)
    for (x, y, text, colour), where in zip(ends, placed, strict=True):
        if leaders or abs(where - y) > gap / 4 or x < at - 0.5:
            axes.plot([x, at], [y, where], color=colour, lw=0.7, alpha=0.6, clip_on=False, zorder=1)
        axes.annotate(
            _short(text, 60),
            (at, where),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    axes.set_ylim(low, high)


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """The positions nearest to the wanted ones that keep `gap` between neighbours.

    Neighbours that are too close form a block around the mean of what they want (isotonic
    regression of the wanted positions, each lowered by its place in the order).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []
    for place, i in enumerate(order):
        blocks.append([wanted[i] - place * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [float(np.mean(block)) for block in blocks for _ in block]
    room = high - gap * (len(wanted) - 1)
    result = [0.0] * len(wanted)
    for place, i in enumerate(order):
        result[i] = min(max(flat[place], low), max(room, low)) + place * gap
    return result


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element to stand in a page: no prolog, ids of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.08, metadata=unsaid)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    points = svg.partition('width="')[2].partition("pt")[0]
    width = float(points) * 96 / 72  # in CSS pixels
    size = f"min-width: {SHRINK * width:.0f}px; max-width: {GROW * width:.0f}px"
    attributes = f'role="img" aria-label="{title}" style="{size}"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1)
