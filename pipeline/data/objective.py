"""Objectives: what a batch is, and how its targets are counted.

`masked` (RoBERTa) predicts tokens that it does not see, `causal` (Llama) the next token of a text
or of a response, `seq2seq` (T5) the response to a prompt, or the spans that are missing in a text.
All that differs between them in the data and in the loop is here; which class of transformers a
model is of is in `model/load.py`, and how its input is laid out is the model's own affair
(`model/attention.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.mlm import IGNORED, Row, mask_tokens
from pipeline.data.sequences import Sequence
from pipeline.data.span_corruption import corrupt, sentinels
from pipeline.data.tokenizer import never_drawn, vocabulary_size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

# (sequence, tokenizer, random numbers, share of the tokens to predict, in whole words)
MakeRow = Callable[[Sequence, "PreTrainedTokenizerFast", np.random.Generator, float, bool], Row]


@dataclass(frozen=True)
class Objective:
    """
    row: (input_ids, labels, segments) of a packed sequence, each int [n]: its length, or of a
        corrupted text some tokens more. Labels are not shifted, and -100 where nothing is learnt.
    shifted: a position predicts the token behind it.
    """

    name: str
    row: MakeRow
    shifted: bool = False

    def targets(self, values: "Tensor") -> "Tensor":
        """[batch, length], of what each position predicts; -100 where that is nothing."""
        if not self.shifted:
            return values
        moved = values.roll(-1, dims=1)
        moved[:, -1] = IGNORED
        return moved


def _masked(
    sequence: Sequence,
    tokenizer: "PreTrainedTokenizerFast",
    rng: np.random.Generator,
    probability: float,
    whole_word: bool,
) -> Row:
    ids, labels = mask_tokens(
        sequence,
        rng,
        probability=probability,
        whole_word=whole_word,
        mask_id=tokenizer.mask_token_id,
        vocab_size=vocabulary_size(tokenizer),
        special_ids=never_drawn(tokenizer),
    )
    return ids, labels, sequence.segments


def _causal(sequence: Sequence, *_: object) -> Row:
    """A document's first token is not predicted: nothing of the document is before it."""
    ids, segments = sequence.ids.astype(np.int64), sequence.segments
    first = np.diff(segments, prepend=-1) != 0
    return ids, np.where(sequence.predicted & ~first, ids, IGNORED), segments


def _seq2seq(
    sequence: Sequence,
    tokenizer: "PreTrainedTokenizerFast",
    rng: np.random.Generator,
    probability: float,
    _: bool,
) -> Row:
    """Of each document the source, without labels, and then the target, with them. An example has
    both; a text, all of which is to be learnt, is corrupted. Both sides end with end of text."""
    end = [tokenizer.eos_token_id]
    ids, labels, segments = [], [], []
    for segment in range(int(sequence.segments.max(initial=-1)) + 1):
        here = sequence.segments == segment
        source, target = sequence.ids[here], sequence.ids[here][sequence.predicted[here]]
        if len(target) == len(source) > 1:
            halves = corrupt(source, rng, probability, sentinels(tokenizer))
            source, target = (np.concatenate([half, end]) for half in halves)
        else:
            source = source[: len(source) - len(target)]
        ids += [source, target]
        labels += [np.full(len(source), IGNORED), target]
        segments.append(np.full(len(source) + len(target), segment, np.int16))
    columns = (np.concatenate(c) if c else np.zeros(0, int) for c in (ids, labels, segments))
    own_ids, own_labels, own_segments = columns
    return own_ids.astype(np.int64), own_labels.astype(np.int64), own_segments


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("masked", _masked),
        Objective("causal", _causal, shifted=True),
        Objective("seq2seq", _seq2seq),
    )
}


def targets_of(values: "Tensor", objective: str) -> "Tensor":
    """`Objective.targets` of the objective that the recipe names."""
    return OBJECTIVES[objective].targets(values)
