"""The end tasks of a run: the stage x task matrix, and the numbers that the paper reads from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.analysis.files import Damaged, finite, named, read_json
from eval.analysis.load import Run

KEYS = ("score", "accuracy")
DEFINITIONS = {
    "score": "MF1: mean over the end tasks of the macro-F1 after the last stage (of ChemProt the "
    "micro-F1); where every stage has a model of its own, after the stage of the task's domain.",
    "accuracy": "ACC: mean over the end tasks of the accuracy after the last stage.",
    "forgetting": "Forgetting rate: mean over the tasks whose domain was trained before the last "
    "stage of the value right after that domain minus the final value; positive means forgotten.",
}
# Of Student's t, two-sided 95 %, by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class Estimate:
    """A mean, and half the width of its 95 % interval (None: of one number alone)."""

    mean: float
    half: float | None


@dataclass
class EndTaskMatrix:
    """values[stage][task][key] is a list, a number per seed; `own` has the stage of a task's
    domain, without those that no stage trains on. alone: every stage has a model of its own, so
    that a task's result is the one right after its domain's stage (One, DEMIX, HAT)."""

    last: int
    tasks: list[str]
    own: dict[str, int]
    metrics: dict[str, str]
    values: dict[int, dict[str, dict[str, list[float]]]]
    alone: bool = False

    def final(self, key: str) -> list[float]:
        """The mean over the tasks of their results, per seed; [] if one is missing."""
        return self._mean([self.result(task, key) for task in self.tasks])

    def forgetting(self, key: str) -> list[float]:
        """Per seed, as DEFINITIONS says; [] where it is not defined or something is missing, also a
        seed."""
        old = [task for task in self.tasks if self.own.get(task, self.last) < self.last]
        before = self._mean([self.at(self.own[task], task, key) for task in old])
        after = self._mean([self.result(task, key) for task in old])
        if len(before) != len(after):
            return []
        return [b - a for b, a in zip(before, after, strict=True)]

    def of_stages(self, stages: Sequence[int], key: str) -> list[float]:
        """The final mean over the tasks of some stages, per seed (the paper's Table 4); [] of a
        single stage, which has no first and last domains."""
        if self.last < 2:
            return []
        chosen = [task for task in self.tasks if self.own.get(task) in stages]
        return self._mean([self.result(task, key) for task in chosen])

    def result(self, task: str, key: str) -> list[float]:
        """Per seed, after the last stage or, where the stages are `alone`, after the task's own."""
        stage = self.own.get(task, self.last) if self.alone else self.last
        return self.at(stage, task, key)

    def at(self, stage: int, task: str, key: str) -> list[float]:
        """Per seed; [] where it was not measured."""
        return self.values.get(stage, {}).get(task, {}).get(key, [])

    def _mean(self, columns: list[list[float]]) -> list[float]:
        seeds = {len(column) for column in columns}
        if len(seeds) != 1:
            return []
        return [sum(row) / len(row) for row in zip(*columns, strict=True)]


def read_end_tasks(run: Run) -> tuple[EndTaskMatrix | None, list[str]]:
    """What a run has of end tasks, and warnings about what of it cannot be read."""
    stages: dict[int, dict[str, dict[str, list[float]]]] = {}
    about = _asked_for(run.recipe)
    warnings: list[str] = []
    for stage in range(len(run.matrix.stages)):
        for folder in sorted((run.path / "stages").glob(f"{stage:02d}_*")):
            path = folder / "end_tasks.json"
            try:
                record = read_json(path)
                if record is not None:
                    stages[stage] = {n: _values(t) for n, t in record["tasks"].items()}
                    about |= record["tasks"]
            except Damaged as damaged:
                warnings.append(str(damaged))
            except (KeyError, TypeError, AttributeError, ValueError):
                warnings.append(f"{named(path)} holds no end tasks and is left out.")
    if not stages:
        return None, warnings
    trained = run.trained
    own = {n: trained[t["domain"]] for n, t in about.items() if t.get("domain") in trained}
    metrics = {n: str(t.get("metric") or "") for n, t in about.items()}
    return (
        EndTaskMatrix(run.matrix.last, list(about), own, metrics, stages, run.matrix.alone),
        warnings,
    )


def _asked_for(recipe: dict) -> dict[str, dict]:
    """The end tasks of a recipe: as long as one is not measured, a mean over them is not known."""
    asked = (recipe.get("evaluate") or {}).get("end_tasks")
    tasks = asked.get("tasks") if isinstance(asked, dict) else None
    return {
        name: {"domain": task.get("domain") or name, "metric": task.get("metric")}
        for name, task in (tasks if isinstance(tasks, dict) else {}).items()
        if isinstance(task, dict)
    }


def estimate(runs: Sequence[list[float]]) -> Estimate | None:
    """Of numbers per seed of the end tasks, for each run: over the runs where there are several,
    else over the seeds; None where one is missing."""
    if not runs or not all(runs):
        return None
    means = [sum(seeds) / len(seeds) for seeds in runs]
    return _interval(means if len(means) > 1 else runs[0])


def table(runs: Sequence[EndTaskMatrix]) -> dict[str, Estimate | None]:
    """The numbers of Tables 3 and 4 of runs that differ in their seed alone."""

    def over(function: Callable[[EndTaskMatrix], list[float]]) -> Estimate | None:
        return estimate([function(run) for run in runs])

    found = {key: over(lambda run, key=key: run.final(key)) for key in KEYS}  # type: ignore[misc]
    for key in KEYS:
        found[f"forgetting_{key}"] = over(lambda run, key=key: run.forgetting(key))  # type: ignore[misc]
    found["first_two"] = over(lambda run: run.of_stages((1, 2), "accuracy"))
    found["last_two"] = over(lambda run: run.of_stages((run.last - 1, run.last), "accuracy"))
    return found


def _interval(values: Sequence[float]) -> Estimate:
    mean = sum(values) / len(values)
    free = len(values) - 1
    if not free:
        return Estimate(mean, None)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / free)
    quantile = T_95[free - 1] if free <= len(T_95) else 1.96 + 2.5 / free
    return Estimate(mean, quantile * deviation / math.sqrt(len(values)))


def _values(task: dict) -> dict[str, list[float]]:
    found = {key: [finite(seed[key]) for seed in task["seeds"].values()] for key in KEYS}
    if any(value is None for column in found.values() for value in column):
        raise ValueError("no number")
    return {key: [float(v) for v in column if v is not None] for key, column in found.items()}
