"""FGGM (Tan et al. 2026, arXiv 2601.18261): rows ranked by Fisher information, not by magnitude.

The importance of a weight for a task is the diagonal of the empirical Fisher information, the mean
over the task's samples of the squared gradient of their log-likelihood, taken before the task is
trained; a row's is the sum over its inputs. The rows with the largest are those that are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.migu.targets import Target


class FisherRecorder:
    """Sums squared gradients by row into one flat fp32 buffer; the layout, `observed` and `reduce`
    are those of `MagnitudeRecorder`. The model is whole: no engine has it yet."""

    def __init__(self, targets: list[Target]):
        device = targets[0].weight.device
        self._sizes = [t.rows for t in targets]
        self._sums = torch.zeros(sum(self._sizes) + len(targets), device=device)
        self.observed = torch.ones(len(targets), dtype=torch.bool, device=device)
        self._targets = targets

    @torch.no_grad()
    def add(self) -> None:
        """Count the gradient of a sample's log-likelihood, as its backward has left it, and forget
        it."""
        sums, seen = self._sums.split([sum(self._sizes), len(self._sizes)])
        for i, (target, rows) in enumerate(
            zip(self._targets, sums.split(self._sizes), strict=True)
        ):
            gradient = target.weight.grad
            if gradient is not None:
                rows += gradient.float().square().sum(1 - target.output_dim)
                seen[i] += 1
                target.weight.grad = None

    @contextmanager
    def recording(self, *_: object) -> Iterator[None]:
        """No forward is observed: what counts is its gradient."""
        yield

    def reduce(self) -> Tensor:
        """fp32 [sum of rows], of all ranks' samples and alike on every rank; resets."""
        total = self._sums.clone()
        self._sums.zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        scores, seen = total.split([sum(self._sizes), len(self._sizes)])
        self.observed = seen > 0
        return scores

    def close(self) -> None:
        """Nothing is hooked."""
