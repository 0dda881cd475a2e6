"""Which tokens are masked."""

import numpy as np
import pytest
import torch

from pipeline.data.mlm import collate, mask_tokens
from pipeline.data.sequences import Sequence

VOCABULARY, MASK, SPECIAL = 60, 4, [0, 1, 2, 3, 4]


def pack(*lengths, total=32, seed=0):
    """A sequence of documents of these lengths, each <s> ... </s>, with words of two tokens."""
    rng = np.random.default_rng(seed)
    ids, words = np.full(total, 1, np.int32), np.full(total, -1, np.int32)
    segments = np.full(total, -1, np.int16)
    start = word = 0
    for segment, length in enumerate(lengths):
        stop = start + length
        ids[start:stop] = [0, *rng.integers(5, VOCABULARY, length - 2), 2]
        words[start + 1 : stop - 1] = word + np.arange(length - 2) // 2
        segments[start:stop] = segment
        start, word = stop, word + length
    return Sequence(ids, words, segments, segments >= 0, np.minimum(segments, 0))


def mask(sequence, rng, probability=0.15, whole_word=False):
    return mask_tokens(
        sequence,
        rng,
        probability=probability,
        whole_word=whole_word,
        mask_id=MASK,
        vocab_size=VOCABULARY,
        special_ids=SPECIAL,
    )


@pytest.mark.parametrize("probability", [0.001, 0.15, 0.4])
def test_the_exact_number_of_ordinary_tokens_is_chosen(probability):
    sequence = pack(12, 15)
    ids, labels = mask(sequence, np.random.default_rng(0), probability)
    chosen = labels != -100
    assert ids.dtype == labels.dtype == np.int64
    assert chosen.sum() == max(1, round(probability * 23))
    assert (sequence.words[chosen] >= 0).all()
    assert (labels[chosen] == sequence.ids[chosen]).all()
    assert (ids[~chosen] == sequence.ids[~chosen]).all()


def test_whole_words_are_chosen_until_the_budget_is_reached():
    sequence = pack(12, 16)
    for seed in range(20):
        _, labels = mask(sequence, np.random.default_rng(seed), 0.2, whole_word=True)
        chosen = np.flatnonzero(labels != -100)
        assert len(chosen) == 6  # five would do, words have two tokens
        assert (np.bincount(sequence.words[chosen])[np.unique(sequence.words[chosen])] == 2).all()


def test_of_the_chosen_tokens_80_are_masked_10_random_and_10_kept():
    sequence = pack(20_002, total=20_002)
    ids, labels = mask(sequence, np.random.default_rng(0), 0.999)
    chosen = labels != -100
    masked = ids[chosen] == MASK
    other = ids[chosen][~masked]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert (other != labels[chosen][~masked]).mean() == pytest.approx(0.5 * 54 / 55, abs=0.02)
    assert set(other) == set(range(5, VOCABULARY))  # every token but the special ones


def test_random_tokens_avoid_special_ids_anywhere_in_the_vocabulary():
    sequence = pack(5_002, total=5_002)
    ids, _ = mask_tokens(
        sequence,
        np.random.default_rng(0),
        probability=0.5,
        whole_word=False,
        mask_id=59,
        vocab_size=60,
        special_ids=[59, 0, 2, 30, 1, 1],
    )
    swapped = (ids != sequence.ids) & (ids != 59)
    assert set(ids[swapped]) == set(range(60)) - {59, 0, 2, 30, 1}


def test_a_mask_is_a_function_of_its_generator():
    sequence = pack(30)
    first, again, other = (
        mask(sequence, np.random.default_rng(s)) for s in ((1, 2), (1, 2), (1, 3))
    )
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()


def row(sequence):
    ids = sequence.ids.astype(np.int64)
    return ids, np.where(sequence.segments >= 0, ids, -100), sequence.segments


def test_a_batch_says_what_is_padding():
    batch = collate([row(pack(4, 3, total=8)), row(pack(8, total=8))])
    assert batch["segments"].tolist() == [[0] * 4 + [1] * 3 + [-1], [0] * 8]
    assert torch.equal(batch["real"], batch["segments"] >= 0)
    assert torch.equal(batch["labels"] >= 0, batch["real"])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert "real" not in collate([row(pack(8, total=8))])


def test_a_batch_is_as_long_as_its_longest_row_without_the_padding():
    batch = collate([row(pack(4, 3, total=16)), row(pack(2, total=16))])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["segments"].tolist() == [[0] * 4 + [1] * 3, [0] * 2 + [-1] * 5]
    nothing = collate([row(pack(total=16))])
    assert nothing["segments"].tolist() == [[-1]]
