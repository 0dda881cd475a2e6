"""`report.py due` is killed at any moment and called again: nothing is lost, nothing is done twice,
and whoever reads meanwhile never sees half a page."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import eval.due.due
import eval.due.evaluate
from eval.due.due import due
from eval.due.evaluate import Outcome
from eval.report.page import write_report
from tests.published_runs import NOTIFY, index, published_run, started, told, working_directory

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    return working_directory(tmp_path, monkeypatch)


def measure(due, place, seconds, stop):
    """Without a process of its own: here are many."""
    with open("started.txt", "a") as file:
        file.write(due.task.checkpoint + "\n")
    with open(place / "eval.json", "w") as file:
        file.write('{"domains": {"a": {"loss": 4.0, "stderr": 0.01}')
        file.flush()
        file.write(', "b": {"loss": 4.0, "stderr": 0.01}}}')
    return Outcome("done")


def call(root, at=None, note=None):
    """A call in a process of its own, which SIGKILL ends at its event number `at` (a function or a
    method of C is called, or returns); meanwhile its pages are read. Whether it was killed.

    `note`: a file for the numbers of the events at which something is kept in one stroke, and the
    number of all events."""
    child = os.fork()
    if child == 0:
        try:
            count, strokes = 0, []

            def event(frame, kind, what):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if what is os.replace:
                    strokes.append(count)

            if at or note:
                threading.setprofile(event)  # messages are delivered by a thread
                sys.setprofile(event)
            due(root, notify=NOTIFY)
            sys.setprofile(None)
            if note:
                note.write_text(json.dumps([strokes, count]))
            os._exit(0)
        finally:
            os._exit(1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        read(root)
        if ended:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            return os.WIFSIGNALED(status)
        time.sleep(0.002)


def read(root):
    for page in (root / "index.html", root / "run" / "report" / "index.html"):
        if page.exists():
            assert page.read_text().rstrip().endswith("</html>")
    for numbers in (root / "index.json", *root.glob("run/stages/*/eval.json")):
        if numbers.exists():
            json.loads(numbers.read_text())


def left(root):
    """What is left in the end: the files and what the index says."""
    files = [p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json"]
    results = {p: p.read_text() for p in files if p.name == "eval.json"}
    return sorted(files), results, index(root)


def begin_again(root):
    shutil.rmtree(root)
    root.mkdir()
    published_run(root)
    for name in ("told.jsonl", "started.txt"):
        Path(name).unlink(missing_ok=True)


@pytest.mark.parametrize("real", [False, True] if EVERYTHING else [False], ids="real={}".format)
def test_a_call_that_is_killed_is_gone_on_with(root, monkeypatch, real):
    """Before and after what is kept in one stroke, and at moments spread over the whole call; the
    call after it is killed too, elsewhere. `real`: with the report's own pages."""
    if real:
        monkeypatch.setattr(eval.due.due, "write_report", write_report)
    monkeypatch.setattr(eval.due.evaluate, "_measure", measure)
    begin_again(root)
    due(root, notify=NOTIFY)  # what is imported late is
    begin_again(root)
    note = root.with_name("events.json")
    assert not call(root, note=note)
    expected, ids, starts = left(root), {event["id"] for event in told()}, len(started())
    assert ids
    strokes, events = json.loads(note.read_text())
    assert len(strokes) > 40  # each is two: it begins, it has ended
    few, many = ((12, 12) if real else (len(strokes), 150)) if EVERYTHING else (5, 4)
    moments = strokes[:: -(-len(strokes) // few)]
    moments += [1 + i * events // many for i in range(many)]
    kills = 0
    for number, moment in enumerate(moments):
        begin_again(root)
        kills_here = call(root, moment)
        kills_here += call(root, 1 + (moment * 7 + number) % events)
        for path in root.rglob(".*.tmp"):
            os.utime(path, (0, 0))  # what was being written goes, but not at once
        assert not call(root)
        assert left(root) == expected
        counts = Counter(event["id"] for event in told())
        assert set(counts) == ids
        assert counts.total() <= len(ids) + kills_here  # with the same id, after a kill in between
        assert starts <= len(started()) <= starts + kills_here
        kills += kills_here
    assert kills >= len(moments)
