"""The forgetting guard: one domain or benchmark, watched within a stage (docs/faults.md).

Nats of held-out text, or points of the benchmark, against a reference: the run's stage 0, or the
stage's own start. What the guard does when the stage forgets too much is the recipe's choice; it
never trains on that text.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint import is_published, read_manifest
from pipeline.errors import everywhere
from pipeline.methods.method import Method, published
from pipeline.nodes import send_folder
from pipeline.progress import EventLog, say
from pipeline.ranks import on_rank0
from pipeline.recipe import Guard
from pipeline.run.evaluation import RESULTS
from pipeline.run.published import publish_trained, read_masters, remove

KEPT = "guarded"  # beside a stage's checkpoint while it trains: the weights of the last good check
LOWERED = 0.5  # of the learning rate, each time


class Watch:
    """Of a stage. Every rank has one; the numbers are alike on all of them."""

    def __init__(
        self,
        settings: Guard,
        stage: int,
        steps: int,
        measure: Callable[[int], float | None],
        keep: Callable[[int], None],
        log: EventLog | None,
    ):
        """
        Args:
            steps: of the stage: its last one is checked too.
            measure: nats of the domain, or points of the benchmark, with the weights as they are
                behind a step; None where that failed. All ranks call it.
            keep: keeps the weights as they are behind a step, as the last good ones, instead of
                those kept before; all ranks call it. Only called with the action `stop`.
            log: None on every rank but 0.
        """
        self._settings, self._stage, self._steps = settings, stage, steps
        self._measure, self._keep, self._log = measure, keep, log
        self.reference: float | None = None
        self._checked = 0  # the step of the last check
        self.lr_factor = 1.0
        self.stopped_at: int | None = None

    def begin(self, base: Path, before: Path) -> None:
        """Where the stage starts (not where it goes on). base, before: the folders of the results
        of stage 0, and of what the stage starts from.

        Raises:
            UserError: on every rank: the benchmark has no result there.
        """
        g = self._settings
        if g.benchmark is not None:
            place = base if g.against == "base" else before
            self.reference = points_of(place, g.benchmark)
            if self.reference is None:
                raise everywhere(
                    f"guard.benchmark: {place} has no result of {g.benchmark}: its evaluation has "
                    "failed or was skipped; mend that and run the same command again"
                )
        elif g.against == "stage":
            self.reference = self._measure(0)
        else:
            result = base / RESULTS["heldout"]
            domains = on_rank0(lambda: json.loads(result.read_text(encoding="utf-8"))["domains"])
            self.reference = float(domains[g.domain]["loss"])
        if g.action == "stop":
            self._keep(0)

    def after_step(self, step: int) -> bool:
        """Whether the stage ends here: then the weights kept last are to be published. All ranks
        call it after every step."""
        g = self._settings
        if (step % g.steps and step != self._steps) or step <= self._checked:
            return False
        assert self.reference is not None
        value = self._measure(step)
        self._checked = step
        if value is None:
            if self._log is not None:
                say(f"  guard: step {step} could not be checked, as {g.benchmark} has no result")
            return False
        if g.benchmark is None:
            what, limit = f"held-out loss of {g.domain} has risen", g.max_rise
            worse, unit = value - self.reference, "nats"
            record = {"domain": g.domain, "loss": value, "rise": worse, "max_rise": limit}
        else:
            what, limit = f"{g.benchmark} has fallen", g.max_fall
            worse, unit = self.reference - value, "points"
            record = {"benchmark": g.benchmark, "points": value, "fall": worse, "max_fall": limit}
        forgets = not worse <= limit  # what is no number too
        if self._log is not None:
            self._log.write(
                "guard", stage=self._stage, step=step, **record, against=g.against,
                action=g.action if forgets else None,
            )  # fmt: skip
        if not forgets:
            if g.action == "stop":
                self._keep(step)
            return False
        if g.action == "lower_lr":
            self.lr_factor *= LOWERED
        if self._log is not None:
            say(f"  guard: {what} by {worse:.3f} {unit}, over {limit:g}; {self._consequence()}")
        if g.action == "stop":
            self.stopped_at = step
            return True
        return False

    def lr(self) -> float:
        """What the scheduled learning rate is multiplied with."""
        return self.lr_factor

    def end(self, kept: "KeptWeights") -> dict[str, Any] | None:
        """Behind the stage's last step: where the guard ended it, the engine gets the kept weights.
        What the log says of it."""
        if self.stopped_at is None:
            return None
        return {"stopped_at": self.stopped_at, "published": kept.restore()}

    def _consequence(self) -> str:
        return {
            "stop": "the stage ends with the weights of the last check that passed",
            "lower_lr": f"the learning rate goes on at {self.lr_factor:g} of its schedule",
            "warn": "training goes on",
        }[self._settings.action]

    # What a resume checkpoint keeps of it.
    name = "guard"

    def state_shards(self) -> Iterable[Any]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference, "lr_factor": self.lr_factor, "checked": self._checked,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference = state["reference"]
        self.lr_factor = min(self.lr_factor, state["lr_factor"])  # what was lowered stays so
        self._checked = max(self._checked, state["checked"])


class KeptWeights:
    """What would have been published behind the last check that passed, in fp32, on the disk: the
    run may be killed and go on. All ranks call everything."""

    def __init__(self, stage: Path, engine: Any, methods: Sequence[Method]):
        """stage: its folder."""
        self._stage, self._engine, self._methods = stage, engine, methods

    def keep(self, step: int) -> None:
        """In place of those kept before, which are deleted when these are on the disk."""
        target = self._stage / f"{KEPT}-{step:06d}"
        with published(self._engine, self._methods):
            publish_trained(target, self._engine, {"step": step})
        for older in on_rank0(self._all):
            if older != target:
                remove(older)

    def restore(self) -> int:
        """Give the engine the kept weights; the step behind which they were so."""
        kept = on_rank0(self._all)[-1]
        send_folder(kept)
        self._engine.load_weights(read_masters(kept))
        return int(on_rank0(lambda: read_manifest(kept)["step"]))

    def remove(self) -> None:
        for kept in on_rank0(self._all):
            remove(kept)

    def _all(self) -> list[Path]:
        """The newest last."""
        return sorted(p for p in self._stage.glob(f"{KEPT}-*") if is_published(p))


def points_of(folder: Path, benchmark: str) -> float | None:
    """Points (of 100) of a benchmark's result there; None without one. All ranks call it."""

    def read() -> float | None:
        result = folder / RESULTS["benchmarks"]
        if not result.is_file():
            return None
        found = json.loads(result.read_text(encoding="utf-8"))["benchmarks"].get(benchmark)
        return None if found is None else 100 * float(found["value"])

    return on_rank0(read)


def watch_of(
    settings: Guard | None,
    stage: int,
    steps: int,
    loss: Callable[[str], float],
    evaluated: Callable[[int], Path],
    kept: KeptWeights,
    log: EventLog | None,
) -> Watch | None:
    """Of a stage; None where the recipe has none.

    Args:
        loss: a domain's held-out loss with the weights as they are.
        evaluated: evaluates the weights as they are behind a step; where the results are.
    """
    if settings is None:
        return None

    def measure(step: int) -> float | None:
        if settings.benchmark is not None:
            return points_of(evaluated(step), settings.benchmark)
        assert settings.domain is not None  # the recipe was checked
        return loss(settings.domain)

    return Watch(settings, stage, steps, measure, kept.keep, log)
