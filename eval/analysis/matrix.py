"""The stage x domain matrix of a continual run and what is read from it.

Row t of the matrix holds the value of every domain after stage t; row 0 is the model before any
training. Published codes disagree about the names below, so each has its one sentence in
`DEFINITIONS`, printed wherever the number is.

**Sign.** Values may be losses (`lower_is_better`) or scores. `acc` is in the unit and direction of
the values. Everything else is a *change*, with the sign turned for losses so that one reading fits
both: an improvement is positive in `bwt`, `fwt`, `base_retention` and `learned`; a loss of what
was known is positive in `forgetting` and `forgotten`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

DEFINITIONS = {
    "acc": "Mean value of the trained domains after the last stage (the paper's A_T; for losses "
    "lower is better).",
    "bwt": "Backward transfer: mean over the domains trained before the last stage of the "
    "improvement from right after their own stage to the end; negative means they got worse.",
    "forgetting": "Mean over the domains trained before the last stage of the best value from "
    "their own stage on, up to the stage before the last, minus the final value; positive means "
    "forgotten.",
    "fwt": "Forward transfer: mean over the domains trained after the first stage of the "
    "improvement over stage 0 that is already there just before their own stage.",
    "base_retention": "Mean change, from stage 0 to the end, of the domains that no stage trains "
    "on; negative means that the model lost some of what it could do before.",
    "learned": "Mean over the domains that the recipe trains on of the improvement over stage 0 "
    "right after their own stage; domains not yet trained count as zero.",
    "forgotten": "Mean over the domains that are old at the last stage (the base domains and those "
    "trained at an earlier stage) of the best value so far minus the value now.",
    "forgotten_at_equal_learning": "What a run had forgotten when it had learned as much as the "
    "run that learned least: read linearly between its stages, at the first crossing.",
}

Curve = list[tuple[float, float]]
"""Points (learned, forgotten), in the order of the stages."""


@dataclass
class Matrix:
    """Values of every domain (columns) after every stage (rows), None where not evaluated.

    `stages` names the rows, row 0 being the model before training. `trained` maps a domain to the
    stage (1..T) at which it is first trained; base domains, which no stage trains on, are absent.
    `alone`: the stages are models of their own, each from the base or another stage; a trained
    domain is then what its own stage made of it, and a stage may forget what the base knew alone.
    """

    stages: list[str]
    domains: list[str]
    trained: dict[str, int]
    values: list[list[float | None]]
    lower_is_better: bool = True
    alone: bool = False

    @property
    def last(self) -> int:
        """T, the index of the last row."""
        return len(self.stages) - 1

    @property
    def base(self) -> list[str]:
        """The domains that no stage trains on, in column order."""
        return [domain for domain in self.domains if domain not in self.trained]

    def value(self, stage: int, domain: str) -> float | None:
        """The value as it was measured."""
        return self.values[stage][self.domains.index(domain)]

    def trains(self, stage: int, domain: str) -> bool:
        """Whether a stage trains on a domain, alone or in a mixture, for the first time or not."""
        return stage > 0 and domain in self.stages[stage].split("+")

    def gain(self, domain: str, since: int, until: int) -> float | None:
        """Improvement of a domain from one row to another: positive is better, also for losses."""
        before, after = self.value(since, domain), self.value(until, domain)
        if before is None or after is None:
            return None
        return before - after if self.lower_is_better else after - before

    def old(self, stage: int) -> list[str]:
        """The domains that can be forgotten at a stage: base, or trained at an earlier stage."""
        if self.alone:  # what another stage has learned is another model's
            return self.base
        return [d for d in self.domains if self.trained.get(d, 0) < stage]

    def before(self, stage: int) -> range:
        """The rows that the model of a stage has come through; of stages alone, the base's."""
        return range(min(stage, 1) if self.alone else stage)

    def best_row(self, domain: str, stage: int) -> int | None:
        """The row before `stage` in which the domain was best, from its own stage on (the base
        domains: from row 0); None if one of these rows is missing, or there is none."""
        rows = self.before(stage)[self.trained.get(domain, 0) :]
        values = complete([self.value(row, domain) for row in rows])
        if not values:
            return None
        best = min(values) if self.lower_is_better else max(values)
        return rows[values.index(best)]

    def until(self, stage: int) -> "Matrix":
        """The matrix as it was after `stage`; domains trained later are then no base domains."""
        return replace(self, stages=self.stages[: stage + 1], values=self.values[: stage + 1])


def complete(values: Sequence[float | None]) -> list[float] | None:
    """The values as a list, None if one of them is missing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None for no values or where one is missing."""
    known = complete(values)
    return sum(known) / len(known) if known else None


def _trained_by(matrix: Matrix, stage: int) -> list[str]:
    return [d for d in matrix.domains if 1 <= matrix.trained.get(d, 0) <= stage]


def _lost(matrix: Matrix, domain: str, stage: int) -> float | None:
    """Best value so far minus the value after `stage`."""
    row = matrix.best_row(domain, stage)
    gain = None if row is None else matrix.gain(domain, row, stage)
    return None if gain is None else -gain


def acc(matrix: Matrix) -> float | None:
    """Mean of the trained domains in the last row, in the unit of the values (A_T)."""
    known = _trained_by(matrix, matrix.last)
    rows = {d: matrix.trained[d] if matrix.alone else matrix.last for d in known}
    return _mean([matrix.value(rows[d], d) for d in known])


def bwt(matrix: Matrix) -> float | None:
    """Backward transfer, positive when old domains improved; None for a single stage."""
    if matrix.alone:
        return None
    old = _trained_by(matrix, matrix.last - 1)
    return _mean([matrix.gain(d, matrix.trained[d], matrix.last) for d in old])


