"""What the figures of the reports share: colours, labels that do not overlap, and SVG.

Figures are deterministic to the byte (fixed hash salt, no date), keep their text as text, and have
a white ground of their own, so that they read the same on a light and on a dark page.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """One colour per name, in order."""
    names = list(names)
    return dict(zip(names, palette(len(names)), strict=True))


def palette(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def error_bars(axes: Axes, mark: Mark, colour: str) -> None:
    bars: Any = {"color": colour, "lw": 0.9, "alpha": 0.45, "zorder": 2}
    if mark.x_error:
        axes.plot([mark.x - mark.x_error, mark.x + mark.x_error], [mark.y] * 2, **bars)
    if mark.y_error:
        axes.plot([mark.x] * 2, [mark.y - mark.y_error, mark.y + mark.y_error], **bars)


def end_labels(
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
            shortened(text, 60),
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


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def svg_of(figure: Figure, name: str, title: str) -> str:
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
    attributes = f'role="img" aria-label="{escape(title)}" style="{size}"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1)
