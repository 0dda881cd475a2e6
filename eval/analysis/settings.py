"""The numbers that are compared: those of each setting, alone and at equal learning."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

from eval.analysis.matrix import Curve, between, complete, equal_learning, on_the_way

Name = tuple[str, ...]
"""("learned", setting), ("forgotten", setting), ("forgotten_equal", setting), each a mean over the
setting's runs, or ("between", method, setting): the method's forgetting, read between its learning
rates at what the setting learned."""


@dataclass
class Setting:
    """Runs that differ in their seed only; numbers are means over them, losses in nats a token."""

    name: str
    method: str  # without the learning rate
    lr: float
    runs: list[int]  # their places among the compared runs
    learned: float = 0.0
    forgotten: float = 0.0
    forgotten_equal: float | None = None
    humaneval: float | None = None  # greedy pass@1; None also where a run did not measure it
    benchmarks: float | None = None  # mean accuracy
    spread: dict[str, float] = field(default_factory=dict)  # sd over seeds; empty for one run


@dataclass
class Difference:
    """One number minus another, and how large it must be to tell (None: not known)."""

    value: float
    noise: float | None

    @property
    def within(self) -> bool:
        """Whether it is within the noise; what is written as 0.000 always is."""
        return self.noise is not None and abs(self.value) <= max(self.noise, 0.0005)


@dataclass
class Pair:
    """Two settings side by side: the second minus the first."""

    first: str
    second: str
    learned: Difference
    forgotten: Difference
    forgotten_equal: Difference | None


@dataclass
class Reading:
    """A method, read between its learning rates at the learning of another setting."""

    method: str
    at: str
    learned: float
    forgotten_read: float | None
    forgotten_measured: float
    difference: Difference | None  # measured minus read
    reason: str = ""  # why it cannot be read


def measure(
    curves: Sequence[Curve], settings: Sequence[Setting], equal: Sequence[int]
) -> dict[Name, float | None]:
    """Every number that is compared, read from the learning curves of all runs.

    `equal` are the places of the runs that are read at equal learning. None: cannot be read.
    """
    read = equal_learning({str(run): curves[run] for run in equal})["forgotten"]
    numbers: dict[Name, float | None] = {}
    points: dict[str, tuple[float, float]] = {}
    for setting in settings:
        ends = [curves[run][-1] for run in setting.runs]
        point = mean(x for x, _ in ends), mean(y for _, y in ends)
        numbers["learned", setting.name], numbers["forgotten", setting.name] = point
        levels = complete([read.get(str(run)) for run in setting.runs])
        numbers["forgotten_equal", setting.name] = mean(levels) if levels else None
        points[setting.name] = point
    own = by_rate(settings)
    for method, others in readable(settings).items():
        part = readable_part([points[setting.name] for setting in own[method]])
        for other in others:
            level = numbers["learned", other.name]
            assert level is not None
            numbers["between", method, other.name] = between(part if level > 0 else [], level)
    return numbers


def readable_part(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a method's (learned, forgotten) at ascending learning rates, those between which it is
    read: not where it has learned nothing."""
    return [point for point in on_the_way(points) if point[0] > 0]


def by_rate(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """By method, its settings at ascending learning rates."""
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        found.setdefault(setting.method, []).append(setting)
    return {method: sorted(own, key=lambda setting: setting.lr) for method, own in found.items()}


def readable(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """The methods with several learning rates, each with the settings of the other methods."""
    return {
        method: [other for other in settings if other.method != method]
        for method, own in by_rate(settings).items()
        if own[0].lr < own[-1].lr
    }


def pairs(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """The comparisons to tell: different methods at one learning rate; if there is no such pair,
    every setting against the first."""
    found = [(a, b) for a, b in combinations(settings, 2) if a.method != b.method and a.lr == b.lr]
    return found or [(settings[0], other) for other in settings[1:]]
