"""FGGM (Tan et al. 2026, arXiv 2601.18261): rows ranked by Fisher information, not by magnitude.

The importance of a weight for a task is the diagonal of the empirical Fisher information, the mean
over the task's samples of the squared gradient of their log-likelihood, taken before the task is
trained; a row's is the sum over its inputs. The rows with the largest are those that are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.migu.magnitude import RowScores
from pipeline.migu.targets import Target


class FisherRecorder(RowScores):
    """Sums squared gradients by row. The model is whole: no engine has it yet."""

    def __init__(self, targets: list[Target]):
        super().__init__(targets)
        self._targets = targets

    @torch.no_grad()
    def add(self) -> None:
        """Count the gradient of a sample's loss, as its backward has left it, and forget
        it."""
        views = self.scores.split(self.sizes), self.seen.split(self.part_counts)
        for target, rows, seen in zip(self._targets, *views, strict=True):
            gradient = target.weight.grad
            if gradient is not None:
                rows += gradient.float().square().sum(target.input_dim).reshape(-1)
                seen += 1
                target.weight.grad = None

    @contextmanager
    def recording(self, *_: object) -> Iterator[None]:
        """No forward is observed: what counts is its gradient."""
        yield

    def close(self) -> None:
        """Nothing is hooked."""
