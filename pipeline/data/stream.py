"""Streaming: a stage whose corpora are read as they are trained on, and never stored.

The shards of a source (files, or parts of a data set) are shared out over groups of rows, as many
as there are shards for; a group reads its own in a seeded order, some of them open at a time, and
shuffles within windows of documents, which it deals to its rows in turn. Every row packs what it is
dealt, and mixes sources by itself. So a rank reads the shards of its own rows' groups only, while
nothing depends on the number of ranks.

An epoch of a group is one pass over its shards; the next shares them out anew. A position is, for
each row, which documents it holds, and for each group the place in its shards from which the
windows in use can be read again: what lies before that place in an open shard is passed over.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from pipeline.data.encode import Encoder, Frame, Tokens
from pipeline.data.instruct import Document
from pipeline.data.mixture import Mixture, Part
from pipeline.data.order import Permutation
from pipeline.data.packing import Packer, Shape, first_used
from pipeline.data.sequences import Sequence as Packed
from pipeline.data.sequences import read_rows
from pipeline.errors import UserError

BATCH = 16  # documents that are tokenized in one call
POOL = 16  # whole documents that wait in a row


@dataclass(frozen=True)
class Shard:
    """Documents of one of a stage's parts, by number; `read` opens them from the first on."""

    part: int
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class StreamedSource:
    """Shards that are read together, for a share of the tokens; at most `epochs` times."""

    name: str
    shards: list[Shard]
    share: float
    epochs: float | None = None


