"""One call of `report.py due`: check, evaluate, write pages and the index, tell people.

It may be called as often as one likes, and be killed at any moment: every step writes what it made
in one stroke and notes it then, and the next call goes on from there.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.analysis.load import load_run
from eval.due.events import events_of, failed
from eval.due.folders import Found, checkpoints, find_folders, stage_folders, stamp
from eval.due.notify import Notify, send
from eval.due.state import FOLDER, State, locked, read_state
from eval.due.whole import damage_of
from eval.report.index import Entry, entry_of, from_json, over_time, write_index
from eval.report.page import write_report
from pipeline.checkpoint import is_published, remove_left_over
from pipeline.errors import UserError, advice
from pipeline.progress import say

if TYPE_CHECKING:
    from eval.due.evaluate import Due, Outcome

FORM = 1  # of an entry in the state; an older one is made again


@dataclass
class Call:
    """What one call knows."""

    root: Path
    state: State
    budget: float | None  # seconds; None: no limit
    end: float | None  # of it, by time.monotonic
    busy: set[str] = field(default_factory=set)  # folders of runs that train
    damage: dict[str, list[str]] = field(default_factory=dict)  # folder -> of its checkpoints
    unknown: dict[str, str] = field(default_factory=dict)  # folder -> why it is not evaluated
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float | None:
        """Seconds of the budget."""
        return None if self.end is None else self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left is not None and self.left <= 0


def due(
    root: Path,
    budget: float | None = None,
    notify: Notify | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Do all that is due in a folder of runs; the index page. None where another call does it.

    Args:
        budget: seconds for checking and evaluating; None: no limit.
        stop: asked every second; true ends the call early, with the pages of what was done.

    Raises:
        UserError: no such folder; it cannot be written; its state is damaged.
    """
    with locked(root) as mine:
        if not mine:
            say(f"{root}: another call is at work; nothing to do")
            return None
        end = None if budget is None else time.monotonic() + budget
        call = Call(root, read_state(root), budget, end)
        folders = find_folders(root)
        _tidy(call, folders)
        _check(call, folders)
        _pages(call, folders)
        _evaluate(call, folders, stop)
        page, entries = _pages(call, find_folders(root))
        if notify:
            unfinished = {one.folder for one in _find_due(call, folders)} | call.busy
            trends, failures = over_time(entries), call.state.failures
            events = events_of(root, entries, trends, failures, unfinished)
            for text in send(events, notify, call.state):
                say(f"not delivered, the next call tries again: {text}")
        return page


def _tidy(call: Call, folders: list[Found]) -> None:
    """Remove the half-written files of calls that were killed; nobody has ever read them."""
    runs = [found.path for found in folders if not found.problem]
    stages = (stage for run in runs for stage in stage_folders(run))
    for place in (call.root, call.root / FOLDER, *(run / "report" for run in runs), *stages):
        remove_left_over(place)


def _check(call: Call, folders: list[Found]) -> None:
    """Hash what was published and not hashed yet, as far as the budget reaches."""
    unchecked = 0
    names = set()
    for found in folders:
        for checkpoint in [] if found.problem else checkpoints(found.path):
            name = str(checkpoint.relative_to(call.root))
            names.add(name)
            if call.spent and name not in call.state.checkpoints:
                unchecked += 1
                continue
            damage = damage_of(checkpoint, name, call.state)
            if damage:
                call.damage.setdefault(found.folder, []).append(damage)
    for gone in set(call.state.checkpoints) - names:
        del call.state.checkpoints[gone]
    call.state.save()
    if unchecked:
        call.notes.append(f"{unchecked} checkpoints are not checked yet: the budget was spent.")


def _evaluate(call: Call, folders: list[Found], stop: Callable[[], bool]) -> None:
    from eval.due.evaluate import evaluate

    due = _find_due(call, folders)
    state, left = call.state, len(due)
    keys = {one.key for one in due}
    known = {found.folder for found in folders}
    for key, failure in list(state.failures.items()):
        if key not in keys and failure["run"] not in call.busy and failure["run"] in known:
            del state.failures[key]  # made good, or its checkpoint is gone
    due.sort(key=lambda one: (one.key != state.cut, _attempts(state, one)))
    for one in due:
        if call.spent or stop():
            break
        # One that nearly the whole budget does not suffice for will never end: that is a failure.
        short = call.budget is not None and (call.left or 0) < 0.9 * call.budget
        say(f"{one.folder}, {one.where}: measuring {one.kind}")
        outcome = evaluate(one, call.left, stop)
        if outcome.kind == "cut" and (stop() or short):
            state.cut = one.key
            state.save()
            break
        left -= 1
        state.cut = "" if state.cut == one.key else state.cut
        _note(call, one, outcome)
        state.save()
        _pages(call, folders)
    if left:
        call.notes.append(
            f"{left} evaluation{'s are' if left > 1 else ' is'} left for the next call"
            + (": the budget is spent." if call.spent else ".")
        )


