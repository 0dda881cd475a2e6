"""Learning against forgetting, read at every evaluated point of a run.

A point within a stage is read by the definitions of `eval/analysis/matrix.py` as if its stage had
ended there: its losses take the place of the stage's row, and what comes later is not known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import TypeVar

from eval.analysis.load import Run
from eval.analysis.matrix import Curve, Matrix, complete, curve_errors, learning_curve
from eval.analysis.points import Point, Row

POINT_DEFINITIONS = {
    "points_within_stages": "A point within a stage is read as if the stage had ended there; the "
    "best value so far is then that of stage 0 and of the ends of the stages before. Equal "
    "learning is read between all points from where there is something to forget.",
    "learned_since_stage_0": "Mean over the domains that the recipe trains on of the improvement "
    "of the held-out loss from stage 0 to the point.",
    "forgotten_since_stage_0": "Mean over the base domains, those that no stage trains on, of the "
    "rise of the held-out loss from stage 0 to the point.",
    "humaneval": "HumanEval pass@1: the share of the problems whose greedy completion passes the "
    "tests. Sampled pass@k is the unbiased estimate of Chen et al. (2021).",
    "benchmarks": "Mean over the benchmarks of their accuracies, each by its own metric; the "
    "standard error takes them as independent.",
}

T = TypeVar("T")
Place = tuple[float, float]
"""(learned, forgotten), in nats per token."""


@dataclass
class Definition:
    """How (learned, forgotten) is read from a matrix whose last known row is that of a stage, and
    its standard errors with every evaluation taken as independent (None: not known)."""

    read: Callable[[Matrix, int], Place | None]
    errors: Callable[[Matrix, int, list[Row]], Place | None]


def _read_curve(matrix: Matrix, stage: int) -> Place | None:
    curve = learning_curve(matrix)
    return curve[stage] if len(curve) == stage + 1 else None


def _curve_errors(matrix: Matrix, stage: int, stderr: list[Row]) -> Place | None:
    return (0.0, 0.0) if stage == 0 else curve_errors(matrix, stderr)


def _read_since(matrix: Matrix, stage: int) -> Place | None:
    if matrix.alone:  # the last model knows its own domains only
        return None
    gains = complete([matrix.gain(domain, 0, stage) for domain in matrix.trained])
    kept = complete([matrix.gain(domain, 0, stage) for domain in matrix.base])
    return (sum(gains) / len(gains), -sum(kept) / len(kept)) if gains and kept else None


def _since_errors(matrix: Matrix, stage: int, stderr: list[Row]) -> Place | None:
    if stage == 0:
        return 0.0, 0.0

    def error(domains: Sequence[str]) -> float | None:
        columns = [matrix.domains.index(domain) for domain in domains]
        errors = complete([stderr[row][column] for row in (0, stage) for column in columns])
        return hypot(*errors) / len(columns) if errors else None

    learned, forgotten = error(list(matrix.trained)), error(matrix.base)
    return None if learned is None or forgotten is None else (learned, forgotten)


LEARNING_CURVE = Definition(_read_curve, _curve_errors)
"""`learned` and `forgotten` of `eval/analysis/matrix.py`."""
SINCE_STAGE_0 = Definition(_read_since, _since_errors)
"""All trained domains and all base domains against stage 0; with a single stage, the same."""


def places(
    matrix: Matrix, rows: Sequence[tuple[int, Row]], definition: Definition
) -> list[Place | None]:
    """(learned, forgotten) at each point, given as its stage and its loss of each domain; None
    where it cannot be read. The rows of `matrix` are those of the ends of the stages."""
    return [definition.read(_at(matrix, *row), row[0]) for row in rows]


def curve_of(run: Run) -> Curve:
    """The learning curve through all points of a run that can be read, in order."""
    return on_the_curve(run, places(run.matrix, rows_of(run.points), LEARNING_CURVE))


def on_the_curve(run: Run, values: Sequence[T | None]) -> list[T]:
    """Of values of a run's points those that are known where there is something to forget, or
    where the next stage begins with that: before, nothing forgotten would mean nothing."""
    found = []
    for point, value in zip(run.points, values, strict=True):
        at_its_end = point.step is None and bool(run.matrix.old(point.stage + 1))
        if value is not None and (run.matrix.old(point.stage) or at_its_end):
            found.append(value)
    return found


def rows_of(points: Sequence[Point]) -> list[tuple[int, Row]]:
    return [(point.stage, point.loss) for point in points]


def learning_points(run: Run) -> list[Point]:
    """The points at which (learned, forgotten) can be read, in order."""
    found = places(run.matrix, rows_of(run.points), LEARNING_CURVE)
    return [point for point, place in zip(run.points, found, strict=True) if place]


def independent_errors(
    run: Run, points: Sequence[Point], definition: Definition
) -> list[Place | None]:
    """Standard errors of the points with every evaluation taken as independent, which overstates
    those of evaluations of one text; None where an evaluation has no standard error."""
    found: list[Place | None] = []
    for point in points:
        stderr = [*run.stderr[: point.stage], point.stderr]
        matrix = _at(run.matrix, point.stage, point.loss)
        found.append(definition.errors(matrix, point.stage, stderr))
    return found


def _at(matrix: Matrix, stage: int, row: Row) -> Matrix:
    later: list[Row] = [[None] * len(matrix.domains)] * (matrix.last - stage)
    values = [*matrix.values[:stage], row, *later]
    return replace(matrix, values=values)
