"""Small helpers for code that several ranks run together."""

import os
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import heartbeat, signals
from pipeline.errors import Interrupted, UserError

PASSED_ON = (UserError, OSError, Interrupted)  # by rank 0 to all; of others their text alone
T = TypeVar("T")

_numbers = count()  # of the meetings, the same on every rank


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def on_rank0(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its (picklable) result to every rank.

    It may take hours. An exception on rank 0 is raised on every rank, so that none is left waiting;
    `error.everywhere` says so.

    Raises:
        RankLost: a rank is gone.
    """
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    heart, done = heartbeat.mine(), f"done/{next(_numbers)}"
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if isinstance(error, PASSED_ON) else RuntimeError(repr(error))
        if heart:
            heart.say(done)
    elif heart:  # not in a collective, which has a timeout
        heart.wait(lambda: heart.said(done))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].everywhere = True
        raise outcome[1]
    return outcome[0]


def meet() -> None:
    """Wait until every rank is here, however long the work before takes each of them.

    Raises:
        RankLost: a rank is gone.
        Interrupted: the run is to end; on every rank, as none goes on without the others.
    """
    if world_size() == 1:
        return
    heart, here = heartbeat.mine(), f"here/{next(_numbers)}"
    if heart is None:
        dist.barrier()
        return
    heart.count(here, 1)

    def complete() -> bool:
        if heart.count(here, 0) == world_size():
            return True
        signals.check()
        return False

    heart.wait(complete)


def gather(value: Any) -> list[Any]:
    """Every rank's (picklable) value, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank; the same on every rank. It waits for no GPU."""
    if world_size() == 1:
        return list(flags)
    buffer = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=_on_cpu())
    return [bool(f) for f in buffer.tolist()]


def end_if_asked() -> None:
    """A safe point: nothing that this run has done is lost here. All ranks call it.

    Raises:
        Interrupted: a rank was asked to end; on every rank.
    """
    if any_rank(signals.asked() is not None)[0]:
        raise Interrupted(signals.asked() or "another rank was asked to end")


_cpu_group: list[Any] = []


def _on_cpu() -> Any:
    """A process group whose tensors are on the CPU: None is the default one."""
    if not _cpu_group:
        gloo = dist.get_backend() == "gloo"
        _cpu_group.append(None if gloo else dist.new_group(backend="gloo"))
    return _cpu_group[0]


def totals(values: Iterable[float], device: torch.device) -> list[float]:
    """Sums of numbers over the ranks, in float64; as many, and the same bits, on every rank."""
    values = list(values)
    if world_size() == 1 or not values:
        return values
    buffer = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(buffer)
    return buffer.tolist()


def summed(value: Tensor, device: torch.device) -> Tensor:
    """Sum of a tensor over the ranks, on the device, which the host does not wait for; the same
    bits on every rank."""
    there = value.to(device, non_blocking=True, copy=True)
    if world_size() > 1:
        dist.all_reduce(there)
    return there
