"""One number for how a run ended, to choose among the settings of a method."""

from eval.analysis.accuracy import accuracy_matrix
from eval.analysis.load import Run
from eval.analysis.matrix import acc
from pipeline.errors import UserError


def score(run: Run) -> float:
    """Higher is better: the mean accuracy on the trained tasks after the last stage (ACC), where a
    run has tasks; else minus the mean held-out loss of the trained domains, nats per token.

    Raises:
        UserError: nothing was measured after the last stage.
    """
    tasks = accuracy_matrix(run)
    found = acc(tasks if tasks is not None else run.matrix)
    if found is None or not run.finished:
        raise UserError(f"{run.name}: its end was not measured, so that no best run can be chosen")
    return found if tasks is not None else -found
