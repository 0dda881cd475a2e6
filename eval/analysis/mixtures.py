"""What the stages that read several domains read of each, and how its loss went."""

import statistics
from dataclasses import dataclass

from eval.analysis.files import finite
from eval.analysis.log import Log


@dataclass
class DomainShare:
    """One domain of one stage, over the steps that the log has.

    first, last: medians of its training loss over the first and the last tenth of the steps that
    predict any of its tokens (nats per token); None without such a step.
    """

    stage: int
    domain: str
    tokens: int
    share: float  # of the tokens of the stage
    predicted: int
    first: float | None
    last: float | None


def mixed_steps(log: Log) -> dict[int, list[dict]]:
    """stage -> its steps, of the stages that read several domains."""
    found: dict[int, list[dict]] = {}
    for step in log.steps:
        if step.get("domains"):
            found.setdefault(step["stage"], []).append(step)
    return found


def losses_of(domain: str, steps: list[dict]) -> list[tuple[int, float]]:
    """(step, mean loss) of a domain, where the step predicts any of its tokens."""
    found = [(s["step"], finite(s["domains"].get(domain, {}).get("loss"))) for s in steps]
    return [(step, loss) for step, loss in found if loss is not None]


def domain_shares(log: Log) -> list[DomainShare]:
    """Stage by stage, the domains in the order in which the log names them."""
    shares = []
    for stage, steps in mixed_steps(log).items():
        total = sum(d["tokens"] for s in steps for d in s["domains"].values())
        for domain in dict.fromkeys(name for s in steps for name in s["domains"]):
            mine = [s["domains"][domain] for s in steps if domain in s["domains"]]
            tokens = sum(d["tokens"] for d in mine)
            losses = [loss for _, loss in losses_of(domain, steps)]
            tenth = max(1, len(losses) // 10)
            shares.append(
                DomainShare(
                    stage,
                    domain,
                    tokens,
                    tokens / total if total else 0.0,
                    sum(d["predicted"] for d in mine),
                    statistics.median(losses[:tenth]) if losses else None,
                    statistics.median(losses[-tenth:]) if losses else None,
                )
            )
    return shares
