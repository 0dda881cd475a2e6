"""The figures of the reports, each as one SVG string.

Figures are deterministic to the byte (fixed hash salt, no date), keep their text as text, and have
a white ground of their own, so that they read the same on a light and on a dark page.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eval.matrix import Curve, Matrix
from eval.report.load import Run

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

INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
CHANGE = LinearSegmentedColormap.from_list("change", ["#5aa5d6", "#f7f7f5", "#e8955f"])
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


def signed(value: float | None, digits: int = 3) -> str:
    """+0.123 or −0.123 (a true minus sign), no sign for what rounds to zero, — for None."""
    if value is None:
        return "—"
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text


@matplotlib.rc_context(STYLE)
def heat_map(run: Run) -> str:
    """Stage x domain loss; colour is the change since stage 0, a frame marks the trained cells."""
    matrix = run.matrix
    size = len(matrix.domains)
    rows = [*matrix.stages, *(["unigram"] if run.unigram else [])]
    change = [[_change(matrix, t, d) for d in matrix.domains] for t in range(len(matrix.stages))]
    largest = max((abs(c) for row in change for c in row if c is not None), default=0.0) or 1.0
    figure = _figure(1.5 + 1.02 * size, 0.6 + 0.6 * len(rows))
    axes = figure.subplots()
    for y, name in enumerate(rows):
        for x, domain in enumerate(matrix.domains):
            if name == "unigram" and y == len(matrix.stages):
                axes.add_patch(Rectangle((x, y + 0.12), 1, 1, fc="white", ec="white"))
                text = f"{run.unigram[domain]:.3f}" if domain in run.unigram else ""
                axes.text(x + 0.5, y + 0.62, text, ha="center", va="center", color=GREY)
                continue
            value, shift = matrix.value(y, domain), change[y][x]
            if value is None:
                patch = Rectangle((x, y), 1, 1, fc="#f2f2f2", ec="white", lw=2, hatch="//")
                patch.set_hatchcolor("#dddddd")
                axes.add_patch(patch)
                axes.text(x + 0.5, y + 0.5, "not yet", ha="center", va="center", color=GREY, size=9)
                continue
            shade = CHANGE(0.5 + 0.5 * (shift or 0.0) / largest)
            axes.add_patch(Rectangle((x, y), 1, 1, fc=shade, ec="white", lw=2))
            up = 0.5 if y == 0 or shift is None else 0.36
            axes.text(x + 0.5, y + up, f"{value:.3f}", ha="center", va="center")
            if up != 0.5:
                axes.text(x + 0.5, y + 0.7, signed(shift), ha="center", va="center", size=9)
    for domain in matrix.domains:
        for stage in _stages_of(matrix, domain):
            x = matrix.domains.index(domain)
            box = Rectangle((x + 0.035, stage + 0.05), 0.93, 0.9, fc="none", ec=INK, lw=2)
            axes.add_patch(box)
    axes.set(xlim=(0, size), ylim=(len(rows) + (0.12 if run.unigram else 0), 0))
    axes.set_xticks([x + 0.5 for x in range(size)], [_short(d, 10) for d in matrix.domains])
    labels = [f"{t}  {_short(name, 14)}" for t, name in enumerate(matrix.stages)]
    centres = [y + 0.5 for y in range(len(labels))]
    if run.unigram:
        labels, centres = [*labels, "unigram"], [*centres, len(labels) + 0.62]
    axes.set_yticks(centres, labels)
    axes.xaxis.tick_top()
    _bare(axes)
    return _svg(figure, "heat_map", "Held-out loss of every domain after every stage")


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
            if (change := _change(matrix, t, domain)) is not None
        ]
        if not points:
            continue
        dashed = "--" if domain in matrix.base else "-"
        axes.plot(*zip(*points, strict=True), color=colour, lw=2, ls=dashed, marker="o", ms=4)
        own = [(t, change) for t, change in points if t in _stages_of(matrix, domain)]
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
def overlaps(run: Run) -> list[tuple[str, str, dict[int, float]]]:
    """Kept-row overlap per kind of layer: (kind, SVG, {stage: mean off the diagonal}).

    Each SVG holds the matrix of stage 0, where it was measured, and of the last stage that has
    one, in one colour scale from 0 to 1.
    """
    if not run.overlap:
        return []
    stages = sorted({min(run.overlap), max(run.overlap)})
    size = len(run.overlap[stages[0]]["domains"])
    panel = 1.7 if size <= 4 else 2.2
    figures = []
    for kind in run.overlap[stages[-1]]["kinds"]:
        shown = [stage for stage in stages if kind in run.overlap[stage]["kinds"]]
        figure = _figure(0.95 + (panel + 0.2) * len(stages), panel + 1.0)
        grid = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
        means = {}
        for axes, stage in zip(grid, stages, strict=True):
            if stage not in shown:
                axes.set_axis_off()
                continue
            values = np.array(run.overlap[stage]["kinds"][kind], dtype=float)
            names = [_short(d, 9) for d in run.overlap[stage]["domains"]]
            place = np.arange(size)
            look = {"cmap": "Blues", "vmin": 0, "vmax": 1.3, "edgecolors": "white", "lw": 1}
            axes.pcolormesh(place, place, values, shading="nearest", **look)
            axes.set(aspect="equal", ylim=(size - 0.5, -0.5))
            if size <= 6:
                for (y, x), value in np.ndenumerate(values):
                    colour = "white" if value > 0.85 else INK
                    axes.text(x, y, _two(value), ha="center", va="center", color=colour, size=10)
            axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(size), names)
            axes.set_title(f"stage {stage}" + (" (before)" if stage == 0 else ""), size=10)
            axes.tick_params(labelsize=10 if size <= 6 else 100 / size)
            _bare(axes)
            off = values[~np.eye(size, dtype=bool)]
            if off.size:
                means[stage] = float(off.mean())
        svg = _svg(figure, f"overlap_{kind}", f"Kept rows shared between domains, {kind}")
        figures.append((kind, svg, means))
    return figures


@matplotlib.rc_context(STYLE)
def training_loss(run: Run) -> str:
    """Training loss over the steps of all stages: raw, and as a running median."""
    figure = _figure(5.7, 3.2)
    axes = figure.subplots()
    start = 0
    bounds, names = [], []
    palette = _colours(len(run.matrix.domains))
    for stage in sorted({step["stage"] for step in run.steps}):
        steps = [s for s in run.steps if s["stage"] == stage and s.get("loss") is not None]
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
) -> str:
    """Forgetting against learning: a line per run, a dot per stage, a large dot at its end.

    `level` is the amount of learning at which the runs are read, `reach` the range in which all of
    them can be. `numbered` writes the runs' names, then short numbers, into their last dots; a run
    without a label gets none.
    """
    figure = _figure(5.9, 4.4)
    axes = figure.subplots()
    ends = []
    for name, curve in curves.items():
        if not curve:
            continue
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=colours[name], lw=1.6, marker="o", ms=4, alpha=0.9)
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


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """One colour per name, in order."""
    names = list(names)
    return dict(zip(names, _colours(len(names)), strict=True))


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _stages_of(matrix: Matrix, domain: str) -> list[int]:
    """Every stage that trains on a domain, alone or in a mixture, not only the first."""
    return [t for t in range(1, len(matrix.stages)) if domain in matrix.stages[t].split("+")]


def _change(matrix: Matrix, stage: int, domain: str) -> float | None:
    gain = matrix.gain(domain, 0, stage)
    return None if gain is None else -gain if matrix.lower_is_better else gain


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _two(value: float) -> str:
    return "1" if value == 1 else f"{value:.2f}".removeprefix("0")


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


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
            text,
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