def _find_due(call: Call, folders: list[Found]) -> "list[Due]":
    from eval.due.evaluate import find_due
    from pipeline.run.lock import is_held  # imports much

    found: list[Due] = []
    for folder in folders:
        if folder.problem or not is_published(folder.path / "heldout"):
            continue
        if is_held(folder.path):
            call.busy.add(folder.folder)
            continue
        try:
            found += find_due(folder.path, folder.folder)
        except (UserError, OSError, ValueError) as error:
            call.unknown[folder.folder] = f"It cannot be evaluated: {' '.join(str(error).split())}"
    return [one for one in found if not _is_damaged(call, one)]


def _is_damaged(call: Call, one: "Due") -> bool:
    with contextlib.suppress(ValueError, KeyError):
        name = str(Path(one.task.checkpoint).relative_to(call.root))
        return bool(call.state.checkpoints[name]["damage"])
    return False


def _attempts(state: State, one: "Due") -> int:
    return state.failures.get(one.key, {}).get("attempts", 0)


def _note(call: Call, one: "Due", outcome: "Outcome") -> None:
    state = call.state
    if outcome.kind == "done":
        state.failures.pop(one.key, None)
    elif outcome.kind == "gone":
        state.failures.pop(one.key, None)
        say(f"{one.folder}, {one.where}: its checkpoint was deleted or replaced meanwhile")
    else:
        reason = outcome.reason or "it takes longer than the whole budget; give a larger one"
        say(f"{one.folder}, {one.where}: {one.kind} failed: {reason}")
        state.failures[one.key] = {
            "run": one.folder,
            "where": one.where,
            "kind": one.kind,
            "reason": reason,
            "attempts": _attempts(state, one) + 1,
        }


def _pages(call: Call, folders: list[Found]) -> tuple[Path, list[Entry]]:
    """The page of each run that has changed, and the index."""
    entries = [_entry(call, found) for found in folders]
    for gone in set(call.state.runs) - {found.folder for found in folders}:
        del call.state.runs[gone]
    call.state.save()
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    try:
        return write_index(call.root, entries, made, call.notes), entries
    except OSError as error:
        help_ = advice(error) or "Mend it"
        raise UserError(f"cannot write the index of {call.root}: {error}. {help_}.") from None


def _entry(call: Call, found: Found) -> Entry:
    if found.problem:
        return Entry(found.folder, "unreadable", [found.problem])
    failures = [failed(f) for f in call.state.failures.values() if f["run"] == found.folder]
    if found.folder in call.unknown:
        failures.append(call.unknown[found.folder])
    damage = call.damage.get(found.folder, [])
    try:
        entry = _read(call, found)
    except UserError as error:
        return Entry(found.folder, "unreadable", [str(error), *damage, *failures])
    except Exception as error:  # whatever a damaged folder makes of the reader: the others go on
        reason = f"{type(error).__name__}: {error}"
        return Entry(found.folder, "unreadable", [reason, *damage, *failures])
    if damage:
        entry.state = "damaged"
    entry.problems = [*entry.problems, *damage, *failures]
    return entry


def _read(call: Call, found: Found) -> Entry:
    """From the state, where nothing has changed since; else the run's page is made with it."""
    now = stamp(found.path)
    known: dict[str, Any] = call.state.runs.get(found.folder, {})
    page = found.path / "report" / "index.html"
    if known.get("stamp") == now and known.get("form") == FORM and page.is_file():
        with contextlib.suppress(TypeError, KeyError):
            return from_json(known["entry"])
    entry = entry_of(load_run(found.path), found.folder)
    write_report(found.path)
    entry.page = page.is_file()
    call.state.runs[found.folder] = {"stamp": now, "form": FORM, "entry": asdict(entry)}
    call.state.save()
    return entry
