"""The mask as the paper's published code makes it, restated to be timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.migu.targets import find_targets


class AuthorsMask:
    """The procedure of the authors' code: the outputs' sums in their own dtype by a hook on every
    linear, one all-reduce and one quantile a layer, and whole gradients masked."""

    defers = False
    _open = False

    def __init__(self, model: nn.Module, threshold: float):
        self._threshold = threshold
        self.targets = find_targets(model)
        self._sums: dict[str, Tensor] = {}
        for target in self.targets:
            target.observed.register_forward_hook(self._hook(target.name))

    def _hook(self, name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if not self._open:
                return
            total = output.abs().sum(dim=list(range(output.dim() - 1)))
            self._sums[name] = self._sums.get(name, 0) + total.detach()

        return observe

    @contextmanager
    def recording(self, _real: Any = None, _decoder: Any = None) -> Iterator[None]:
        self._open = True  # another mode may run the same model
        yield
        self._open = False

    @torch.no_grad()
    def apply(self, shards: Any, *_: Any) -> float:
        keep = {}
        for target in self.targets:
            total = self._sums.pop(target.name).float()
            torch.distributed.all_reduce(total)
            keep[target.name] = total >= torch.quantile(total, self._threshold)
        for shard in shards.gradient_shards(list(keep)):  # of ZeRO-0 whole gradients
            shard.mask(keep[shard.name])
        return 1 - self._threshold

    def hold(self, *_: Any) -> Any:
        return nullcontext()
