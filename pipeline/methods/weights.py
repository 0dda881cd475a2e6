"""The fp32 weights that a rank holds: looked at, copied, changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.shard import Shard


def masters(engine: Any) -> Iterator[Shard]:
    """This rank's live pieces of the trained weights, fp32, always in the same order."""
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    yield from engine.shards.master_shards(trained)


def copies(engine: Any) -> list[Shard]:
    """Of `masters`, as they are now."""
    return [Shard(s.name, s.tensor.clone(), s.start, s.shape) for s in masters(engine)]


def change_masters(engine: Any, change: Callable[[int, Tensor], Tensor]) -> None:
    """Replace every piece by `change(its place, it)`; all ranks call it."""
    with torch.no_grad():
        for place, shard in enumerate(masters(engine)):
            shard.tensor.copy_(change(place, shard.tensor))
    engine.shards.masters_changed()


@contextmanager
def changed_masters(engine: Any, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """As `change_masters`, and back again, to the bit."""
    before = copies(engine)
    change_masters(engine, change)
    try:
        yield
    finally:
        change_masters(engine, lambda place, _weight: before[place].tensor)
