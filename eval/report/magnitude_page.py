"""The page of `launch/inspect.py`: a layer's magnitudes by domain, and the rows that they keep."""

from pathlib import Path

import matplotlib
from markupsafe import Markup

from eval.analysis.magnitudes import Layer, mean_overlap, overlap_of
from eval.analysis.text import number
from eval.report.cells import share_cell
from eval.report.drawing import GREY, STYLE, new_figure, palette, svg_of
from eval.report.page import render, write_folder


def write_magnitudes(
    checkpoints: dict[str, tuple[list[Layer], Layer]], threshold: float, samples: int, folder: Path
) -> Path:
    """Write the page, `report.json` and a figure for each checkpoint; returns the page's path.

    checkpoints: by name, all layers and the one to draw.
    """
    figures = {
        f"magnitudes_{i}": magnitudes(layer, name, f"magnitudes_{i}")
        for i, (name, (_, layer)) in enumerate(checkpoints.items())
    }
    shown, numbers = [], {}
    for (name, (layers, layer)), figure in zip(checkpoints.items(), figures.values(), strict=True):
        table = overlap_of(layer, threshold)
        rows = zip(layer.magnitudes, ([share_cell(v) for v in row] for row in table), strict=True)
        means = {x.name: mean_overlap(x, threshold) for x in layers}
        shown.append(
            {
                "name": name,
                "layer": layer.name,
                "figure": Markup(figure),
                "domains": list(layer.magnitudes),
                "rows": list(rows),
                "mean": number(means[layer.name]),
                "means": [(x, number(mean)) for x, mean in means.items()],
            }
        )
        numbers[name] = {
            "layer": layer.name,
            "domains": list(layer.magnitudes),
            "overlap": table.tolist(),
            "mean_overlap": means,
            "magnitudes": {d: m.tolist() for d, m in layer.magnitudes.items()},
        }
    page = render(
        "magnitudes.html.j2",
        title="Magnitudes by domain",
        checkpoints=shown,
        threshold=threshold,
        samples=samples,
        chance=number(1 - threshold, 2),
    )
    content = {"threshold": threshold, "samples": samples, "checkpoints": numbers}
    return write_folder(folder, page, content, figures)


@matplotlib.rc_context(STYLE)
def magnitudes(layer: Layer, checkpoint: str, name: str) -> str:
    """A panel for each domain: the share of every output feature in the layer's magnitude."""
    count = len(layer.magnitudes)
    figure = new_figure(6.5, 0.9 * count + 0.7)
    panels = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (domain, values), colour in zip(
        panels, layer.magnitudes.items(), palette(count), strict=True
    ):
        axes.fill_between(range(len(values)), values, step="mid", color=colour, lw=0)
        axes.axhline(1 / len(values), color=GREY, lw=0.7)
        axes.set_ylabel(domain, rotation=0, ha="right", va="center")
        axes.set(xlim=(0, len(values) - 1), ylim=(0, None))
    panels[-1].set_xlabel(f"output feature of {layer.name}")
    return svg_of(figure, name, f"Magnitudes of {layer.name} in {checkpoint}")
