"""EAFT (arXiv 2601.02151): new tokens count by how unsure the model is of them.

A token that the model is sure of and that the data contradicts gives the largest gradients, and
those overwrite what it knew. So each cross-entropy is weighted by the entropy of the prediction it
belongs to: over the k likeliest tokens, in units of its largest possible value ln k.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.methods.method import Method
from pipeline.recipe import Recipe


class EntropyGate(Method):
    """The recipe's `entropy_gate`."""

    name = "entropy_gate"

    def __init__(self, recipe: Recipe):
        assert recipe.entropy_gate is not None
        self.tokens = recipe.entropy_gate.tokens

    def weigh(
        self, losses: Tensor, logits: Tensor, targets: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        return losses * gates(logits, self.tokens)


def gates(logits: Tensor, tokens: int) -> Tensor:
    """Entropies of predictions among their likeliest `tokens`, as shares of the largest possible.

    logits: [predicted, vocabulary]. Returns fp32 [predicted] in [0, 1], without gradient.
    """
    with torch.no_grad():
        likeliest = logits.float().topk(min(tokens, logits.shape[-1]), dim=-1).values
        log_probabilities = likeliest.log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return entropy / math.log(likeliest.shape[-1])
