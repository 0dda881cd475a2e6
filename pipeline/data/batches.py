"""From a recipe's stage to micro-batches, the same for every number of ranks."""

import math
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.data.mlm import collate_causal, collate_mlm, mask_tokens
from pipeline.data.reader import BadLines, read_documents
from pipeline.data.stream import PackedStream, Sequence
from pipeline.errors import UserError
from pipeline.recipe import Recipe

Batch = dict[str, Tensor]
T = TypeVar("T")
SAMPLE = 2000  # documents


def stage_documents(
    recipe: Recipe, names: list[str], bad: dict[str, BadLines] | None = None
) -> Callable[[int], Iterator[str]]:
    """Gives the training documents of an epoch; several domains take turns until all are used up.

    bad: filled, per domain, while the first epoch is read.
    """

    def documents(epoch: int) -> Iterator[str]:
        streams: list[Iterator[str]] = []
        for name in names:
            found = BadLines(budget=recipe.data.bad_lines)
            if bad is not None and epoch == 0:
                bad[name] = found
            domain = recipe.data.domains[name]
            streams.append(row["text"] for row in read_documents(domain, "train", found))
        return _take_turns(streams)

    return documents


def _take_turns(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        alive = []
        for stream in streams:
            for document in islice(stream, 1):
                alive.append(stream)
                yield document
        streams = alive


def stage_steps(recipe: Recipe, stage: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """Optimizer steps of stage 1..; `epochs` is turned into steps by estimating the corpus' tokens
    as its characters times the tokens per character of its first documents."""
    s = recipe.stages[stage - 1]
    if s.steps is not None:
        return s.steps
    if s.tokens is not None:
        tokens: float = s.tokens
    else:
        documents = stage_documents(recipe, s.domains)(0)
        sample = list(islice(documents, SAMPLE))
        if not sample:
            raise UserError(f"stages[{stage - 1}]: no document to train on in {s.name}")
        encoded = sum(len(e) for e in tokenizer(sample, add_special_tokens=True)["input_ids"])
        per_character = encoded / sum(map(len, sample))
        characters = sum(len(d) for d in chain(sample, documents))
        tokens = (s.epochs or 0) * characters * per_character
    return max(1, math.ceil(tokens / (recipe.train.batch_size * recipe.data.sequence_length)))


def training_batches(
    recipe: Recipe,
    stage: int,
    tokenizer: PreTrainedTokenizerFast,
    rank: int,
    ranks: int,
    bad: dict[str, BadLines] | None = None,
) -> Iterator[list[Batch]]:
    """Without end: per step, this rank's micro-batches.

    Which sequences a step has, and which of their tokens are masked, depends only on the recipe:
    not on the number of ranks, nor on how the batch is split.
    """
    masked = recipe.model.objective == "masked"
    stream = PackedStream(
        stage_documents(recipe, recipe.stages[stage - 1].domains, bad),
        tokenizer,
        recipe.data.sequence_length,
        streams=recipe.train.batch_size,
        rank=rank,
        world_size=ranks,
        seed=recipe.stage_seed(stage),
        shuffle_window=recipe.data.shuffle_window,
        masked=masked,
    )
    size = recipe.train.micro_batch_size or len(range(rank, recipe.train.batch_size, ranks))
    for step, (sequences, _state) in enumerate(stream):
        rows = [
            example(
                sequence,
                tokenizer,
                masked,
                np.random.default_rng((recipe.seed, stage, rank + i * ranks, step)),
                recipe.data.masking,
                recipe.data.whole_word,
            )
            for i, sequence in enumerate(sequences)
        ]
        collate = collate_mlm if masked else collate_causal
        yield [
            collate(rows[i : i + size], cross_document=recipe.data.cross_document)
            for i in range(0, len(rows), size)
        ]


def example(
    sequence: Sequence,
    tokenizer: PreTrainedTokenizerFast,
    masked: bool,
    rng: np.random.Generator,
    probability: float,
    whole_word: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input_ids, labels, segments) of a packed sequence, each [length]."""
    if masked:
        ids, labels = mask_tokens(
            sequence,
            rng,
            probability=probability,
            whole_word=whole_word,
            mask_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            special_ids=tokenizer.all_special_ids,
        )
        return ids, labels, sequence.segments
    ids = sequence.ids.astype(np.int64)
    return ids, np.where(sequence.segments >= 0, ids, -100), sequence.segments


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made `depth` ahead by a thread; its exceptions are raised here.

    A thread, not a process: tokenizing releases the interpreter's lock, and what the reader counts
    (broken lines) stays in sight. Ends with the consumer.
    """
    if depth == 0:
        yield from items
        return
    queue: Queue = Queue(maxsize=depth)
    stop = Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> None:
        while not stop.is_set():
            try:
                return queue.put(entry, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None, False))
                if stop.is_set():
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error, end = queue.get()
            if error is not None:
                raise error
            if end:
                return
            yield item
    finally:
        stop.set()
