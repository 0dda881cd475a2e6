"""What becomes of a step whose numbers are bad: `bad_steps` of the recipe (docs/faults.md)."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.errors import TrainingStopped
from pipeline.progress import EventLog, say
from pipeline.ranks import gather
from pipeline.recipe import BadSteps

FLOOR = 1e-3  # nats; losses that hardly differ have no spikes
NAMED = 8  # documents in a message; the log has all


class BadStepRule:
    """Of a stage. Every rank has one, and all of them decide alike: from numbers that all have."""

    def __init__(
        self,
        settings: BadSteps,
        stage: int,
        name: str,
        log: EventLog | None = None,
        documents: Callable[[], list[dict[str, Any]]] = list,
    ):
        """
        Args:
            stage, name: of the stage.
            log: None on every rank but 0.
            documents: what this rank has read for the step (`StageBatches.documents`).
        """
        self._settings, self._log = settings, log
        self._stage, self._place = stage, f"stage {stage} ({name})"
        self._documents = documents
        # `Attempt.go_back`: to the newest resume checkpoint, whose step it gives, if there is one.
        self.go_back: Callable[[], int | None] | None = None
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._left_out = 0

    def problem(self, losses: dict[str, float]) -> str | None:
        """What is wrong with a step's losses (nats, by name; "loss" is that of the new text)."""
        for what, value in losses.items():
            if not math.isfinite(value):
                return f"the loss {'' if what == 'loss' else f'of {what} '}is {value}"
        loss, window = losses["loss"], self._settings.window
        if self._settings.spike is not None and len(self._losses) == window:
            mean = sum(self._losses) / window
            deviation = math.sqrt(sum((x - mean) ** 2 for x in self._losses) / window)
            limit = mean + self._settings.spike * max(deviation, FLOOR)
            if loss > limit:
                return (
                    f"the loss {loss:.4f} is a spike: over {limit:.4f}, the mean {mean:.4f} of the "
                    f"last {window} steps and {self._settings.spike:g} standard deviations"
                )
        return None

    def good(self, loss: float) -> None:
        """A step was taken."""
        self._losses.append(loss)

    def dropped(self, step: int, problem: str) -> None:
        """A step was dropped, with weights and moments as they were. All ranks call it.

        Raises:
            TrainingStopped: the recipe says so, or has no budget left; names the documents.
        """
        read = [document for found in gather(self._documents()) for document in found]
        if self._log is not None:
            self._log.write(
                "bad_step", stage=self._stage, step=step, problem=problem,
                policy=self._settings.policy, documents=read,
            )  # fmt: skip
        what = f"{self._place}, step {step}: {problem}{_described(read)}"
        if self._settings.policy == "stop":
            raise TrainingStopped(what)
        self._left_out += 1
        if self._left_out > self._settings.budget:
            raise TrainingStopped(
                f"{what}; {self._settings.budget} steps of the stage (bad_steps.budget) were left "
                "out before"
            )
        done = "the step is left out"
        if self._settings.policy == "rollback" and self.go_back is not None:
            left_out = self._left_out
            behind = self.go_back()
            self._left_out = left_out
            self._losses.clear()
            done = "there is no resume checkpoint yet; the step is left out"
            if behind is not None:
                done = f"back to the weights behind step {behind}, and on with the next documents"
        if self._log is not None:
            say(f"{what}; {done}")

    # What a resume checkpoint keeps of it.
    name = "bad_steps"

    def state_shards(self) -> Iterable[Any]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "left_out": self._left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.extend(state["losses"])
        self._left_out = state["left_out"]


def _described(read: list[dict[str, Any]]) -> str:
    names: dict[str, list[int]] = {}
    for document in read:
        numbers = names.setdefault(document["domain"], [])
        if document["document"] not in numbers:
            numbers.append(document["document"])
    parts = []
    for name, numbers in names.items():
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        parts.append(f"{name} {', '.join(map(str, numbers[:NAMED]))}{more}")
    return f" (it read documents {'; '.join(parts)})" if parts else ""
