"""Run a function on several gloo ranks, each a process of its own."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh process group; returns the ranks' results.

    `function` must be importable (a module-level function) and its result picklable. A failure of
    any rank raises here, with that rank's traceback.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(r, world_size, port, queue, function, args))
        for r in range(world_size)
    ]
    for p in ranks:
        p.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, error = queue.get(timeout=600)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    finally:
        for p in ranks:
            p.join(timeout=10 if len(results) == world_size else 0.1)
            if p.is_alive():
                p.kill()
    return [results[r] for r in range(world_size)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, world_size, port, queue, function, args):
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
        from pipeline.engine.zero import start_distributed

        start_distributed()
        result = function(*args)
        torch.distributed.barrier()
        queue.put((rank, result, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
