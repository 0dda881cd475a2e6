"""Texts for encoder-decoders: the span corruption of T5 (Raffel et al. 2020, 3.1.4)."""

from functools import lru_cache
from itertools import count, takewhile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPAN = 3  # tokens of a corrupted span, on average


@lru_cache(maxsize=8)
def sentinels(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The ids of <extra_id_0>, <extra_id_1>, ...: each stands for one span of a text."""
    vocabulary = tokenizer.get_vocab()
    names = takewhile(vocabulary.__contains__, (f"<extra_id_{i}>" for i in count()))
    return tuple(vocabulary[name] for name in names)


def corrupt(
    ids: np.ndarray, rng: np.random.Generator, probability: float, marks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of a text: spans of it become sentinels, and are the target.

    Of n tokens `round(probability * n)` are taken out, at least one and not all, in spans of SPAN
    tokens on average, cut at random (as many spans as there are sentinels at most). The source is
    the text with the i-th span replaced by the i-th sentinel; the target is each sentinel followed
    by its span. Which tokens there are in both depends on n alone, not on the draw: n and two a
    span.

    Args:
        ids: int [n], n at least 2.
        marks: ids of the sentinels, at least one.
    """
    taken = min(max(round(probability * len(ids)), 1), len(ids) - 1)
    spans = min(max(round(taken / SPAN), 1), len(ids) - taken, len(marks))
    kept_lengths = _pieces(len(ids) - taken, spans, rng)
    span_lengths = _pieces(taken, spans, rng)
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    at = 0
    for kept, span, mark in zip(kept_lengths, span_lengths, marks, strict=False):
        sentinel = np.array([mark], ids.dtype)
        source += [ids[at : at + kept], sentinel]
        target += [sentinel, ids[at + kept : at + kept + span]]
        at += kept + span
    return np.concatenate(source), np.concatenate(target)


def _pieces(total: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """Lengths of at least 1 that sum to `total`, every way to cut it as likely as any other."""
    cuts = np.sort(rng.permutation(total - 1)[: pieces - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()
