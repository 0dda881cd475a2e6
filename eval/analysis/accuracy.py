"""The stage x task matrix of accuracies (a[t][i], exact match), and how sure its metrics are.

The metrics are those of `matrix.py`, whose definitions hold for scores as for losses: `acc` is the
paper's A_T, and what improves is positive but for `forgetting`. Their interval is a bootstrap over
tasks and, of several runs that differ in their seeds, over these: what another draw of tasks and
seeds would have given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.analysis.load import Run
from eval.analysis.matrix import METRICS, Matrix

DRAWS = 2000
LEVEL = 0.95

DEFINITIONS = {
    "acc": "ACC: mean over the trained tasks of a[T][i], after the last stage (the paper's A_T).",
    "bwt": "BWT: mean over the tasks before the last of a[T][i] - a[i][i]; negative means that "
    "they got worse.",
    "forgetting": "Forgetting: mean over the tasks before the last of the best a[t][i] from their "
    "own stage to the one before the last, minus a[T][i].",
    "fwt": "FWT: mean over the tasks after the first of a[i-1][i] - a[0][i], where row 0 is the "
    "model before any stage.",
    "base_retention": "Base retention: mean change from row 0 to the end of the tasks that no "
    "stage trains on.",
}


@dataclass
class Estimate:
    """A metric, and its bootstrap interval (None: too few tasks to draw from)."""

    value: float
    interval: tuple[float, float] | None = None


def accuracy_matrix(run: Run) -> Matrix | None:
    """a[t][i] in 0..1 of the tasks of a run; None where no task was measured."""
    ends = {p.stage: p.task_scores for p in run.points if p.step is None}
    tasks = list(dict.fromkeys(name for scores in ends.values() for name in scores))
    if not tasks:
        return None
    stages = run.matrix.stages
    values: list[list[float | None]] = [
        [s.value if (s := ends.get(t, {}).get(name)) else None for name in tasks]
        for t in range(len(stages))
    ]
    trained = {name: run.trained[name] for name in tasks if name in run.trained}
    order = sorted(tasks, key=lambda name: trained.get(name, 0))
    columns = [tasks.index(name) for name in order]
    values = [[row[i] for i in columns] for row in values]
    # With `epi` the model of each stage answers with the adapters of all stages before it.
    alone = run.matrix.alone and not run.recipe.get("epi")
    return Matrix(stages, order, trained, values, lower_is_better=False, alone=alone)


def estimates(matrices: Sequence[Matrix]) -> dict[str, Estimate]:
    """The metrics of runs of one recipe that differ in their seeds: the means over the runs, with
    bootstrap intervals. Metrics that a run does not have are left out."""
    found = {}
    for key, metric in METRICS.items():
        known = [v for m in matrices if (v := metric(m)) is not None]
        if known and len(known) == len(matrices):
            found[key] = Estimate(float(np.mean(known)), bootstrap(metric, matrices))
    return found


def bootstrap(
    metric: Callable[[Matrix], float | None], matrices: Sequence[Matrix], seed: int = 0
) -> tuple[float, float] | None:
    """The interval of LEVEL of the metric's mean over runs, drawing runs and tasks with
    replacement; a draw without a task that the metric is of is left out."""
    tasks = matrices[0].domains
    if len(tasks) < 2:
        return None
    # Every metric is a mean over tasks, so that it is known of each task by itself.
    parts = np.array([[metric(_alone(m, task)) for task in tasks] for m in matrices], float)
    contributing = ~np.isnan(parts).all(axis=0)
    if len(matrices) < 2 and contributing.sum() < 2:
        return None  # one number says nothing of how others would differ
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(tasks), size=(DRAWS, 1, len(tasks)))
    runs = rng.integers(len(matrices), size=(DRAWS, len(matrices), 1))
    drawn = parts[runs, chosen].reshape(DRAWS, -1)
    known = drawn[~np.isnan(drawn).all(axis=1)]
    if len(known) < DRAWS // 2:
        return None
    low, high = np.quantile(np.nanmean(known, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _alone(matrix: Matrix, task: str) -> Matrix:
    """The matrix of one of its tasks."""
    column = matrix.domains.index(task)
    trained = {task: matrix.trained[task]} if task in matrix.trained else {}
    values = [[row[column]] for row in matrix.values]
    return replace(matrix, domains=[task], trained=trained, values=values)
