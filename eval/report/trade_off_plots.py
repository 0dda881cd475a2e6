"""The figures of compared runs, each as one SVG string: forgetting against learning."""

from collections.abc import Mapping, Sequence

import matplotlib

from eval.analysis.matrix import Curve
from eval.report.drawing import GREY, STYLE, Mark, end_labels, error_bars, new_figure, svg_of


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
    figure = new_figure(5.9, 4.4)
    axes = figure.subplots()
    ends = []
    for name, curve in curves.items():
        if not curve:
            continue
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=colours[name], lw=1.6, marker="o", ms=4, alpha=0.9)
        for point, error in zip(curve, (errors or {}).get(name, ()), strict=False):
            error_bars(axes, Mark(*point, *(error or (None, None))), colours[name])
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
    end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return svg_of(figure, "trade_off", "Forgetting against learning, one line per run")


@matplotlib.rc_context(STYLE)
def methods(
    points: dict[str, list[tuple[float, float, str]]],
    colours: dict[str, str],
) -> str:
    """Final points (learned, forgotten, learning rate) of each method, joined in their order: that
    of its rates."""
    figure = new_figure(5.7, 3.8)
    axes = figure.subplots()
    ends = []
    for place, (method, ordered) in enumerate(points.items()):
        above = place % 2 == 0  # neighbouring lines are labelled on their two outer sides
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
    end_labels(axes, ends, at=axes.get_xlim()[1], leaders=True)
    return svg_of(
        figure, "methods", "Final learning and forgetting of each method across its rates"
    )
