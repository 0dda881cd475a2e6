"""Which document comes next: domains joined to sources, sources mixed by weight.

A source is one or several domains that are read in one order of all their documents, epoch after
epoch. A mixture gives each document to the source that has had the fewest tokens for its weight.
Everything follows from the seed and from how many documents were drawn of each source, so that is
all there is to save.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.data.encode import Tokens
from pipeline.data.order import Permutation

BLOCK = 4096  # documents whose places and lengths are looked up together


class Corpus(Protocol):
    """The documents of one domain, by their place 0..documents-1; all of `tokens` tokens.

    whole: they are never cut (instruction examples). predicted: how many tokens are learnt.
    """

    documents: int
    tokens: int
    predicted: int
    whole: bool

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of the documents at these places: int64 [n]."""

    def piece(self, place: int, start: int, stop: int) -> Tokens:
        """Tokens start..stop of a document."""


@dataclass(frozen=True)
class Part:
    """A domain of a stage."""

    name: str
    corpus: Corpus


class Drawn(NamedTuple):
    """A document that was drawn: number `draw` of `source`, at `place` of the stage's `part`."""

    source: int
    draw: int
    part: int
    place: int
    length: int  # tokens
    whole: bool


class Supply(Protocol):
    """What a mixture draws from: numbered documents, as (part, place, length)."""

    parts: Sequence[Part]
    weight: float

    def get(self, draw: int) -> tuple[int, int, int] | None:
        """Document 0, 1, ...; None behind the last."""

    def look_up(self, draws: np.ndarray) -> list[tuple[int, int, int]]:
        """Any documents, by their numbers: int64 [n]."""


class Source:
    """The documents of some parts of a stage, each once an epoch, in an order of all of them.

    Args:
        parts: of the whole stage.
        members: which of them this source reads, as indices.
        seed: non-negative numbers; None keeps the order.
        weight: its share of the tokens, against the weights of the other sources.
        limit: how many documents may be drawn; None is no end.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        members: Sequence[int],
        seed: Sequence[int] | None,
        weight: float = 1.0,
        limit: int | None = None,
    ):
        self.parts, self.members = parts, list(members)
        self.seed, self.weight, self.limit = seed, weight, limit
        counts = [parts[m].corpus.documents for m in self.members]
        self._ends = np.cumsum(counts)
        self.documents = int(self._ends[-1])
        self.names = [parts[m].name for m in self.members]
        self.tokens = sum(parts[m].corpus.tokens for m in self.members)
        self._first = 0  # the draw with which the block begins
        self._block: list[tuple[int, int, int]] = []

    def get(self, draw: int) -> tuple[int, int, int] | None:
        """(part, place, length) of draw 0, 1, ...; None behind the limit."""
        if self.limit is not None and draw >= self.limit:
            return None
        at = draw - self._first
        if not 0 <= at < len(self._block):
            self._load(draw)
            at = 0
        return self._block[at]

    def look_up(self, draws: np.ndarray) -> list[tuple[int, int, int]]:
        """(part, place, length) of any draws, int64 [n]."""
        epochs, numbers = np.divmod(draws, self.documents)
        if self.seed is not None:
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                numbers[now] = Permutation(self.documents, (*self.seed, epoch))(numbers[now])
        member = np.searchsorted(self._ends, numbers, side="right")
        lengths = np.empty(len(numbers), np.int64)
        for i, part in enumerate(self.members):
            mine = member == i
            numbers[mine] -= self._ends[i - 1] if i else 0
            lengths[mine] = self.parts[part].corpus.lengths(numbers[mine])
        parts = np.array(self.members)[member]
        return list(zip(parts.tolist(), numbers.tolist(), lengths.tolist(), strict=True))

    def _load(self, draw: int) -> None:
        """Look up the documents from `draw` on, at most to the end of its epoch."""
        rest = self.documents - draw % self.documents
        self._first, self._block = draw, self.look_up(np.arange(draw, draw + min(BLOCK, rest)))


class Mixture:
    """The documents of all sources in the order in which a stage takes them.

    Documents without tokens are left out, and whole ones of more than `longest` tokens.
    """

    def __init__(self, sources: Sequence[Supply], longest: int):
        self.sources, self.longest = sources, longest
        total = sum(s.weight for s in sources)
        self._shares = [s.weight / total for s in sources]
        self.drawn = [0] * len(sources)  # documents
        self.tokens = [0] * len(sources)

    def draw(self) -> Drawn | None:
        """The next document; None once the source whose turn it is has reached its limit."""
        while True:
            source = self._turn() if len(self.sources) > 1 else 0
            owner, number = self.sources[source], self.drawn[source]
            found = owner.get(number)
            if found is None:
                return None
            part, place, length = found
            whole = owner.parts[part].corpus.whole
            self.drawn[source] += 1
            if length and not (whole and length > self.longest):
                self.tokens[source] += length
                return Drawn(source, number, part, place, length, whole)

    def look_up(self, named: Sequence[tuple[int, int]]) -> list[Drawn]:
        """Documents by (source, draw); draws nothing."""
        found: dict[tuple[int, int], Drawn] = {}
        for i, source in enumerate(self.sources):
            draws = [draw for s, draw in named if s == i]
            places = source.look_up(np.array(draws, np.int64))
            for draw, (part, place, length) in zip(draws, places, strict=True):
                whole = source.parts[part].corpus.whole
                found[i, draw] = Drawn(i, draw, part, place, length, whole)
        return [found[n] for n in named]

    def _turn(self) -> int:
        """The source that lacks the most tokens for its share."""
        total = sum(self.tokens)
        lacking = [
            share * total - tokens for share, tokens in zip(self._shares, self.tokens, strict=True)
        ]
        return max(range(len(lacking)), key=lacking.__getitem__)
