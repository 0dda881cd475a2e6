"""A stage that ends when it has learned enough: `stop` of the recipe."""

from collections.abc import Callable

from pipeline.progress import EventLog, say
from pipeline.recipe import Recipe, Stop


class Target:
    """Measures the held-out loss of a domain every so many steps of a stage, until it has fallen to
    what the recipe asks for.

    The schedule knows nothing of it: it runs over the stage's whole length, so that a linear one is
    still high when the stage ends early.
    """

    def __init__(
        self, stop: Stop, stage: int, steps: int, measure: Callable[[str], float],
        log: EventLog | None,
    ):  # fmt: skip
        """
        Args:
            stop: with its domain (`Recipe.stop_of`).
            steps: of the stage, at most.
            measure: a domain's loss with the weights as they are, alike on all ranks, which all
                call it.
            log: None on every rank but 0.
        """
        assert stop.domain is not None
        self._stop, self._domain = stop, stop.domain
        self._stage, self._steps = stage, steps
        self._measure, self._log = measure, log

    def reached(self, step: int) -> bool:
        """Whether the stage ends here, after this step; every rank calls it after every step."""
        if step % self._stop.steps and step != self._steps:
            return False
        loss = self._measure(self._domain)
        done = loss <= self._stop.loss
        if self._log is not None:
            self._log.write(
                "target", stage=self._stage, domain=self._domain, step=step, loss=loss,
                target=self._stop.loss, reached=done,
            )  # fmt: skip
            if done:
                say(f"  held-out loss of {self._domain} {loss:.3f} <= {self._stop.loss:g} "
                    f"(stop.loss): the stage ends after step {step}")  # fmt: skip
            elif step == self._steps:
                say(f"  held-out loss of {self._domain} {loss:.3f} has not reached stop.loss="
                    f"{self._stop.loss:g} by the end of the stage")  # fmt: skip
        return done


def target_of(
    recipe: Recipe, stage: int, steps: int, measure: Callable[[str], float], log: EventLog | None
) -> Target | None:
    """Of a stage; None where it has none."""
    stop = recipe.stop_of(stage)
    return None if stop is None else Target(stop, stage, steps, measure, log)
