"""KL(teacher || model) over all tokens, or over the teacher's k likeliest and the rest as one."""

import torch
from torch import Tensor


def summed_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || model) in nats, at temperature 1.

    logits, teacher: [positions, vocabulary], of any float type; computed in fp32.
    """
    theirs = teacher.float().log_softmax(-1)
    ours = logits.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum()


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What is kept of a teacher's prediction.

    logits: [positions, vocabulary]; a vocabulary of fewer than k tokens is kept whole. Returns
    (tokens, int32 [positions, k]; log-probabilities, fp32
    [positions, k + 1]), the last of which is that of all other tokens together.
    """
    log_probabilities = logits.float().log_softmax(-1)
    kept, tokens = log_probabilities.topk(min(k, logits.shape[-1]), dim=-1)
    rest = log_probabilities.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return tokens.int(), torch.cat([kept, rest], dim=-1)


def summed_kl_top_k(logits: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
    """As `summed_kl`, against what `top_k` kept: the other tokens count as one.

    By the log-sum inequality at most the KL over the whole vocabulary.
    """
    tokens = tokens.long()
    ours = logits.float().log_softmax(-1)
    rest = ours.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    ours = torch.cat([ours.gather(-1, tokens), rest], dim=-1)
    theirs = log_probabilities.float()
    # 0 log 0 = 0: nothing is left for the rest where k tokens are the vocabulary.
    terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
    return terms.sum()
