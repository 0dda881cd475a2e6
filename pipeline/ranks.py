"""Small helpers for code that several ranks run together."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import UserError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def on_rank0(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its (picklable) result to every rank.

    An exception on rank 0 is raised on every rank, so that none is left waiting in a collective.
    """
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = (
                error if isinstance(error, (UserError, OSError)) else RuntimeError(repr(error))
            )
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def total(value: float, device: torch.device) -> float:
    """Sum of a number over the ranks, in float64; the same bits on every rank."""
    if world_size() == 1:
        return value
    buffer = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(buffer)
    return buffer.item()
