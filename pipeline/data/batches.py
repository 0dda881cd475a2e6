"""A stage's micro-batches, step after step: the same for every number of ranks, and resumable."""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from queue import Full, Queue
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline import background
from pipeline.data.encode import Encoder, Frame
from pipeline.data.mixture import Corpus
from pipeline.data.mlm import collate, pad_rows
from pipeline.data.objective import OBJECTIVES
from pipeline.data.sequences import Sequence, read_rows
from pipeline.data.stage import domains_of, shares_of, stage_packer
from pipeline.errors import UserError
from pipeline.recipe import Recipe

Batch = dict[str, Tensor]
T = TypeVar("T")
BEGINNING = 16  # tokens of a document that are shown where it is named


class Rows(Protocol):
    """Per step, this rank's sequences, in the order of their rows; and where that stands."""

    def __iter__(self) -> Iterator[list[Sequence]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """A rank's state as one that any number of ranks can load; all ranks call it."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def unfinished(self, state: dict[str, Any]) -> list[list[int]]:
        """Of a gathered state, as `Packer.unfinished`; a part may come more than once."""


class _Step(NamedTuple):
    batches: list[Batch]
    state: dict[str, Any]  # behind it
    sequences: list[Sequence]


class StageBatches:
    """Per step of a stage, this rank's micro-batches; ends with a stage of epochs.

    Which sequences a step has, and which of their tokens are masked, depends only on the recipe:
    not on the number of ranks, nor on how the batch is split. A micro-batch of a stage with several
    domains has `domains`, int16 [B, L]: the domain of each token, as an index into `self.domains`;
    -1 on padding.

    `state_dict` is a small JSON-able position behind the last step that was taken, whatever a
    thread has prepared beyond; it may be loaded by any number of ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: int,
        tokenizer: PreTrainedTokenizerFast,
        rows: Rows,
        settings: dict[str, Any],
        rank: int,
        ranks: int,
    ):
        """settings: what a position depends on beside the recipe's sequences and seed."""
        self.recipe, self.stage, self.tokenizer = recipe, stage, tokenizer
        self.domains = domains_of(recipe, stage)
        self.rank, self.ranks = rank, ranks
        self.rows = rows
        self._state: dict[str, Any] = {"step": 0, "rows": rows.state_dict()}
        self._settings = {
            "data.sequence_length": recipe.data.sequence_length,
            "train.batch_size": recipe.train.batch_size,
            "seed": recipe.seed,
            "model.objective": recipe.model.objective,
            "data.packing": recipe.data.packing,
            "domains": [[list(s.domains), s.share] for s in shares_of(recipe, stage)],
            **settings,
        }
        self._read: list[Sequence] = []  # by the last step
        self._ahead: Generator[_Step, None, None] | None = None

    def __iter__(self) -> "StageBatches":
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            self._ahead = prefetch(self._steps(self._state["step"]), self.recipe.data.prefetch)
        batches, self._state, self._read = next(self._ahead)
        return batches

    def documents(self) -> list[dict[str, Any]]:
        """What this rank has read for the last step: of each piece its domain, the document's
        number in the prepared corpus (of a stream: in what the rank has drawn), the token with
        which the piece begins there, and its first words."""
        found = []
        for sequence in self._read:
            for segment, piece in enumerate(sequence.pieces):
                ids = sequence.ids[sequence.segments == segment][:BEGINNING]
                text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                found.append(
                    {"domain": self.domains[piece.part], "document": int(piece.place),
                     "token": int(piece.start), "begins": text}
                )  # fmt: skip
        return found

    def state_dict(self) -> dict[str, Any]:
        """All ranks call it."""
        rows = self.rows.gathered(self._state["rows"])
        return {"settings": self._settings, **self._state, "rows": rows}

    def unfinished(self) -> dict[str, tuple[int, int]]:
        """By domain (documents, tokens): what the steps taken have begun, or had ready, and not
        read to its end. All ranks call it."""
        documents: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for part, begun, left in self.rows.unfinished(self.state_dict()["rows"]):
            documents[self.domains[part]] += begun
            tokens[self.domains[part]] += left
        return {name: (documents[name], tokens[name]) for name in self.domains if documents[name]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step that `state` is of. Only before the first step is taken.

        Raises:
            UserError: the position is of other settings or other documents.
        """
        if self._ahead is not None:
            raise ValueError("a position is loaded before the first step")
        for key, value in self._settings.items():
            if state["settings"].get(key) != value:
                raise UserError(
                    f"cannot continue in the middle of the data: {key} was "
                    f"{state['settings'].get(key)} and is now {value}; set it back, or start anew "
                    "with --restart"
                )
        self._state = {"step": state["step"], "rows": state["rows"]}
        self.rows.load_state_dict(state["rows"])

    def close(self) -> None:
        """Stop preparing steps."""
        if self._ahead is not None:
            self._ahead.close()

    def _steps(self, done: int) -> Iterator[_Step]:
        recipe, objective = self.recipe, OBJECTIVES[self.recipe.model.objective]
        owned = range(self.rank, recipe.train.batch_size, self.ranks)
        size = recipe.train.micro_batch_size or len(owned)
        for step, sequences in enumerate(self.rows, start=done):
            rows = [
                objective.row(
                    sequence,
                    self.tokenizer,
                    np.random.default_rng((recipe.seed, self.stage, row, step)),
                    recipe.data.masking,
                    recipe.data.whole_word,
                )
                for row, sequence in zip(owned, sequences, strict=True)
            ]
            batches = []
            for first in range(0, len(rows), size):
                here = slice(first, first + size)
                batch = collate(rows[here])
                if len(self.domains) > 1:
                    domains = [
                        domains_of_row(sequence, segments)
                        for sequence, (_, _, segments) in zip(
                            sequences[here], rows[here], strict=True
                        )
                    ]
                    length = batch["segments"].shape[1]
                    batch["domains"] = torch.from_numpy(pad_rows(domains, length, -1))
                batches.append(_pinned(batch))
            yield _Step(batches, {"step": step + 1, "rows": self.rows.state_dict()}, sequences)


class PreparedRows:
    """This rank's rows of a stage whose corpora are prepared: only its own documents are read."""

    def __init__(
        self,
        recipe: Recipe,
        stage: int,
        corpora: Mapping[str, Corpus],
        frame: Frame,
        rank: int,
        ranks: int,
    ):
        self.packer, self.parts, _ = stage_packer(recipe, stage, corpora, frame)
        self.frame = frame
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[Sequence]]:
        for rows in self.packer:
            own, length = rows[self.rank :: self.ranks], self.packer.shape.length
            yield read_rows(own, self.parts, length, self.frame)

    def state_dict(self) -> dict[str, Any]:
        return self.packer.state_dict()

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        return state  # of all rows already

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.packer.load_state_dict(state)

    def unfinished(self, state: dict[str, Any]) -> list[list[int]]:
        return state["unfinished"]


