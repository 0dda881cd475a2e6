"""The cross-entropy of a large vocabulary, without all its logits at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError
from pipeline.model.load import PredictedPositions

CHUNK = 2**24  # logits


class ChunkedLoss:
    """Makes a model's last linear give losses in place of logits, chunk by chunk.

    A chunk's logits live while its loss is computed, and are computed once more in the backward.
    So the head's product is done three times in place of two and, instead of some copies of
    [predicted, vocabulary], `CHUNK` logits exist. The losses are those of the whole, to rounding.

    Raises:
        UserError: the model has no linear head of its own.
    """

    def __init__(self, head: PredictedPositions):
        self._head = head
        self._targets: Tensor | None = None
        self._losses: Tensor | None = None
        output: Any = head.output
        if type(output).forward is not nn.Linear.forward or "forward" in vars(output):
            raise UserError(
                f"train.chunked_loss: the model's head is a {type(output).__name__}, not a plain "
                "linear; set it to false"
            )

        def forward(hidden: Tensor) -> Tensor:
            if self._targets is None:
                return F.linear(hidden, output.weight, output.bias)
            self._losses = _losses(output, hidden, self._targets)
            return self._losses

        output.forward = forward

    def losses(
        self, forward: Callable[..., Any], inputs: dict[str, Any], places: Tensor, targets: Tensor
    ) -> Tensor:
        """Nats, fp32 [predicted], of the targets [predicted] at `predicted_places`.

        Raises:
            UserError: the model computes with its logits behind the head.
        """
        self._head.select(places)
        self._targets, self._losses = targets, None
        wrong = UserError(
            "train.chunked_loss: the model does not return what its head computes (it caps, scales "
            "or adds to logits); set it to false"
        )
        try:
            found = forward(**inputs).logits
        except RuntimeError as error:
            if self._losses is None or "size of tensor" not in str(error):
                raise
            raise wrong from error  # behind the head: losses are not of the shape of logits
        finally:
            self._head.select(None)
            self._targets = None
        if self._losses is None or found.data_ptr() != self._losses.data_ptr():
            raise wrong
        self._losses = None
        return found.view(-1)

    def close(self) -> None:
        """The head gives logits as before."""
        vars(self._head.output).pop("forward", None)


def _losses(output: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden: [n, hidden]; targets: [n]."""

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, output.weight, output.bias)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    rows = max(1, CHUNK // output.weight.shape[0])
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(losses, h, t, **again) for h, t in parts])
