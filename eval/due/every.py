"""Stay alive and call something at once and then every so often."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from apscheduler.events import EVENT_JOB_ERROR, JobExecutionEvent
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.progress import say

LOOK = 5.0  # seconds between two looks at the clock
JUMP = 30.0  # seconds; a clock that moves by more against time that passed was set


def every(seconds: float, call: Callable[[Callable[[], bool]], object]) -> None:
    """Call `call(stop)` now and then every so many seconds, until SIGTERM or SIGINT.

    A call that takes longer than the interval is not overlapped: the ones that it covers are left
    out. The intervals are counted in time that passed, whatever the clock is set to meanwhile. An
    error of a call is printed and ends nothing.

    Args:
        call: is given a function that tells whether to stop.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)  # `_tell` does
    scheduler = BackgroundScheduler(timezone=timezone.utc)
    scheduler.add_listener(_tell, EVENT_JOB_ERROR)
    job = scheduler.add_job(
        call,
        IntervalTrigger(seconds=seconds, timezone=timezone.utc),
        args=[stop.is_set],
        next_run_time=_now(),
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,
    )
    scheduler.start()
    offset = time.time() - time.monotonic()
    while not stop.wait(LOOK):
        moved = time.time() - time.monotonic() - offset
        if abs(moved) > JUMP:
            offset += moved
            due = job.next_run_time + timedelta(seconds=moved)
            job.reschedule(IntervalTrigger(seconds=seconds, timezone=timezone.utc))
            job.modify(next_run_time=max(due, _now()))
            say(f"the clock was set by {moved:+,.0f} seconds; the next call is at {due:%F %T} UTC")
    say("stopping: what is under way is left to the next call")
    scheduler.shutdown(wait=True)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _tell(event: JobExecutionEvent) -> None:
    say(f"error: {event.exception}\nthe next call tries again")
