"""What each method forgets at equal learning, as a ratio to a reference, over learning rates and
seeds.

A method's runs at several learning rates give a curve, forgotten against learned; between the rates
it is read linearly. A reference whose curve is convex is read a little too high there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Ends = Mapping[float, tuple[float, float]]
"""By learning rate, (learned, forgotten) at the end of a run, in nats per token."""
DRAWS = 2000  # of the bootstrap
STEPS = 50  # levels at which the ratio over the whole range is read


@dataclass(frozen=True)
class Level:
    """A method at a level of learning; intervals are the middle 95% over draws of the seeds.

    most: the (learned, forgotten) of the learning rate that learns most, means over the seeds.
    ratio: forgotten over what the reference forgets at the same level. over_range: the same of the
    mean over all levels that every method reaches. None: the reference itself, or it cannot be read
    (`interval`: or fewer than two seeds).
    """

    method: str
    seeds: int
    most: tuple[float, float]
    rate: float
    forgotten: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    over_range: float | None


@dataclass(frozen=True)
class AtEqualLearning:
    """The levels that all methods reach: the highest is where `Level.ratio` is read."""

    reference: str
    level: float
    lowest: float
    methods: list[Level]


def at_equal_learning(
    ends: Mapping[str, Mapping[int, Ends]], reference: str
) -> AtEqualLearning | None:
    """Read every method that has several learning rates.

    Args:
        ends: by method and seed. A learning rate counts that all seeds of the method have; a seed
            that all methods have.

    Returns None where the reference has one rate only, or no level is common to all.
    """
    shared = set.intersection(*(set(runs) for runs in ends.values())) if ends else set()
    seeds = sorted(shared)
    if not seeds:
        return None
    curves = {m: _curves(runs, seeds) for m, runs in ends.items()}
    curves = {m: c for m, c in curves.items() if c.shape[1] > 1}
    if reference not in curves or len(curves) < 2:
        return None
    means = {m: c.mean(axis=0) for m, c in curves.items()}
    level = float(min(c[:, 0].max() for c in means.values()))
    lowest = float(max(c[:, 0].min() for c in means.values()))
    if lowest >= level or level <= 0:
        return None
    drawn = np.random.default_rng(0).integers(len(seeds), size=(DRAWS, len(seeds)))
    against = [read_at(curves[reference][rows].mean(axis=0), level) for rows in drawn]
    levels = np.linspace(max(lowest, 1e-3 * level), level, STEPS)
    found = []
    for method, curve in curves.items():
        most = int(means[method][:, 0].argmax())
        forgotten = read_at(means[method], level)
        ratio = over_range = interval = None
        if method != reference:
            theirs = read_at(means[reference], level)
            ratio = forgotten / theirs if theirs > 0 else None
            mine = sum(read_at(means[method], x) for x in levels)
            whole = sum(read_at(means[reference], x) for x in levels)
            over_range = mine / whole if whole > 0 else None
            if len(seeds) > 1 and ratio is not None:
                draws = [
                    read_at(curve[rows].mean(axis=0), level) / base
                    for rows, base in zip(drawn, against, strict=True)
                    if base > 0
                ]
                low, high = np.quantile(draws, [0.025, 0.975])
                interval = (float(low), float(high))
        rates = _rates(ends[method], seeds)
        found.append(
            Level(
                method, len(seeds), (float(means[method][most, 0]), float(means[method][most, 1])),
                rates[most], forgotten, ratio, interval, over_range,
            )
        )  # fmt: skip
    return AtEqualLearning(reference, level, lowest, found)


def read_at(curve: np.ndarray, level: float) -> float:
    """Forgotten at a level of learning, from points [rates, 2] (learned, forgotten): linear between
    neighbours, and along the last two beyond the ends."""
    points = curve[curve[:, 0].argsort()]
    # Rates that learn less and forget more than another one are on the way back from it.
    kept = [points[0]]
    for point in points[1:]:
        while len(kept) > 1 and kept[-1][1] >= point[1]:
            kept.pop()
        kept.append(point)
    learned, forgotten = np.array(kept).T
    i = int(np.clip(np.searchsorted(learned, level) - 1, 0, len(kept) - 2)) if len(kept) > 1 else 0
    if len(kept) == 1:
        return float(forgotten[0])
    rise = (forgotten[i + 1] - forgotten[i]) / max(learned[i + 1] - learned[i], 1e-12)
    return float(forgotten[i] + rise * (level - learned[i]))


def _rates(runs: Mapping[int, Ends], seeds: Sequence[int]) -> list[float]:
    return sorted(set.intersection(*(set(runs[s]) for s in seeds)))


def _curves(runs: Mapping[int, Ends], seeds: Sequence[int]) -> np.ndarray:
    """[seeds, rates, 2]"""
    rates = _rates(runs, seeds)
    return np.array([[runs[s][r] for r in rates] for s in seeds]).reshape(len(seeds), -1, 2)