def forgetting(matrix: Matrix) -> float | None:
    """Forgetting of the trained domains, positive when bad; None for a single stage."""
    if matrix.alone:
        return None
    old = _trained_by(matrix, matrix.last - 1)
    return _mean([_lost(matrix, d, matrix.last) for d in old])


def fwt(matrix: Matrix) -> float | None:
    """Forward transfer, positive when earlier stages helped; None for a single stage."""
    if matrix.alone:
        return None
    later = [d for d in _trained_by(matrix, matrix.last) if matrix.trained[d] > 1]
    return _mean([matrix.gain(d, 0, matrix.trained[d] - 1) for d in later])


def base_retention(matrix: Matrix) -> float | None:
    """Change of the base domains since row 0, negative when bad; None without base domains."""
    if matrix.last == 0:
        return None
    return _mean([matrix.gain(d, 0, matrix.last) for d in matrix.base])


METRICS: dict[str, Callable[[Matrix], float | None]] = {
    "acc": acc,
    "bwt": bwt,
    "forgetting": forgetting,
    "fwt": fwt,
    "base_retention": base_retention,
}


def learning_curve(matrix: Matrix) -> Curve:
    """One point (learned, forgotten) per evaluated stage t = 0..T.

    learned(t) sums, over the trained domains of the stages up to t, the improvement over row 0
    right after their own stage, divided by the number of trained domains of the whole recipe.
    forgotten(t) sums, over the domains old at t, the best value so far minus the value at t,
    divided by the number of domains old at T. Both divisors are those of the whole recipe, so that
    the points of a run, and of runs of one recipe, can be compared. The curve ends before the
    first stage whose evaluation is missing, and is empty where nothing can be forgotten (a single
    stage and no base domain).
    """
    old_at_end, trained = matrix.old(matrix.last), _trained_by(matrix, matrix.last)
    if not old_at_end or not trained:
        return []
    curve: Curve = []
    for stage in range(len(matrix.stages)):
        if all(matrix.value(stage, domain) is None for domain in matrix.domains):
            break
        gains = [matrix.gain(d, 0, matrix.trained[d]) for d in _trained_by(matrix, stage)]
        losses = [_lost(matrix, d, stage) for d in matrix.old(stage)] if stage else []
        learned, lost = complete(gains), complete(losses)
        if learned is None or lost is None:
            break
        curve.append((sum(learned) / len(trained), sum(lost) / len(old_at_end)))
    return curve


def curve_errors(matrix: Matrix, stderr: list[list[float | None]]) -> tuple[float, float] | None:
    """Standard errors of the last point of `learning_curve`, from those of the cells.

    `stderr` has the shape of `matrix.values`. Evaluations are taken as independent; as they share
    one held-out text, the error of a difference is in truth smaller, so this errs to the careful
    side. None where an error is missing or the curve has no trained stage.
    """
    stage = len(learning_curve(matrix)) - 1
    if stage < 1:
        return None

    def error(cells: list[tuple[int, str]]) -> float:
        errors = complete([stderr[row][matrix.domains.index(domain)] for row, domain in cells])
        return math.nan if errors is None else math.hypot(*errors)

    learned, lost = _trained_by(matrix, stage), matrix.old(stage)
    cells = [(0, d) for d in learned] + [(matrix.trained[d], d) for d in learned]
    learned_error = error(cells) / len(_trained_by(matrix, matrix.last))
    best = [(row, d) for d in lost if (row := matrix.best_row(d, stage)) is not None]
    lost_error = error(best + [(stage, d) for d in lost]) / len(matrix.old(matrix.last))
    if math.isnan(learned_error) or math.isnan(lost_error):
        return None
    return learned_error, lost_error


def forgotten_at(curve: Curve, level: float) -> float | None:
    """Read `forgotten` at learned = `level` along the curve, linearly between its points.

    None outside the curve's range. Where learning goes up and down, so that the level is met more
    than once, the first crossing counts.
    """
    if curve and curve[0][0] == level:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if level == x1:
            return y1
        if min(x0, x1) < level < max(x0, x1):
            share = (level - x0) / (x1 - x0)
            return y0 * (1 - share) + y1 * share
    return None


def between(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Read a *method* at learned = `level` between the final points of several runs of it.

    `points` are (learned, forgotten), one per learning rate, in any order; they are sorted by
    what was learned and read linearly. None outside their range.
    """
    return forgotten_at(sorted(points), level)


def on_the_way(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a method's (learned, forgotten) at ascending learning rates, those that learn more than
    every smaller rate. Beyond the rate that learns most, a larger one forgets more and learns less:
    that is no price of learning, and a reading there would mean nothing."""
    kept: list[tuple[float, float]] = []
    for learned, forgotten in points:
        if not kept or learned > kept[-1][0]:
            kept.append((learned, forgotten))
    return kept


def equal_learning(curves: dict[str, Curve]) -> dict:
    """Read every run at the same amount of learning.

    Returns `level`, the smallest final learning among the runs (the furthest that all reached);
    `range`, [lo, hi] of the learning at which every curve can be read, None if there is none; and
    `forgotten` at the level for each run, None where its curve does not reach it. Empty curves
    are left out of level and range.
    """
    full = [curve for curve in curves.values() if curve]
    if not full:
        return {"level": None, "range": None, "forgotten": dict.fromkeys(curves)}
    level = min(curve[-1][0] for curve in full)
    low = max(min(x for x, _ in curve) for curve in full)
    high = min(max(x for x, _ in curve) for curve in full)
    return {
        "level": level,
        "range": [low, high] if low <= high else None,
        "forgotten": {name: forgotten_at(curve, level) for name, curve in curves.items()},
    }
