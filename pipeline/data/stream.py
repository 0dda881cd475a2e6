"""Documents packed to sequences of one length, the same for every number of ranks.

The documents of all epochs, shuffled within windows, form one endless numbered list. Document i
belongs to virtual stream i % V, where V is the number of sequences of a step. Every stream packs
its own documents and gives one sequence a step; rank r owns the streams v with v % ranks == r and
tokenizes only those. So what a step consists of does not depend on the number of ranks, and the
place where a stream stands is two numbers: its document and the token in it.

Texts are cut where a sequence ends; instruction examples are not, so a sequence that has no room
for the next example is padded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.encode import Encoder, Tokens
from pipeline.data.instruct import Document, Example
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMALLEST_PIECE = 8  # tokens of a document cut at the end of a sequence; below that, pad instead
BATCH = 16  # documents that are tokenized in one call


@dataclass
class Sequence:
    """One packed sequence of `length` tokens.

    ids: int32 [length], padded with the pad token (or, where there is none, end of text).
    words: int32 [length], which whole word of the sequence a token belongs to, counted from 0;
        -1 on special tokens and padding, and everywhere for causal models.
    segments: int16 [length], which document of the pack a token belongs to; -1 on padding.
    predicted: bool [length], which tokens a causal model learns to predict: all of a text, the
        response of an example, no padding.
    """

    ids: np.ndarray
    words: np.ndarray
    segments: np.ndarray
    predicted: np.ndarray


class PackedStream(IterableDataset):
    """Per step, this rank's sequences in the order of their streams, and the state after the step.

    Iterating never ends: epochs repeat with new shuffles. `documents(e)` gives the documents of
    epoch e = 0, 1, ... in a fixed order. For masked models every piece of a document is
    `<s> ... </s>`, and a sequence may hold several pieces; for causal models (`masked=False`) the
    documents, each `bos? ... eos`, are concatenated and cut. An instruction example (causal models
    only) is `bos? prompt response eos`, or what `template="chat"` makes of it; it is never cut and
    left out if it is longer than a sequence. Several share one sequence unless `pack_examples` is
    off.

    A state is a small JSON-able dict. It speaks for this rank's streams only: to go on with
    another number of ranks, gather the states of all ranks and `merge_states` them.

    Raises:
        UserError: a tokenizer without the special tokens needed, an epoch without any document, a
            state of other settings.
        ValueError: `streams` is not a multiple of `world_size`.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[Document]],
        tokenizer: "PreTrainedTokenizerFast",
        length: int,
        streams: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_window: int = 1024,
        masked: bool = True,
        template: str = "alpaca",
        pack_examples: bool = True,
    ):
        if streams % world_size:
            raise ValueError(f"{streams} streams cannot be shared evenly by {world_size} ranks")
        self.documents = documents
        self.packer = _Packer.of(tokenizer, length, masked, template, pack_examples)
        self.length, self.streams = length, streams
        self.owned = range(rank, streams, world_size)
        self.seed, self.shuffle_window = seed, shuffle_window
        self._start: dict[str, Any] = {
            "settings": {
                "length": length,
                "streams": streams,
                "seed": seed,
                "shuffle_window": shuffle_window,
                "masked": masked,
            },
            "step": 0,
            "epoch": 0,
            "first": 0,
            "positions": {str(v): [0, 0] for v in self.owned},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start behind the step that `state` was yielded with."""
        for key, value in self._start["settings"].items():
            if state["settings"].get(key) != value:
                raise UserError(
                    f"cannot resume in the middle of the data: {key} was "
                    f"{state['settings'].get(key)} and is now {value}; set it back, or start anew"
                )
        missing = [v for v in self.owned if str(v) not in state["positions"]]
        if missing:
            raise ValueError(f"the state lacks the streams {missing}: merge those of all ranks")
        self._start = state

    def __iter__(self) -> Iterator[tuple[list[Sequence], dict[str, Any]]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UserError("packing is sequential: use at most one worker (data.workers=1)")
        start = self._start
        positions = {v: start["positions"][str(v)] for v in self.owned}
        texts: dict[int, deque[Document]] = {v: deque() for v in self.owned}
        windows = self._windows(start["epoch"], start["first"])
        # (epoch, number of its first document), of every epoch that a stream may still stand in
        epochs = deque([(start["epoch"], start["first"])])

        def puller(stream: int) -> Callable[[], list[Document]]:
            def pull() -> list[Document]:
                waiting = texts[stream]
                while not waiting:
                    epoch, first, window = next(windows)
                    if epoch != epochs[-1][0]:
                        epochs.append((epoch, first))
                    for number, text in enumerate(window, first):
                        owner = number % self.streams
                        # those before were packed already, before the state was taken
                        if owner in texts and number // self.streams >= positions[owner][0]:
                            texts[owner].append(text)
                return [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]

            return pull

        cursors = {v: _Cursor(puller(v), self.packer, *positions[v]) for v in self.owned}
        for step in count(start["step"] + 1):
            sequences = []
            for cursor in cursors.values():
                sequence = self.packer.pack(cursor, self.length)
                assert sequence is not None  # the windows never end
                sequences.append(sequence)
            earliest = min(v + self.streams * c.document for v, c in cursors.items())
            while len(epochs) > 1 and epochs[1][1] <= earliest:
                epochs.popleft()
            state = {
                "settings": self._start["settings"],
                "step": step,
                "epoch": epochs[0][0],
                "first": epochs[0][1],
                "positions": {str(v): [c.document, c.offset] for v, c in cursors.items()},
            }
            yield sequences, state

    def _windows(self, epoch: int, first: int) -> Iterator[tuple[int, int, list[Document]]]:
        """(epoch, number of the first document, shuffled documents), window after window."""
        for e in count(epoch):
            documents = (d for d in self.documents(e) if not _blank(d))
            start = first
            for w in count():
                window = list(islice(documents, self.shuffle_window))
                if not window:
                    break
                order = np.random.default_rng([self.seed, e, w]).permutation(len(window))
                yield e, first, [window[i] for i in order]
                first += len(window)
            if first == start:
                raise UserError("the corpus has no document to train on")


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One state of all streams from the states of all ranks after the same step."""
    states = list(states)
    if len({state["step"] for state in states}) != 1:
        raise ValueError("the states are of different steps")
    earliest = min(states, key=lambda state: state["epoch"])
    positions = {k: v for state in states for k, v in state["positions"].items()}
    return {**earliest, "positions": positions}


def heldout_sequences(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    length: int,
    count: int,
    masked: bool,
    template: str = "alpaca",
    pack_examples: bool = True,
) -> list[Sequence]:
    """The first `count` sequences of the documents packed in order, fewer if the text ends before.

    The last one may be padded. Raises UserError if there is no text.
    """
    packer = _Packer.of(tokenizer, length, masked, template, pack_examples)
    texts = (d for d in documents if not _blank(d))
    cursor = _Cursor(lambda: list(islice(texts, BATCH)), packer)
    packed = iter(lambda: packer.pack(cursor, length), None)
    sequences = list(islice(packed, count))
    if not sequences:
        raise UserError(
            "the corpus has no held-out document, or only examples that are longer than a sequence "
            f"({length} tokens, data.sequence_length)"
        )
    return sequences


def example_lengths(
    examples: Iterable[Example], tokenizer: "PreTrainedTokenizerFast", template: str
) -> Iterator[tuple[int, int]]:
    """(tokens of the prompt, tokens of the whole) of each example, as a stream encodes them."""
    encoder = Encoder.of(tokenizer, False, template)
    examples = iter(examples)
    while batch := list(islice(examples, BATCH)):
        for tokens in encoder.encode(batch):
            assert tokens.predicted is not None  # of an example
            yield int((~tokens.predicted).sum()), len(tokens.ids)


def _blank(document: Document) -> bool:
    return isinstance(document, str) and not document.strip()


@dataclass
class _Packer:
    """Tokens to sequences."""

    encoder: Encoder
    length: int
    pack_examples: bool

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerFast",
        length: int,
        masked: bool,
        template: str,
        pack_examples: bool,
    ) -> "_Packer":
        if length < 16:
            raise ValueError(f"a length of {length} tokens is below 16")
        return cls(Encoder.of(tokenizer, masked, template), length, pack_examples)

    def encode(self, documents: Items[Document]) -> list[Tokens]:
        """Nothing of an example that is too long."""
        encoded = self.encoder.encode(documents)
        return [Tokens(t.ids[:0]) if t.whole and len(t.ids) > self.length else t for t in encoded]

    def pack(self, cursor: "_Cursor", length: int) -> Sequence | None:
        """The next sequence, or None at the end of the text."""
        e = self.encoder
        ids = np.full(length, e.pad, np.int32)
        words = np.full(length, -1, np.int32)
        segments = np.full(length, -1, np.int16)
        predicted = np.zeros(length, bool)
        ends = [e.before, e.after] if e.masked else [[], []]
        used = segment = next_word = 0
        while tokens := cursor.tokens():
            rest = tokens.ids[cursor.offset :]
            room = length - used - len(ends[0]) - len(ends[1])
            take = self._piece(len(rest), room, first=used == 0)
            if take == 0 or (tokens.whole and take < len(rest)):
                break
            alone = tokens.whole and not self.pack_examples
            if alone and used:
                break
            start, stop = used + len(ends[0]), used + len(ends[0]) + take
            end = stop + len(ends[1])
            ids[used:start], ids[start:stop], ids[stop:end] = ends[0], rest[:take], ends[1]
            segments[used:end] = segment
            predicted[used:end] = True if tokens.predicted is None else tokens.predicted
            if tokens.word_starts is not None:
                begins = tokens.word_starts[cursor.offset : cursor.offset + take].copy()
                begins[0] = True  # a word cut by the end of a piece counts as two
                words[start:stop] = np.cumsum(begins) - 1 + next_word
                next_word = int(words[stop - 1]) + 1
            used, segment = end, segment + 1
            cursor.advance(take)
            if used == length or alone:
                break
        return Sequence(ids, words, segments, predicted) if used else None

    def _piece(self, rest: int, room: int, first: bool) -> int:
        """How many of the `rest` tokens of a document to put into `room`; 0: pad instead."""
        take = max(0, min(rest, room))
        if not self.encoder.masked or take == rest:
            return take
        if rest - take < SMALLEST_PIECE:  # leave a whole piece for the next sequence
            take = rest - SMALLEST_PIECE
        if take < SMALLEST_PIECE:
            return room if first else 0
        return take


@dataclass
class _Cursor:
    """Where a stream stands: `document` counts those used up, `offset` the tokens of the next."""

    pull: Callable[[], list[Document]]  # more texts, or none at the end
    packer: _Packer
    document: int = 0
    offset: int = 0
    encoded: deque[Tokens] = field(default_factory=deque)

    def tokens(self) -> Tokens | None:
        """Of the whole current document, or None at the end of the text."""
        while not self.encoded:
            texts = self.pull()
            if not texts:
                return None
            self.encoded.extend(self.packer.encode(texts))
            self._skip_used()
        return self.encoded[0]

    def advance(self, count: int) -> None:
        self.offset += count
        self._skip_used()

    def _skip_used(self) -> None:
        """Go on to a document with tokens left (none: too long, or odd text)."""
        while self.encoded and self.offset >= len(self.encoded[0].ids):
            self.encoded.popleft()
            self.document, self.offset = self.document + 1, 0
