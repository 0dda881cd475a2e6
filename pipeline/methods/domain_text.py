"""Training text of the recipe's domains in batches, for methods that read it outside of a stage."""

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
from torch import Tensor

from pipeline.data.mlm import collate
from pipeline.data.objective import OBJECTIVES
from pipeline.data.sequences import Sequence as Row
from pipeline.methods.method import Start

ROWS = 16  # of a batch


def asked_and_answer(sequence: Row) -> tuple[np.ndarray, np.ndarray]:
    """Of a row with one example the ids that are read, and those that are to be written."""
    real, learnt = sequence.segments == 0, sequence.predicted
    return sequence.ids[real & ~learnt], sequence.ids[real & learnt]


def domain_batches(
    start: Start,
    domains: Sequence[str],
    sequences: int,
    seed: tuple[int, ...],
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The numbered batches r, r + n, ... of a share (r, n), as `collate` makes them.

    sequences: of all the domains together, as many of each. seed: of the tokens to predict, with
    the batch's number behind it.
    """
    recipe = start.recipe
    each = max(1, sequences // len(domains))
    found = (s for name in domains for s in islice(start.domain(name, each), each))
    row = OBJECTIVES[recipe.model.objective].row
    for number in count():
        block = list(islice(found, ROWS))
        if not block:
            return
        if number % share[1] == share[0]:
            rng = np.random.default_rng((*seed, number))
            rows = [row(s, start.tokenizer, rng, recipe.data.masking, False) for s in block]
            yield number, collate(rows)
