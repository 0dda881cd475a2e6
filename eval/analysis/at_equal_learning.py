"""What each method forgets at equal learning, as a ratio to a reference, over learning rates and
seeds.

A method's runs at several learning rates give a curve, forgotten against learned; between the rates
it is read linearly, up to the one that learns most. A reference whose curve is convex is read a
little too high there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.analysis.matrix import complete, on_the_way

Ends = Mapping[float, tuple[float, float]]
"""By learning rate, (learned, forgotten) at the end of a run, in nats per token."""
DRAWS = 2000  # of the bootstrap
STEPS = 50  # levels at which the ratio over the whole range is read


@dataclass(frozen=True)
class Ratio:
    """Forgotten over what the reference forgets at a level of learning. None: it cannot be read.

    interval: the middle 95% over draws of the seeds; None: nor in some draw, or fewer than two.
    """

    level: float
    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Level:
    """A method at levels of learning.

    most: the (learned, forgotten) of the learning rate that learns most, means over the seeds.
    common: at the most that every method learns, where `forgotten` is read too. own: at the most
    that this method and the reference learn. over_range: the ratio of the means over all levels
    that every method reaches. Of the reference itself the three are None.
    """

    method: str
    seeds: int
    most: tuple[float, float]
    rate: float
    forgotten: float | None
    common: Ratio | None
    own: Ratio | None
    over_range: float | None


@dataclass(frozen=True)
class AtEqualLearning:
    """The levels that all methods reach: the highest is where `Level.common` is read.

    left_out: by method, the learning rates that are not read, as not all of its seeds have them.
    """

    reference: str
    level: float
    lowest: float
    methods: list[Level]
    left_out: dict[str, list[float]]


def at_equal_learning(
    ends: Mapping[str, Mapping[int, Ends]], reference: str
) -> AtEqualLearning | None:
    """Read every method that has several learning rates on the way to the one that learns most.

    Args:
        ends: by method and seed. A learning rate counts that all seeds of the method have; a seed
            that the reference has too.

    Returns None where the reference has one rate only, or no level is common to all.
    """
    theirs = ends.get(reference, {})
    seeds = {m: sorted(set(runs) & set(theirs)) for m, runs in ends.items()}
    curves = {m: _curves(ends[m], mine) for m, mine in seeds.items() if mine}
    means = {m: c.mean(axis=0) for m, c in curves.items()}
    ways = {m: way for m, c in means.items() if len(way := on_the_way(c.tolist())) > 1}
    if reference not in ways or len(ways) < 2:
        return None
    level = min(way[-1][0] for way in ways.values())
    lowest = max(way[0][0] for way in ways.values())
    if lowest >= level or level <= 0:
        return None
    levels = np.linspace(max(lowest, 1e-3 * level), level, STEPS)
    found = []
    for method in ways:
        curve, mean, mine = curves[method], means[method], seeds[method]
        most = int(mean[:, 0].argmax())
        common = own = over_range = None
        if method != reference:
            other = _curves(theirs, mine)
            common = _read(curve, other, level)
            own = _read(curve, other, min(ways[method][-1][0], ways[reference][-1][0]))
            over_range = _ratio(curve, other, levels.tolist())
        found.append(
            Level(
                method, len(mine), (float(mean[most, 0]), float(mean[most, 1])),
                _rates(ends[method], mine)[most], read_at(mean, level), common, own, over_range,
            )
        )  # fmt: skip
    left_out = {m: out for m, mine in seeds.items() if (out := _not_shared(ends[m], mine))}
    return AtEqualLearning(reference, level, lowest, found, left_out)


def _read(curve: np.ndarray, other: np.ndarray, level: float) -> Ratio:
    value, interval, seeds = _ratio(curve, other, [level]), None, len(curve)
    if seeds > 1 and value is not None:
        drawn = np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))
        if known := complete([_ratio(curve[rows], other[rows], [level]) for rows in drawn]):
            interval = (float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975)))
    return Ratio(level, value, interval)


def _ratio(curve: np.ndarray, other: np.ndarray, levels: Sequence[float]) -> float | None:
    """Of what two methods forget, [seeds, rates, 2] each, summed over the levels."""
    mine, theirs = (sum(read_at(c.mean(axis=0), x) for x in levels) for c in (curve, other))
    return mine / theirs if theirs > 0 else None


def read_at(curve: np.ndarray, level: float) -> float:
    """Forgotten at a level of learning, from points [rates, 2] (learned, forgotten) at ascending
    learning rates: linear between neighbours, and along the last two beyond the ends."""
    learned, forgotten = np.array(on_the_way(curve.tolist())).T
    if len(learned) == 1:
        return float(forgotten[0])
    i = int(np.clip(np.searchsorted(learned, level) - 1, 0, len(learned) - 2))
    rise = (forgotten[i + 1] - forgotten[i]) / (learned[i + 1] - learned[i])
    return float(forgotten[i] + rise * (level - learned[i]))


def _rates(runs: Mapping[int, Ends], seeds: Sequence[int]) -> list[float]:
    return sorted(set.intersection(*(set(runs[s]) for s in seeds))) if seeds else []


def _not_shared(runs: Mapping[int, Ends], seeds: Sequence[int]) -> list[float]:
    return sorted({rate for s in seeds for rate in runs[s]} - set(_rates(runs, seeds)))


def _curves(runs: Mapping[int, Ends], seeds: Sequence[int]) -> np.ndarray:
    """[seeds, rates, 2]"""
    rates = _rates(runs, seeds)
    return np.array([[runs[s][r] for r in rates] for s in seeds]).reshape(len(seeds), -1, 2)
