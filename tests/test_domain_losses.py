"""The losses of a step by domain are those of its tokens, and their sum is the step's."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.data.objective import targets_of
from pipeline.ranks import rank
from pipeline.run.domain_losses import DomainLosses
from tests.spawn import run_ranks


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_losses_by_domain_sum_to_the_loss_of_the_step(objective):
    generator = torch.Generator().manual_seed(0)
    sums = DomainLosses(["a", "b", "unseen"], torch.device("cpu"))
    total, predicted, tokens = 0.0, 0, 0
    for _ in range(3):  # micro-batches
        labels = torch.randint(-1, 9, (4, 16), generator=generator)
        labels[labels < 0] = -100
        domains = torch.randint(-1, 2, (4, 16), generator=generator).short()
        labels[domains < 0] = -100
        targets = targets_of(labels, objective)
        logits = torch.randn(4, 16, 9, generator=generator)
        losses = F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none")
        sums.count(domains)
        sums.add(losses, targets_of(domains, objective)[targets >= 0])
        total, predicted = total + losses.double().sum().item(), predicted + len(losses)
        tokens += int((domains >= 0).sum())
    found = sums.reduce()
    assert sum(d["loss"] * d["predicted"] for d in found.values() if d["predicted"]) == (
        pytest.approx(total, rel=1e-12)
    )
    assert sum(d["predicted"] for d in found.values()) == predicted
    assert sum(d["tokens"] for d in found.values()) == tokens
    assert found["unseen"] == {"loss": None, "predicted": 0, "tokens": 0}
    assert all(d["predicted"] == 0 for d in sums.reduce().values())  # a new step


def shared():
    """Rank r has 1 + r tokens of a domain both have, of 1 + r nats each, and one of its own."""
    sums = DomainLosses(["a", "b", "both"], torch.device("cpu"))
    domains = torch.tensor([[2] * (1 + rank()) + [rank()]])
    sums.count(domains)
    sums.add(torch.full((domains.numel(),), 1.0 + rank()), domains.flatten())
    return sums.reduce()


def test_the_losses_by_domain_are_of_the_text_of_all_ranks():
    one, other = run_ranks(shared, 2)
    assert one == other == {
        "a": {"loss": 1.0, "predicted": 1, "tokens": 1},
        "b": {"loss": 2.0, "predicted": 1, "tokens": 1},
        "both": {"loss": (1 * 1 + 2 * 2) / 3, "predicted": 3, "tokens": 3},
    }  # fmt: skip