class ShardReader:
    """The documents of a group's shards, `together` of them open, epoch after epoch."""

    def __init__(
        self, source: StreamedSource, group: int, groups: int, seed: Sequence[int], together: int
    ):
        self.source, self.group, self.groups = source, group, groups
        self.seed, self.together = tuple(seed), together
        self.load_state_dict({"epoch": 0, "started": 0, "open": []})

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its shards were opened, and of the open ones what was read."""
        return {
            "epoch": self._epoch,
            "started": self._started,
            "open": [[shard, read] for shard, read, _ in self._open],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(state["epoch"])
        self._started = state["started"]
        for shard, read in state["open"]:
            documents = self.source.shards[shard].read()
            for _ in range(read):
                next(documents, None)
            self._open.append((shard, read, documents))

    def window(self, size: int) -> list[tuple[int, Document]]:
        """The next documents with their parts: `size` of them, or fewer at the end of an epoch.

        Raises:
            UserError: there is none in any shard, or too many epochs.
        """
        found: list[tuple[int, Document]] = []
        opened: set[int] = set()  # an epoch's share of the shards may be without documents
        while len(found) < size:
            while len(self._open) < self.together and self._started < len(self._order):
                shard = int(self._order[self._started])
                self._open.append((shard, 0, self.source.shards[shard].read()))
                self._started += 1
                opened.add(shard)
            if not self._open:
                if found:
                    break
                if len(opened) == len(self.source.shards):
                    raise UserError(f"data.domains.{self.source.name}: no document to train on")
                self._begin(self._epoch + 1)
                continue
            shard, read, documents = self._open.popleft()
            document = next(documents, None)
            if document is not None:
                self._open.append((shard, read + 1, documents))
                if not isinstance(document, str) or document.strip():
                    found.append((self.source.shards[shard].part, document))
        return found

    def _begin(self, epoch: int) -> None:
        allowed = self.source.epochs
        if allowed is not None and epoch >= allowed:
            raise UserError(
                f"{self.source.name} is read {allowed:g} times, and the stage wants more of it; "
                "lower its weight or the length of the stage, or raise max_repetitions"
            )
        count = len(self.source.shards)
        order = Permutation(count, (*self.seed, epoch))(np.arange(count))
        self._epoch, self._started = epoch, 0
        self._order = order[self.group :: self.groups]
        self._open: deque[tuple[int, int, Iterator[Document]]] = deque()


class Dealer:
    """A group's documents, shuffled within windows and dealt to its rows in turn.

    Document n of the group is number n // rows of the row n % rows of it.
    """

    def __init__(self, reader: ShardReader, rows: int, window: int, seed: Sequence[int]):
        self.reader, self.rows, self.window, self.seed = reader, rows, window, tuple(seed)
        self._number = 0
        self._windows = deque([(0, reader.state_dict())])  # where those in use begin
        self._waiting: dict[int, deque[tuple[int, int, Document]]] = {}
        self._wanted: dict[int, int] = {}

    def want(self, row: int, number: int) -> None:
        """Keep the documents of a row, from its own number on."""
        self._waiting[row], self._wanted[row] = deque(), number

    def deal(self, row: int) -> list[tuple[int, int, Document]]:
        """(number, part, document) of the next documents of a row, at least one."""
        waiting = self._waiting[row]
        while not waiting:
            if self._windows[-1][0] != self._number:
                self._windows.append((self._number, self.reader.state_dict()))
            documents = self.reader.window(self.window)
            order = np.random.default_rng((*self.seed, self._number)).permutation(len(documents))
            for i in order.tolist():
                number, owner = divmod(self._number, self.rows)
                if owner in self._wanted and number >= self._wanted[owner]:
                    self._waiting[owner].append((number, *documents[i]))
                self._number += 1
        return [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]

    def state_dict(self, needed: dict[int, int]) -> list[Any]:
        """needed: for each row here the number of the first document that it still uses."""
        first = min(row + self.rows * number for row, number in needed.items())
        while len(self._windows) > 1 and self._windows[1][0] <= first:
            self._windows.popleft()
        return list(self._windows[0])

    def load_state_dict(self, state: list[Any]) -> None:
        self._number = state[0]
        self.reader.load_state_dict(state[1])
        self._windows = deque([(state[0], state[1])])


class HeldDocuments:
    """A corpus in memory: the tokens of some documents, by place."""

    def __init__(self, held: dict[int, Tokens], whole: bool):
        self.held, self.whole = held, whole
        sizes = [len(t.ids) for t in held.values()]
        learnt = [t.predicted for t in held.values()]
        self.documents, self.tokens = len(held), sum(sizes)
        self.predicted = sum(
            size if p is None else int(p.sum()) for size, p in zip(sizes, learnt, strict=True)
        )

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return np.array([len(self.held[p].ids) for p in places.tolist()], np.int64)

    def piece(self, place: int, start: int, stop: int) -> Tokens:
        t = self.held[place]
        starts = None if t.word_starts is None else t.word_starts[start:stop]
        predicted = None if t.predicted is None else t.predicted[start:stop]
        return Tokens(t.ids[start:stop], starts, predicted, t.whole)

    def digests(self) -> np.ndarray:
        """uint64 [documents]: an order like that of hashes, which is the order they came in."""
        return np.arange(self.documents, dtype=np.uint64)


class _RowSource:
    """What one row is dealt of a source; a document's place is its number among all sources."""

    def __init__(
        self,
        dealer: Dealer,
        row: int,
        place: tuple[int, int],
        parts: Sequence[Part],
        weight: float,
        encoder: Encoder,
    ):
        """row: in its group. place: (number of this source, sources)."""
        self.parts, self.weight = parts, weight
        self.dealer, self.row = dealer, row
        self._place, self._encoder = place, encoder
        self._held: list[HeldDocuments] = [p.corpus for p in parts]  # type: ignore[misc]
        self._known: dict[int, tuple[int, int, int]] = {}
        self.start(0)

    def start(self, draw: int) -> None:
        """Let `draw` be the first document that can be asked for."""
        self._next = draw
        self.dealer.want(self.row, draw)

    def get(self, draw: int) -> tuple[int, int, int]:
        while draw >= self._next:
            dealt = self.dealer.deal(self.row)
            encoded = self._encoder.encode([document for _, _, document in dealt])
            for (number, part, _), tokens in zip(dealt, encoded, strict=True):
                place = number * self._place[1] + self._place[0]
                self._held[part].held[place] = tokens
                self._known[number] = part, place, len(tokens.ids)
            self._next = dealt[-1][0] + 1
        return self._known[draw]

    def look_up(self, draws: np.ndarray) -> list[tuple[int, int, int]]:
        return [self.get(draw) for draw in draws.tolist()]

    def forget(self, first: int) -> None:
        """Documents before `first` are not asked for again."""
        for number in [n for n in self._known if n < first]:
            part, place, _ = self._known.pop(number)
            del self._held[part].held[place]


