"""Runs to a target: the held-out loss at which a stage was to end, and what became of it."""

from dataclasses import dataclass

from eval.analysis.files import finite
from eval.analysis.load import Run
from eval.analysis.text import number


@dataclass
class Target:
    """What `stop` of the recipe asks of a stage. Losses in nats per predicted token."""

    stage: int
    domain: str
    wanted: float
    measured: float | None  # last; None: not yet
    step: int | None  # when that was
    seconds: float | None  # of training, until the stage ended; None: it has not

    @property
    def reached(self) -> bool:
        return self.measured is not None and self.measured <= self.wanted

    def told(self) -> str:
        """One sentence for people."""
        what = (
            f"Stage {self.stage} was to end at a held-out loss of {self.wanted:g} on {self.domain}"
        )
        if self.measured is None:
            return f"{what}: not measured yet"
        if not self.reached:
            return f"{what}: not reached, {number(self.measured)} after step {self.step}"
        time = "" if self.seconds is None else f", {self.seconds:,.0f} s of training"
        return f"{what}: reached with {number(self.measured)} after step {self.step}{time}"


def targets_of(run: Run) -> list[Target]:
    """Of the stages that have one, in their order."""
    found = []
    common = run.recipe.get("stop")
    for stage, s in enumerate(run.recipe["stages"], start=1):
        domains = [s["domain"]] if isinstance(s["domain"], str) else list(s["domain"])
        stop = s.get("stop") or common
        if not isinstance(stop, dict) or finite(stop.get("loss")) is None:
            continue
        domain = stop.get("domain") or domains[0]
        if stop is common and domain not in domains:
            continue
        seen = run.log.targets.get(stage, {})
        found.append(
            Target(
                stage,
                domain,
                stop["loss"],
                seen.get("loss"),
                seen.get("step"),
                run.log.ends.get(stage, {}).get("seconds"),
            )
        )
    return found


def same_targets(runs: list[Run]) -> bool:
    """Whether every stage of every run has a target, and all runs have the same."""
    asked = [[(t.stage, t.domain, t.wanted) for t in targets_of(run)] for run in runs]
    return all(
        mine == asked[0] and len(mine) == run.matrix.last
        for run, mine in zip(runs, asked, strict=True)
    )