def frame_of(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Frame:
    """The special tokens that packing adds; a causal model's documents bring their own.

    Raises:
        UserError: the tokenizer lacks one.
    """
    return Encoder.of(tokenizer, recipe.model.objective, recipe.data.template).frame


def training_batches(
    recipe: Recipe,
    stage: int,
    tokenizer: PreTrainedTokenizerFast,
    corpora: Mapping[str, Corpus],
    rank: int,
    ranks: int,
) -> StageBatches:
    """corpora: the documents to train on, of every domain that the stage reads."""
    if recipe.train.batch_size % ranks:
        raise ValueError(f"{recipe.train.batch_size} rows cannot be shared evenly by {ranks} ranks")
    frame = frame_of(recipe, tokenizer)
    rows = PreparedRows(recipe, stage, corpora, frame, rank, ranks)
    read = {n: [corpora[n].documents, corpora[n].tokens] for n in domains_of(recipe, stage)}
    settings = {"[documents, tokens]": read}
    return StageBatches(recipe, stage, tokenizer, rows, settings, rank, ranks)


def domains_of_row(sequence: Sequence, segments: np.ndarray) -> np.ndarray:
    """int16, for each token of the row that was made of a sequence: the domain of its document."""
    known = np.full(int(sequence.segments.max(initial=-1)) + 2, -1, np.int16)  # the last: padding
    known[sequence.segments] = sequence.domains
    return known[segments]


def _pinned(batch: Batch) -> Batch:
    """In memory from which a GPU can copy while it computes."""
    return {k: t.pin_memory() for k, t in batch.items()} if torch.cuda.is_available() else batch


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

    background.start(work, stop.set, "prefetch")
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
