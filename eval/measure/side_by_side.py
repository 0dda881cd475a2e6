"""Run jobs side by side, each in a process of its own."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from eval.measure.command import ended
from eval.sandbox.jail import die_with_parent
from pipeline.errors import UserError
from pipeline.redact import redact

# Imported once, before the processes are forked: they take seconds. Only what does not touch a GPU.
PRELOADED = ["torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]


def run_side_by_side(
    function: Callable[..., None],
    jobs: Sequence[tuple],
    processes: int,
    ended: Callable[[int], None],
) -> dict[int, str]:
    """Call `function(*job)` for each job; returns why those failed that did, by their index.

    function: importable; what it finds, it writes into files.
    ended: called with the index of each job when it has ended, well or not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # OMP_NUM_THREADS may leave cores to others: threads that wait for one another lose most then.
    threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // processes))
    waiting = list(range(len(jobs)))
    running: dict[Any, tuple[int, Any, Any]] = {}
    failed: dict[int, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                index = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_job, args=(sender, threads, function, jobs[index]), daemon=True
                )
                process.start()
                sender.close()
                running[process.sentinel] = (index, process, receiver)
            for sentinel in wait(list(running)):
                index, process, receiver = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[index] = _reason(receiver, process.exitcode)
                ended(index)
    finally:
        for _, process, _ in running.values():
            process.kill()
    return failed


def _reason(receiver: Any, code: int) -> str:
    """What a process said before it ended, or how it ended without a word."""
    try:
        return receiver.recv()
    except EOFError:
        return ended("its process", code)


def _job(sender: Any, threads: int, function: Callable[..., None], job: tuple) -> None:
    die_with_parent(None)
    torch.set_num_threads(threads)
    try:
        function(*job)
    except UserError as error:
        sender.send(str(error))
        sys.exit(1)
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        sender.send(f"{type(error).__name__}: {error}")
        sys.exit(1)
