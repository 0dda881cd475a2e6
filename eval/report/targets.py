"""The comparison's main table where all runs train to the same target: what that cost each."""

import statistics
from dataclasses import dataclass
from typing import Any

from eval.analysis.settings import Setting
from eval.analysis.targets import same_targets, targets_of
from eval.analysis.text import number


@dataclass
class ToTarget:
    """A setting's runs (they differ in their seed only) that all had the same targets."""

    name: str
    run: str  # the number of one of them, for its colour
    runs: int
    reached: int  # of them, all targets
    missed: str  # what the first that did not reach them lacks; "" where all did
    learned: str  # nats per token, over the runs: mean ± standard deviation
    forgotten: str
    seconds: str  # of training, over all stages
    ratio: float | None  # of seconds, to the first setting


def to_targets(rows: list[Any], settings: list[Setting]) -> list[ToTarget]:
    """A line per setting whose runs are finished; nothing where the runs have no targets, or
    different ones."""
    if not same_targets([row.run for row in rows]):
        return []
    found: list[ToTarget] = []
    first = None  # seconds of the first setting; None where a stage's are not known
    for setting in settings:
        members = [rows[place] for place in setting.runs]
        if not all(row.run.finished for row in members):
            continue
        targets = [targets_of(row.run) for row in members]
        missed = [t for mine in targets for t in mine if not t.reached]
        known = all(t.seconds is not None for mine in targets for t in mine)
        times = [sum(t.seconds or 0.0 for t in mine) for mine in targets]
        mean = statistics.mean(times) if known else None
        first = first if found else mean
        found.append(
            ToTarget(
                name=setting.name,
                run=str(members[0].number),
                runs=len(members),
                reached=sum(all(t.reached for t in mine) for mine in targets),
                missed=missed[0].told() if missed else "",
                learned=_over([row.learned for row in members]),
                forgotten=_over([row.forgotten for row in members]),
                seconds=_over(times, 1) if known else "—",
                ratio=mean / first if mean and first else None,
            )
        )
    return found


def _over(values: list[float], digits: int = 3) -> str:
    spread = f" ± {number(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return number(statistics.mean(values), digits) + spread
