"""How far a difference between settings moves with the held-out text, and with the seeds.

Runs that were evaluated on the same text are resampled together (a paired bootstrap): every
resample draws the sequences of each domain anew, the same for all runs, and every number is
computed again from it. What makes a sequence hard for both runs cancels in their difference, and
the interpolation and the best-so-far of the definitions need no approximation.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from eval.analysis.curves import (
    LEARNING_CURVE,
    Definition,
    Place,
    curve_of,
    independent_errors,
    learning_points,
    on_the_curve,
    places,
    rows_of,
)
from eval.analysis.load import Run
from eval.analysis.matrix import Curve
from eval.analysis.points import NOISE, Row
from eval.analysis.settings import Difference, Name, Pair, Setting, measure

RESAMPLES = 500
READABLE = 0.9  # of the resamples must give a number; fewer: it lies near the end of its range


def resample(run: Run, definition: Definition = LEARNING_CURVE) -> list[list[Place | None]] | None:
    """(learned, forgotten) at every point of a run, on each resample of its held-out text.

    What n sequences that are drawn anew differ by is too little by (n - 1) / n in its variance,
    which is made up for. None where an evaluated point has no `sequences.npz`, or one sequence.
    """
    matrix = run.matrix
    values = np.full((RESAMPLES, len(run.points), len(matrix.domains)), np.nan)
    for place, point in enumerate(run.points):
        cells = zip(matrix.domains, point.loss, strict=True)
        measured = [domain for domain, value in cells if value is not None]
        if not measured:
            continue
        if point.sequences is None:
            return None
        for domain in measured:
            loss, tokens = point.sequences[f"loss/{domain}"], point.sequences[f"tokens/{domain}"]
            n, mean = len(loss), loss.sum() / tokens.sum()
            if n < 2:
                return None
            counts = _counts(domain, n)
            column = matrix.domains.index(domain)
            again = (counts @ loss) / (counts @ tokens)
            values[:, place, column] = mean + (again - mean) * math.sqrt(n / (n - 1))
    drawn = values.astype(object)
    drawn[np.isnan(values)] = None
    ends = {point.stage: place for place, point in enumerate(run.points) if point.step is None}
    unknown: Row = [None] * len(matrix.domains)
    stages = [point.stage for point in run.points]
    found = []
    for rows in drawn.tolist():
        at_ends = [rows[ends[t]] if t in ends else unknown for t in range(matrix.last + 1)]
        redrawn = replace(matrix, values=at_ends)
        found.append(places(redrawn, list(zip(stages, rows, strict=True)), definition))
    return found


@dataclass
class Measured:
    """(learned, forgotten) at every point of a run, and its standard errors; None: not known."""

    places: list[Place | None]
    errors: list[Place | None]


def measured(run: Run, definition: Definition) -> Measured:
    """The errors are those of the resamples of the held-out text, or, without `sequences.npz`,
    `independent_errors`."""
    found = places(run.matrix, rows_of(run.points), definition)
    drawn = resample(run, definition) if any(found) else None
    if drawn is None:
        return Measured(found, independent_errors(run, run.points, definition))
    nothing = (np.nan, np.nan)
    table = np.array([[place or nothing for place in draw] for draw in drawn], dtype=float)
    errors = [(float(x), float(y)) for x, y in table.std(axis=0, ddof=1)]
    return Measured(found, [e if place else None for e, place in zip(errors, found, strict=True)])


@cache
def _counts(domain: str, sequences: int) -> np.ndarray:
    """How often each sequence is drawn, [RESAMPLES, sequences]: the same for every run."""
    rng = np.random.default_rng(zlib.crc32(domain.encode()))
    shares = np.full(sequences, 1 / sequences)
    return rng.multinomial(sequences, shares, size=RESAMPLES).astype(float)


class Noise:
    """The noise of every difference between the settings of compared runs."""

    def __init__(self, runs: Sequence[Run], settings: Sequence[Setting], equal: Sequence[int]):
        known = [curve_of(run) for run in runs]
        curves = [_curves(run) if run.heldout and not run.damage else None for run in runs]
        self.paired = [run.heldout if c else None for run, c in zip(runs, curves, strict=True)]
        """What each run can be paired on: the digests of its held-out text."""
        self.beyond = False  # whether a reading left its range in too many resamples
        self.errors = [_end_errors(run) for run in runs]
        # A run that cannot be resampled stays as it was measured, and is paired with none.
        filled = [c or [k] * RESAMPLES for c, k in zip(curves, known, strict=True)]
        draws = [measure(drawn, settings, equal) for drawn in zip(*filled, strict=True)]
        self.draws = {n: np.array([draw[n] for draw in draws], dtype=float) for n in draws[0]}

    def pair(self, first: Setting, second: Setting) -> Pair:
        """Two settings side by side, `forgotten_equal` only if both can be read."""

        def difference(what: str) -> Difference:
            text = self._paired([first, second], (what, first.name), (what, second.name))
            if text is None:
                text = self._independent(first, second, what)
            noise = _with_seeds(text, _seeds(first, what), _seeds(second, what))
            return Difference(getattr(second, what) - getattr(first, what), noise)

        equal = None not in (first.forgotten_equal, second.forgotten_equal)
        return Pair(
            first.name,
            second.name,
            difference("learned"),
            difference("forgotten"),
            difference("forgotten_equal") if equal else None,
        )

    def reading(self, own: Sequence[Setting], other: Setting, read: float) -> Difference:
        """What `other` forgot minus what a method forgets at its learning, `read` between the
        settings `own` of the method."""
        names = ("between", own[0].method, other.name), ("forgotten", other.name)
        text = self._paired([*own, other], *names)
        if text is None:
            errors = [self._independent(setting, other, "forgotten_equal") for setting in own]
            known = [error for error in errors if error is not None]
            text = max(known) if len(known) == len(errors) else None
        seeds = max(_seeds(setting, "forgotten") for setting in own)
        noise = _with_seeds(text, seeds, _seeds(other, "forgotten"))
        return Difference(other.forgotten - read, noise)

    def _paired(self, settings: Sequence[Setting], a: Name, b: Name) -> float | None:
        """Standard error of a difference, from the resamples in which it can be read."""
        texts = {self.paired[run] for setting in settings for run in setting.runs}
        if len(texts) > 1 or None in texts:
            return None
        drawn = self.draws[b] - self.draws[a]
        drawn = drawn[~np.isnan(drawn)]
        if len(drawn) < READABLE * RESAMPLES:
            self.beyond = True
            return None
        return float(drawn.std(ddof=1))

    def _independent(self, first: Setting, second: Setting, what: str) -> float | None:
        """The same with every evaluation taken as independent: too large, if anything.

        What is read at equal learning inherits the error of what was learned too, through the
        slope of forgetting against learning. Repetitions share the text: their errors do not
        average out.
        """
        parts = []
        for setting in (first, second):
            errors = [self.errors[run] for run in setting.runs]
            known = [error for error in errors if error is not None]
            if len(known) < len(errors):
                return None
            learned, forgotten = (max(column) for column in zip(*known, strict=True))
            parts.append(learned if what == "learned" else forgotten)
            if what == "forgotten_equal" and setting.learned > 0:
                parts.append(setting.forgotten / setting.learned * learned)
        return math.hypot(*parts)


def _curves(run: Run) -> list[Curve] | None:
    drawn = resample(run)
    if drawn is None:
        return None
    return [on_the_curve(run, places) for places in drawn]


def _end_errors(run: Run) -> Place | None:
    points = learning_points(run)
    if not points or points[-1].stage == 0:
        return None
    return independent_errors(run, points[-1:], LEARNING_CURVE)[0]


def _seeds(setting: Setting, what: str) -> float:
    """Standard error of the mean over the seeds; zero, for want of better, for one seed."""
    return setting.spread.get(what, 0.0) / math.sqrt(len(setting.runs))


def _with_seeds(text: float | None, *seeds: float) -> float | None:
    return None if text is None else NOISE * math.hypot(text, *seeds)
