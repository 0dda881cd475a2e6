"""The figures of one run, each as one SVG string: domains over the stages, training loss."""

import matplotlib
import numpy as np

from eval.analysis.load import Run
from eval.analysis.matrix import Matrix
from eval.analysis.mixtures import losses_of, mixed_steps
from eval.report.cells import change_of
from eval.report.drawing import (
    GREY,
    INK,
    PALE,
    STYLE,
    end_labels,
    new_figure,
    palette,
    shortened,
    svg_of,
)


@matplotlib.rc_context(STYLE)
def domain_curves(matrix: Matrix) -> str:
    """Change of each domain's loss since stage 0 over the stages; a ring marks its own stage."""
    figure = new_figure(5.7, 3.8)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, lw=1)
    ends: list[tuple[float, float, str, str]] = []
    for domain, colour in zip(matrix.domains, palette(len(matrix.domains)), strict=True):
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
    ticks = [f"{t}\n{shortened(name, 10)}" for t, name in enumerate(matrix.stages)]
    if last > 4:  # no room side by side
        ticks = [f"{t} {shortened(name, 16)}" for t, name in enumerate(matrix.stages)]
        axes.tick_params(axis="x", rotation=40)
    axes.set_xticks(range(last + 1), ticks)
    if last > 4:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.grid(axis="y")
    end_labels(axes, ends, at=last + 0.22)
    return svg_of(figure, "domain_curves", "Change of the loss of each domain over the stages")


@matplotlib.rc_context(STYLE)
def training_loss(run: Run) -> str:
    """Training loss over the steps of all stages: raw, and as a running median."""
    figure = new_figure(5.7, 3.2)
    axes = figure.subplots()
    start = 0
    bounds, names = [], []
    hues = palette(len(run.matrix.domains))
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
        colour = hues[run.matrix.domains.index(known[0])] if known else INK
        axes.plot(x, y, color=colour, lw=0.8, alpha=0.35)
        axes.plot(x, _running_median(y, max(3, len(y) // 12)), color=colour, lw=2)
        bounds.append((start, end))
        start = end
        names.append((f"{stage}  {shortened(name, 14)}", colour))
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
    return svg_of(figure, "training_loss", "Training loss over the steps")


@matplotlib.rc_context(STYLE)
def domain_training_loss(run: Run) -> str:
    """Training loss of each domain of the stages that read several, over the steps of all stages:
    a running median."""
    figure = new_figure(5.7, 3.4)
    axes = figure.subplots()
    mixed = mixed_steps(run.log)
    names = list(dict.fromkeys(n for steps in mixed.values() for s in steps for n in s["domains"]))
    order = [*run.matrix.domains, *(n for n in names if n not in run.matrix.domains)]
    colours = dict(zip(order, palette(len(order)), strict=True))
    start, low, ends = 0, None, {}
    for stage in sorted({step["stage"] for step in run.log.steps}):
        for domain in names if stage in mixed else ():
            losses = losses_of(domain, mixed[stage])
            if not losses:
                continue
            x, y = (_thin(np.array(column, dtype=float)) for column in zip(*losses, strict=True))
            y = _running_median(y, max(3, len(y) // 12))
            axes.plot(start + x, y, color=colours[domain], lw=2)
            ends[domain] = (float(start + x[-1]), float(y[-1]), domain, colours[domain])
            low = start if low is None else low
        if stage in mixed and start:
            axes.axvline(start, color=PALE, lw=1.2, zorder=0)
        start += max(s["step"] for s in run.log.steps if s["stage"] == stage)
    low, high = low or 0, max((x for x, *_ in ends.values()), default=1.0)
    axes.set(xlabel="optimizer step, over all stages", ylabel="training loss, nats")
    axes.set_xlim(low, high)
    axes.grid(axis="y")
    end_labels(axes, list(ends.values()), at=high + 0.02 * (high - low))
    return svg_of(figure, "domain_training_loss", "Training loss of each domain over the steps")


def _thin(values: np.ndarray, most: int = 400) -> np.ndarray:
    """Means of neighbours, so that a long stage still gives a small figure."""
    if len(values) <= most:
        return values
    return np.array([part.mean() for part in np.array_split(values, most)])


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(window) for window in windows])
