"""What a step of several domains cost in each of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.ranks import world_size


class DomainLosses:
    """Adds up a step's losses by domain; the sums over the domains are the step's own."""

    def __init__(self, names: list[str], device: torch.device):
        self.names = names
        # losses (nats), predicted tokens, tokens
        self._sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)

    def add(self, losses: Tensor, domains: Tensor) -> None:
        """losses, domains: [n], of the predicted tokens."""
        learnt = domains.long()
        self._sums[0].index_add_(0, learnt, losses.detach().double())
        self._sums[1].index_add_(0, learnt, torch.ones_like(losses, dtype=torch.float64))

    def count(self, domains: Tensor) -> None:
        """The tokens of a micro-batch, [B, L]."""
        known = domains.flatten().long() + 1  # -1 is padding
        counts = self._sums.new_zeros(len(self.names) + 1)
        self._sums[2] += counts.index_add_(0, known, torch.ones_like(known, dtype=counts.dtype))[1:]

    def reduce(self) -> dict[str, dict[str, Any]]:
        """Over all ranks, who call it together: {domain: loss (mean, nats), predicted, tokens}; a
        domain of which the step predicts nothing has no loss."""
        if world_size() > 1:
            dist.all_reduce(self._sums)
        columns = self._sums.t().tolist()
        self._sums.zero_()
        return {
            name: {
                "loss": loss / predicted if predicted else None,
                "predicted": int(predicted),
                "tokens": int(tokens),
            }
            for name, (loss, predicted, tokens) in zip(self.names, columns, strict=True)
        }
