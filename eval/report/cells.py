"""Tables whose cells are coloured by their value: losses by stage and domain, and overlap."""

from collections.abc import Callable
from dataclasses import dataclass

from eval.analysis.load import Run
from eval.analysis.matrix import Matrix
from eval.analysis.text import number, signed

BETTER, SAME, WORSE = (90, 165, 214), (247, 247, 245), (232, 149, 95)
DARK = (23, 99, 170)  # an overlap of 1


@dataclass
class Cell:
    """One cell; an empty colour is none."""

    text: str
    colour: str = ""
    note: str = ""  # small, below the text
    kind: str = ""  # classes of the stylesheet: trained, missing, light (text)


def losses(run: Run) -> list[tuple[str, list[Cell]]]:
    """A row per stage: (its name, a cell per domain), coloured by the change since stage 0."""
    return matrix_cells(run.matrix, number, signed)


def matrix_cells(
    matrix: Matrix, write: Callable[[float], str], write_change: Callable[[float], str]
) -> list[tuple[str, list[Cell]]]:
    """A row per stage: (its name, a cell per domain), coloured by the change since stage 0."""
    changes = [[change_of(matrix, t, d) for d in matrix.domains] for t in range(matrix.last + 1)]
    largest = max((abs(c) for row in changes for c in row if c is not None), default=0.0) or 1.0

    def cell(stage: int, domain: str, change: float | None) -> Cell:
        value = matrix.value(stage, domain)
        kind = "trained" if matrix.trains(stage, domain) else ""
        if value is None:
            return Cell("not yet", kind=f"missing {kind}".strip())
        share = (change or 0.0) / largest
        better = (share < 0) == matrix.lower_is_better
        colour = _mix(SAME, BETTER if better else WORSE, abs(share))
        note = "" if stage == 0 or change is None else write_change(change)
        return Cell(write(value), colour, note, kind)

    return [
        (
            f"{stage} {matrix.stages[stage]}",
            [cell(stage, d, c) for d, c in zip(matrix.domains, row, strict=True)],
        )
        for stage, row in enumerate(changes)
    ]


def change_of(matrix: Matrix, stage: int, domain: str) -> float | None:
    """Change of the value since stage 0, in the direction of the values."""
    before, now = matrix.value(0, domain), matrix.value(stage, domain)
    return None if before is None or now is None else now - before


LEFT_OUT = {
    "broken": "broken",
    "blank": "without text",
    "duplicates": "duplicates",
    "contaminated": "text of an evaluation",
    "refused": "refused by the chat template",
    "sampled_out": "outside the sample",
    "without_tokens": "without tokens",
}


def corpora(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What preparing gave: (columns, rows of (domain, cells)). What is nowhere left out has no
    column."""
    found = run.log.corpora
    keys = [k for k in LEFT_OUT if any(c["left_out"].get(k) for c in found.values())]
    rows = [
        (
            domain,
            [f"{counts[k]:,}" for k in ("documents", "tokens", "heldout_documents")]
            + [f"{counts['left_out'].get(k, 0):,}" for k in keys],
        )
        for domain, counts in found.items()
    ]
    return ["documents", "tokens", "held out", *(LEFT_OUT[k] for k in keys)], rows


@dataclass
class Overlap:
    """Kept-row overlap of one kind of layer after one stage."""

    stage: int
    domains: list[str]
    rows: list[list[Cell]]
    mean: float | None  # off the diagonal


def overlaps(run: Run) -> dict[str, list[Overlap]]:
    """By kind of layer: stage 0, where it was measured, and the last stage that has an overlap."""
    found: dict[str, list[Overlap]] = {}
    for stage in sorted({min(run.overlap), max(run.overlap)}) if run.overlap else []:
        domains = run.overlap[stage]["domains"]
        for kind, values in run.overlap[stage]["kinds"].items():
            off = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j]
            mean = sum(off) / len(off) if off else None
            rows = [[share_cell(value) for value in row] for row in values]
            found.setdefault(kind, []).append(Overlap(stage, domains, rows, mean))
    return found


def share_cell(value: float) -> Cell:
    """Of an overlap, 0 to 1."""
    text = "1" if value == 1 else f"{value:.2f}".removeprefix("0")
    return Cell(text, _mix(SAME, DARK, value), kind="light" if value > 0.6 else "")


def _mix(start: tuple[int, ...], end: tuple[int, ...], share: float) -> str:
    parts = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
