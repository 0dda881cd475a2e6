"""Run a function on several gloo ranks, each a process of its own."""

import gc
import os
import queue
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

# What takes a rank seconds to import: done once, by the server that the ranks are forked from.
PRELOADED = ["pipeline.run.run", "tests.reference"]
SILENCE = 600  # seconds without a report of any rank, after which they hang


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh process group; returns the ranks' results.

    `function` must be importable (a module-level function) and its result picklable. A failure of
    any rank raises here, with every failed rank's traceback or exit code.

    A segmentation fault is tried once more, with a warning: libtorch's gloo thread
    (`pt_gloo_runloop`) has crashed in malloc, once, which hundreds of repetitions did not bring
    back. No code here is native.
    """
    results, failures = _run(function, world_size, args)
    if any(f"exit code {-signal.SIGSEGV}" in f for f in failures):
        warnings.warn(f"{function.__name__} is run again:\n" + "\n".join(failures), stacklevel=2)
        results, failures = _run(function, world_size, args)
    if failures:
        raise AssertionError("\n".join(failures))
    return [results[r] for r in range(world_size)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(
    function: Callable[..., Any], world_size: int, args: tuple
) -> tuple[dict[int, Any], list[str]]:
    """The results by rank, and what went wrong on which rank."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reports = context.Queue()
    port = free_port()
    # As they are now, not as they were when the server began.
    here = os.getcwd(), dict(os.environ)
    ranks = [
        context.Process(target=_rank, args=(r, world_size, port, reports, here, function, args))
        for r in range(world_size)
    ]
    for p in ranks:
        p.start()
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    try:
        heard = time.monotonic()
        while len(results) + len(failures) < world_size:
            # Read first: a rank that ended may have reported before.
            ended = [r for r, p in enumerate(ranks) if p.exitcode is not None]
            try:
                rank, result, error = reports.get(timeout=1)
            except queue.Empty:
                silent = [r for r in ended if r not in results and r not in failures]
                failures |= {r: f"exit code {ranks[r].exitcode}" for r in silent}
                if failures and not silent:
                    break  # the others wait for a rank that has failed
                if time.monotonic() - heard > SILENCE:
                    raise
                continue
            heard = time.monotonic()
            if error:
                failures[rank] = error
            else:
                results[rank] = result
    finally:
        for p in ranks:
            p.join(timeout=0.1 if failures else 10)
            if p.is_alive():
                p.kill()
    return results, [f"rank {r} failed:\n{failures[r]}" for r in sorted(failures)]


def _rank(rank, world_size, port, reports, here, function, args):
    gc.freeze()  # what was imported: else each full collection walks it, a quarter of the time
    folder, environment = here
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TOKENIZERS_PARALLELISM="false",
    )
    torch.set_num_threads(1)
    try:
        from pipeline.engine.distributed import start_distributed

        start_distributed()
        result = function(*args)
        torch.distributed.barrier()
        reports.put((rank, result, None))
    except BaseException:
        reports.put((rank, None, traceback.format_exc()))
