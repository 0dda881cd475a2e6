"""From a recipe's stage to micro-batches, the same for every number of ranks."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice, takewhile
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.data.instruct import Document, Example, ExampleStatistics, example_statistics
from pipeline.data.mlm import IGNORED, collate, mask_tokens
from pipeline.data.reader import BadLines, document_of, read_documents
from pipeline.data.stream import PackedStream, Sequence, example_lengths
from pipeline.data.tokenizer import never_drawn, vocabulary_size
from pipeline.errors import UserError
from pipeline.recipe import Recipe

Batch = dict[str, Tensor]
T = TypeVar("T")
SAMPLE = 2000  # documents


def stage_documents(
    recipe: Recipe, names: list[str], bad: dict[str, BadLines] | None = None
) -> Callable[[int], Iterator[Document]]:
    """Gives the training documents of an epoch; several domains take turns until all are used up.

    bad: filled, per domain, while the first epoch is read.
    """

    def documents(epoch: int) -> Iterator[Document]:
        streams: list[Iterator[Document]] = []
        for name in names:
            found = BadLines(budget=recipe.data.bad_lines)
            if bad is not None and epoch == 0:
                bad[name] = found
            domain = recipe.data.domains[name]
            streams.append(map(document_of, read_documents(domain, "train", found)))
        return _take_turns(streams)

    return documents


def _take_turns(streams: list[Iterator[T]]) -> Iterator[T]:
    while streams:
        alive = []
        for stream in streams:
            for document in islice(stream, 1):
                alive.append(stream)
                yield document
        streams = alive


@dataclass
class StagePlan:
    """How long a stage is."""

    steps: int
    steps_per_unit: float  # of the unit in which the recipe gives the length
    examples: ExampleStatistics | None  # of its instruction domains

    def pauses(self, every: float | None) -> dict[int, float]:
        """Steps before the last at which to evaluate, and how many units are done by then."""
        if every is None:
            return {}
        places = takewhile(
            lambda place: place[0] < self.steps,
            ((round(i * every * self.steps_per_unit), i * every) for i in count(1)),
        )
        return {max(1, step): progress for step, progress in places}


def plan_stage(recipe: Recipe, stage: int, tokenizer: PreTrainedTokenizerFast) -> StagePlan:
    """Optimizer steps of stage 1..., read from the corpus where the recipe does not say them.

    An epoch of text is estimated as its characters times the tokens per character of its first
    documents; instruction examples are tokenized and counted as they fill sequences.

    Raises:
        UserError: no document, or no example that is short enough.
    """
    s = recipe.stages[stage - 1]
    per_step = recipe.train.batch_size * recipe.data.sequence_length
    instructions = [n for n in s.domains if recipe.data.domains[n].instruction]
    statistics = _count_examples(recipe, instructions, tokenizer) if instructions else None
    if s.steps is not None:
        return StagePlan(s.steps, 1, statistics)
    if s.tokens is not None:
        return StagePlan(max(1, math.ceil(s.tokens / per_step)), 1 / per_step, statistics)
    tokens = float(statistics.sequences * recipe.data.sequence_length if statistics else 0)
    for name in s.domains:
        if name not in instructions:
            tokens += _estimate_tokens(recipe, name, tokenizer)
    per_epoch = tokens / per_step
    return StagePlan(max(1, math.ceil((s.epochs or 0) * per_epoch)), per_epoch, statistics)


def _count_examples(
    recipe: Recipe, names: list[str], tokenizer: PreTrainedTokenizerFast
) -> ExampleStatistics:
    examples = stage_documents(recipe, names)(0)
    lengths = example_lengths(
        (e for e in examples if isinstance(e, Example)), tokenizer, recipe.data.template
    )
    found = example_statistics(lengths, recipe.data.sequence_length, packed=True)
    if not found.examples:
        raise UserError(
            f"data.sequence_length: none of the {found.too_long} examples of {'+'.join(names)} "
            f"fits into {recipe.data.sequence_length} tokens; raise it (the longest has "
            f"{found.longest})"
        )
    return found


def _estimate_tokens(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerFast) -> float:
    documents = (d for d in stage_documents(recipe, [name])(0) if isinstance(d, str))
    sample = list(islice(documents, SAMPLE))
    if not sample:
        raise UserError(f"data.domains.{name}: no document to train on")
    encoded = sum(len(e) for e in tokenizer(sample, add_special_tokens=True)["input_ids"])
    per_character = encoded / sum(map(len, sample))
    return per_character * sum(len(d) for d in chain(sample, documents))


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
        template=recipe.data.template,
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
        yield [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def example(
    sequence: Sequence,
    tokenizer: PreTrainedTokenizerFast,
    masked: bool,
    rng: np.random.Generator,
    probability: float,
    whole_word: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input_ids, labels, segments) of a packed sequence, each [length].

    A causal model does not predict a document's first token: nothing of the document is before it.
    """
    if masked:
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
    ids, segments = sequence.ids.astype(np.int64), sequence.segments
    first = np.diff(segments, prepend=-1) != 0
    return ids, np.where(sequence.predicted & ~first, ids, IGNORED), segments


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
