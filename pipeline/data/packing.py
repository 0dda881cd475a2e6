"""Rows of one length from documents of any: which tokens go where, by the lengths alone.

A step has V rows. Each row goes on with its own document from step to step and takes the next of
the mixture when it is used up, so a long document is spread over the steps instead of filling one
of them. Because no token is read, every rank works out the whole step and reads its own rows only,
and nothing depends on the number of ranks.

Texts are cut where a row ends. Whole documents (instruction examples) are not: some wait in a
pool, a row begins with the one that has waited longest, and then takes the longest that still fits.
When nothing is left to draw, what is left of the documents is dealt out over the rows, so that
every document is read once, in as few steps as possible; only the last step has rows with room.
"""

from bisect import bisect_right, insort
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.data.mixture import Drawn, Mixture

POOL = 128  # whole documents that wait for a row with room for them
SMALLEST_PIECE = 8  # tokens of a piece of a document for a masked model; below that, pad instead


class Piece(NamedTuple):
    """Tokens start..stop of the document at `place` of a stage's `part`."""

    part: int
    place: int
    start: int
    stop: int


Row = list[Piece]


@dataclass(frozen=True)
class Shape:
    """What a row holds.

    length: tokens. ends: special tokens around every piece (masked models). alone: one piece only.
    """

    length: int
    ends: int = 0
    alone: bool = False


class Packer:
    """The rows of step after step; iterating ends when all that the mixture gives is packed."""

    def __init__(self, mixture: Mixture, rows: int, shape: Shape, pool: int = 0):
        """pool: how many documents wait for a row with room; 0 where none is whole."""
        self.mixture, self.shape = mixture, shape
        self.held: list[tuple[Drawn, int] | None] = [None] * rows  # document, its next token
        self._pool_size = 0 if shape.alone else pool
        self._arrivals = 0
        self._whole: list[tuple[int, int, Drawn]] = []  # (length, arrival, document), sorted
        self._cuttable: list[tuple[int, Drawn]] = []  # texts beside whole documents, by arrival

    def __iter__(self) -> "Packer":
        return self

    def __next__(self) -> list[Row]:
        rows = [self._fill(row) for row in range(len(self.held))]
        if not any(rows):
            raise StopIteration
        return rows

    def _fill(self, row: int) -> Row:
        pieces: Row = []
        room = self.shape.length
        while (place := self._next(row, room, first=not pieces)) is not None:
            holder, document, offset = place
            take = self._take(document, offset, room - self.shape.ends, first=not pieces)
            if not take:
                break
            pieces.append(Piece(document.part, document.place, offset, offset + take))
            room -= take + self.shape.ends
            rest = offset + take < document.length
            self.held[holder] = (document, offset + take) if rest else None
            if room <= self.shape.ends or self.shape.alone:
                break
        return pieces

    def _next(self, row: int, room: int, first: bool) -> tuple[int, Drawn, int] | None:
        """(row that holds it, document, its next token) of what goes on in this row."""
        held = self.held[row]
        if held is not None:
            return row, *held
        document = self._choose(room, first) if self._pool_size else self.mixture.draw()
        if document is not None:
            if not document.whole:
                self.held[row] = document, 0
            return row, document, 0
        if self._pool_size and (self._whole or self._cuttable):
            return None  # none that waits fits
        # the end of the stage: help the row that has most left
        left = [(h[0].length - h[1], -i) for i, h in enumerate(self.held) if h is not None]
        if not left:
            return None
        holder = -max(left)[1]
        held = self.held[holder]
        assert held is not None
        return holder, *held

    def _choose(self, room: int, first: bool) -> Drawn | None:
        """From those that wait: the oldest for an empty row, else the longest that fits."""
        while len(self._whole) + len(self._cuttable) < self._pool_size:
            document = self.mixture.draw()
            if document is None:
                break
            self._wait(document)
        if first:
            oldest = min(self._whole, key=lambda w: w[1], default=None)
            if oldest and not (self._cuttable and self._cuttable[0][0] < oldest[1]):
                self._whole.remove(oldest)
                return oldest[2]
        else:
            at = bisect_right(self._whole, room, key=lambda w: w[0])
            if at:
                return self._whole.pop(at - 1)[2]
        return self._cuttable.pop(0)[1] if self._cuttable else None

    def _wait(self, document: Drawn) -> None:
        if document.whole:
            insort(self._whole, (document.length, self._arrivals, document))
        else:
            self._cuttable.append((self._arrivals, document))
        self._arrivals += 1

    def _take(self, document: Drawn, offset: int, room: int, first: bool) -> int:
        """How many of the document's tokens to put into `room`; 0: pad instead."""
        rest = document.length - offset
        take = max(0, min(rest, room))
        if not self.shape.ends or take == rest:
            return take
        if rest - take < SMALLEST_PIECE:  # leave a whole piece for the next row
            take = rest - SMALLEST_PIECE
        if take < SMALLEST_PIECE:
            return room if first else 0
        return take

    def unfinished(self) -> list[list[int]]:
        """For each part of which there are any: [part, documents that were drawn and are not packed
        to their end, tokens that they have left]."""
        documents: Counter[int] = Counter()
        tokens: Counter[int] = Counter()
        waiting = [d for _, _, d in self._whole] + [d for _, d in self._cuttable]
        for document, offset in [h for h in self.held if h] + [(d, 0) for d in waiting]:
            documents[document.part] += 1
            tokens[document.part] += document.length - offset
        return [[part, documents[part], tokens[part]] for part in sorted(documents)]

    def first_used(self) -> list[int]:
        """For each source the number of the first document that is still to be read."""
        return first_used(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where the packer stands, as JSON takes it; small: it names documents by their number.

        `unfinished` is there to be read: it follows from the rest.
        """
        waiting = sorted([(n, d) for _, n, d in self._whole] + self._cuttable)
        return {
            "drawn": list(self.mixture.drawn),
            "tokens": list(self.mixture.tokens),
            "rows": [h and [h[0].source, h[0].draw, h[1]] for h in self.held],
            "waiting": [[d.source, d.draw] for _, d in waiting],
            "unfinished": self.unfinished(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same sources, rows and shape."""
        self.mixture.drawn, self.mixture.tokens = list(state["drawn"]), list(state["tokens"])
        held = [h for h in state["rows"] if h]
        documents = iter(self.mixture.look_up([(s, d) for s, d, *_ in [*held, *state["waiting"]]]))
        self.held = [h and (next(documents), h[2]) for h in state["rows"]]
        self._whole, self._cuttable, self._arrivals = [], [], 0
        for document in documents:
            self._wait(document)


def first_used(state: dict[str, Any]) -> list[int]:
    """Of a packer's state: for each source the first document that is still to be read."""
    first = list(state["drawn"])
    for source, draw, *_ in [*filter(None, state["rows"]), *state["waiting"]]:
        first[source] = min(first[source], draw)
    return first
