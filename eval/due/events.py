"""What there is to tell people: a run that finished or stopped, damage, a failed evaluation, a
regression. Each event has an id that stays the same from call to call, so that it is told once."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.analysis.falls import describe
from eval.analysis.load import LATER_WORK
from eval.due.whole import digest_of
from eval.report.index import Entry, Series

KINDS = ("finished", "failed", "regression")


@dataclass
class Event:
    id: str
    kind: str  # of KINDS
    run: str  # folder below the root
    title: str
    text: str
    page: str  # path of the page to look at


def failed(failure: dict[str, Any]) -> str:
    """What the index says of an evaluation that failed."""
    reason = failure["reason"]
    return f"{failure['where']}: {failure['kind']} could not be evaluated: {reason}"


def events_of(
    root: Path,
    entries: list[Entry],
    series: list[Series],
    failures: dict[str, dict[str, Any]],
    unfinished: Container[str] = (),
) -> list[Event]:
    """Everything that is so now, whether it was told before or not.

    unfinished: folders of runs that are still at work, or lack a result.
    """
    found: list[Event] = []
    for entry in entries:
        add = _adder(found, root, entry.folder, entry.page)
        digests = _digests(root / entry.folder)
        if entry.state == "finished" and entry.folder not in unfinished:
            add("finished", digests[-1:], f"{entry.folder} has finished", _numbers(entry))
        mine = [f for f in failures.values() if f["run"] == entry.folder]
        told = {failed(f) for f in mine}  # below, with a name of its own
        for problem in entry.problems:
            if problem in told or (mine and problem.endswith(LATER_WORK)):
                continue  # the result that is missing is that of the failed evaluation
            add("failed", [problem], f"{entry.folder}: {entry.state}", problem)
        by_stage = defaultdict(list)
        for fall in entry.falls:
            if fall.kind == "score":
                by_stage[fall.stage].append(fall)
        for stage, fallen in by_stage.items():
            text = "\n".join(describe(fall, entry.stages) for fall in fallen)
            what = [str(stage), *digests[stage : stage + 1], *(fall.what for fall in fallen)]
            add("regression", what, f"{entry.folder}: scores fell after stage {stage}", text)
    pages = {entry.folder: entry.page for entry in entries}
    for key, failure in failures.items():
        add = _adder(found, root, failure["run"], pages.get(failure["run"], False))
        title = f"{failure['run']}: an evaluation failed"
        add("failed", [key], title, f"{failure['where']}: {failure['reason']}")
    for one in series:
        for run, worse in zip(one.runs, one.worse, strict=True):
            if worse:
                add = _adder(found, root, run, pages.get(run, False))
                text = f"{one.what} is worse than in the run before of the same recipe"
                add("regression", ["over time", one.what], f"{run}: {text}", text)
    return list({event.id: event for event in found}.values())


def _adder(found: list[Event], root: Path, folder: str, page: bool) -> Callable[..., None]:
    where = f"{folder}/report/index.html" if page else "index.html"

    def add(kind: str, identity: list[str], title: str, text: str) -> None:
        name = "\0".join([kind, folder, *identity])
        id_ = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
        found.append(Event(id_, kind, folder, title, text, str(root / where)))

    return add


def _digests(run: Path) -> list[str]:
    """Of the checkpoint after each stage from 0; "" where there is none."""
    ends = sorted((run / "stages").glob("[0-9]*_*"))
    return [digest_of(end / "checkpoint") for end in ends]


def _numbers(entry: Entry) -> str:
    words = [f"{entry.method}, {len(entry.stages) - 1} stages"]
    known = (("learned", entry.learned), ("forgotten", entry.forgotten))
    words += [f"{value:+.3f} nats {name}" for name, value in known if value is not None]
    words += [f"{what} {100 * trend[-1][1]:.1f}%" for what, trend in entry.scores.items() if trend]
    return ", ".join(words)
