"""The figures of the points of one run or several, each as one SVG string: tasks over training, and
what was learned against what was kept."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from eval.report.drawing import (
    GREY,
    STYLE,
    Mark,
    end_labels,
    error_bars,
    new_figure,
    shortened,
    svg_of,
)

UNIT_LABELS = {
    "epochs": "epochs",
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "stages": "stages",
}


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
    figure = new_figure(max(4.6, 3.0 * columns + 0.9 * (columns == 2)), 3.0 * rows + 0.3)
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
                    error_bars(axes, mark, colour)
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
    return svg_of(figure, name, "Scores over training: " + ", ".join(panels))


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
    figure = new_figure(5.9, 4.4)
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
            error_bars(axes, mark, colour)
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
    end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return svg_of(figure, name, f"{axis_labels[1]} against {axis_labels[0]}")


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
    short = [shortened(text, int(12 * width / columns)) for text in texts]
    figure.legend(lines, short, loc="outside lower left", ncols=columns, frameon=False)


def _stage_bounds(axes: Axes, stages: Sequence[tuple[float, str]]) -> None:
    """A line at each boundary and the stages' names above, where there are several."""
    start = 0.0
    for length, name in stages if len(stages) > 1 else ():
        if start:
            axes.axvline(start, color=GREY, lw=1, ls=":", zorder=0)
        axes.annotate(
            shortened(name, 12),
            (start + length / 2, 1.03),
            xycoords=("data", "axes fraction"),
            ha="center",
            color=GREY,
            size=9,
        )
        start += length
