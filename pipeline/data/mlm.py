"""Examples for masked and causal language models: which tokens to predict, and batches of them."""

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.sequences import Sequence

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that the loss leaves out

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids int64, labels int64, segments: [length]


def mask_tokens(
    seq: Sequence,
    rng: np.random.Generator,
    *,
    probability: float,
    whole_word: bool,
    mask_id: int,
    vocab_size: int,
    special_ids: Items[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the tokens to predict, as BERT and RoBERTa do.

    Exactly `round(probability * n)` of the n tokens that are neither special nor padding are
    chosen, at least one; with `whole_word`, whole words until there are that many. Of them 80%
    become `mask_id`, 10% a random token that is not special, and 10% stay.

    Returns (input_ids, labels), int64 [length]; labels are -100 where nothing is predicted. All
    draws come from `rng`.
    """
    ids = seq.ids.astype(np.int64)
    labels = np.full_like(ids, IGNORED)
    special = np.array(sorted(set(special_ids)), np.int64)
    places = np.flatnonzero((seq.segments >= 0) & ~np.isin(ids, special))
    if not len(places):
        return ids, labels
    wanted = max(1, round(probability * len(places)))
    if whole_word:
        _, word = np.unique(seq.words[places], return_inverse=True)
        sizes = np.bincount(word)
        order = rng.permutation(len(sizes))
        chosen = order[: np.searchsorted(np.cumsum(sizes[order]), wanted) + 1]
        places = places[np.isin(word, chosen)]
    else:
        places = np.sort(rng.permutation(places)[:wanted])
    labels[places] = ids[places]

    dice = rng.random(len(places))
    ids[places[dice < 0.8]] = mask_id
    swapped = places[(dice >= 0.8) & (dice < 0.9)]
    special = special[special < vocab_size]
    tokens = rng.integers(vocab_size - len(special), size=len(swapped))
    for token in special:  # ascending, so that each step over one leaves no gap
        tokens += tokens >= token
    ids[swapped] = tokens
    return ids, labels


def collate(rows: Items[Row]) -> dict[str, "Tensor"]:
    """A batch as the data gives it; `Separation.arrange` makes of it what a model takes.

    Returns input_ids, labels and segments, int64 [B, L], and, where there is padding, real: bool
    [B, L], False on it. L is the length of the longest row without the padding behind it, at
    least 1. The labels are not shifted.
    """
    import torch  # preparing a corpus needs none

    longest = max(1, *(int((segments >= 0).sum()) for _, _, segments in rows))
    columns = zip(*rows, strict=True)
    fills = {"input_ids": 0, "labels": IGNORED, "segments": -1}
    batch = {
        name: torch.from_numpy(pad_rows(column, longest, fill)).long()
        for (name, fill), column in zip(fills.items(), columns, strict=True)
    }
    real = batch["segments"] >= 0
    return batch if real.all() else {**batch, "real": real}


def pad_rows(rows: Items[np.ndarray], length: int, fill: int) -> np.ndarray:
    """[rows, length]; `fill` stands behind a row that is shorter, and a longer one is cut."""
    padded = np.full((len(rows), length), fill, rows[0].dtype)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row[:length]
    return padded