@dataclass
class _Row:
    """A row with the documents that it holds."""

    parts: list[Part]
    sources: list[_RowSource]
    packer: Packer


class StreamedRows:
    """This rank's rows of a streamed stage; they never end.

    A rank's state speaks for its own rows; `gathered`, it can be loaded by any number of ranks.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        parts: Sequence[tuple[str, bool]],
        encoder: Encoder,
        frame: Frame,
        shape: Shape,
        rows: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        window: int = 1024,
        together: int = 8,
    ):
        """parts: the stage's domains: (name, whether its documents are whole)."""
        self._length, self._frame = shape.length, frame
        self._ranks = ranks
        self._dealers: dict[str, Dealer] = {}  # by "source/group"
        self._rows: dict[int, _Row] = {}
        pool = POOL if any(whole for _, whole in parts) else 0
        for row in range(rank, rows, ranks):
            held = [Part(name, HeldDocuments({}, whole)) for name, whole in parts]
            own = []
            for s, source in enumerate(sources):
                count = len(source.shards)
                groups = max(g for g in range(1, rows + 1) if rows % g == 0 and g <= count)
                group = row % groups
                if f"{s}/{group}" not in self._dealers:
                    reader = ShardReader(source, group, groups, (seed, s), together)
                    dealer = Dealer(reader, rows // groups, window, (seed, s, group))
                    self._dealers[f"{s}/{group}"] = dealer
                dealer, place = self._dealers[f"{s}/{group}"], (s, len(sources))
                own.append(_RowSource(dealer, row // groups, place, held, source.share, encoder))
            packer = Packer(Mixture(own, shape.length), 1, shape, pool)
            self._rows[row] = _Row(held, own, packer)

    def __iter__(self) -> Iterator[list[Packed]]:
        while True:
            packed = []
            for row in self._rows.values():
                planned = next(row.packer)
                packed += read_rows(planned, row.parts, self._length, self._frame)
                for source, first in zip(row.sources, row.packer.first_used(), strict=True):
                    source.forget(first)
            yield packed

    def state_dict(self) -> dict[str, Any]:
        used: dict[int, dict[int, int]] = {id(d): {} for d in self._dealers.values()}
        for row in self._rows.values():
            for source, first in zip(row.sources, row.packer.first_used(), strict=True):
                used[id(source.dealer)][source.row] = first
        return {
            "rows": {str(n): row.packer.state_dict() for n, row in self._rows.items()},
            "groups": {k: d.state_dict(used[id(d)]) for k, d in self._dealers.items()},
        }

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """One state of all rows; all ranks call it behind the same step."""
        if self._ranks == 1:
            return state
        states: list[Any] = [None] * self._ranks
        dist.all_gather_object(states, state)
        return merge_states(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, dealer in self._dealers.items():
            dealer.load_state_dict(state["groups"][key])
        for number, row in self._rows.items():
            saved = state["rows"][str(number)]
            for source, first in zip(row.sources, first_used(saved), strict=True):
                source.start(first)
        for number, row in self._rows.items():
            row.packer.load_state_dict(state["rows"][str(number)])

    def unfinished(self, state: dict[str, Any]) -> list[list[int]]:
        return [found for row in state["rows"].values() for found in row["unfinished"]]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of all rows from those of all ranks behind the same step."""
    groups: dict[str, list[Any]] = {}
    for state in states:
        for key, (number, place) in state["groups"].items():
            if key not in groups or number < groups[key][0]:
                groups[key] = [number, place]
    return {"rows": {k: r for s in states for k, r in s["rows"].items()}, "groups": groups}
