"""One Arrow file of tokenized documents: written batch by batch, read through the memory map.

Columns, one row a document: `ids` (large_list of uint16 or uint32), `digest` (uint64 of its text),
and where the model needs them `word_starts` or `predicted` (large_list of bool: a bit a token).
"""

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from pipeline.data.encode import Tokens

FLUSH = 1 << 24  # tokens of a record batch


class ShardWriter:
    """Writes documents to a file; `dtype` holds the largest id."""

    def __init__(self, path: Path, dtype: np.dtype, flags: Iterable[str] = ()):
        """flags: "word_starts", "predicted": what the documents have."""
        self.documents = self.tokens = 0
        self._dtype, self._flags = dtype, tuple(flags)
        bits = [pa.field(name, pa.large_list(pa.bool_())) for name in self._flags]
        ids = pa.field("ids", pa.large_list(pa.from_numpy_dtype(dtype)))
        self._schema = pa.schema([ids, pa.field("digest", pa.uint64()), *bits])
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: list[Tokens] = []
        self._digests: list[int] = []
        self._waiting_tokens = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._file.close()
        finally:
            self._sink.close()

    def add(self, tokens: Tokens, digest: int) -> None:
        self._waiting.append(tokens)
        self._digests.append(digest)
        self._waiting_tokens += len(tokens.ids)
        if self._waiting_tokens >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        sizes = [len(t.ids) for t in self._waiting]
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())

        def column(values: list[np.ndarray]) -> pa.Array:
            return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values)))

        ids = column([t.ids.astype(self._dtype) for t in self._waiting])
        bits = [column([getattr(t, name) for t in self._waiting]) for name in self._flags]
        arrays = [ids, pa.array(self._digests, pa.uint64()), *bits]
        self._file.write_batch(pa.record_batch(arrays, schema=self._schema))
        self.documents += len(self._waiting)
        self.tokens += self._waiting_tokens
        self._waiting, self._digests, self._waiting_tokens = [], [], 0


class Shard:
    """The documents of one file, by their place in it. Nothing is copied but what is asked for."""

    def __init__(self, path: Path):
        """Raises pyarrow.ArrowInvalid or OSError for a damaged file."""
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._starts = np.cumsum([0] + [b.num_rows for b in batches]).tolist()
        self._batches = [_Batch(b) for b in batches]
        self.documents = self._starts[-1]

    def lengths(self) -> np.ndarray:
        """int32 [documents]."""
        return np.concatenate([np.diff(b.offsets).astype(np.int32) for b in self._batches])

    def predicted(self) -> np.ndarray:
        """int32 [documents]: how many of a document's tokens are learnt."""
        return np.concatenate([b.predicted_tokens() for b in self._batches])

    def digests(self) -> np.ndarray:
        """uint64 [documents]."""
        return np.concatenate([b.digests for b in self._batches])

    def piece(self, place: int, start: int, stop: int | None, whole: bool) -> Tokens:
        """Tokens start..stop of a document (None: to its end); the ids are a view of the file."""
        number = bisect_right(self._starts, place) - 1
        batch, place = self._batches[number], place - self._starts[number]
        first, end = batch.offsets[place : place + 2].tolist()
        start, stop = first + start, end if stop is None else first + stop
        word_starts, predicted = (
            None if bits is None else _unpack(bits, start, stop)
            for bits in (batch.word_starts, batch.predicted)
        )
        return Tokens(batch.ids[start:stop], word_starts, predicted, whole)


class _Batch:
    """Views of one record batch."""

    def __init__(self, batch: pa.RecordBatch):
        ids = batch.column("ids")
        self.offsets: np.ndarray = ids.offsets.to_numpy()
        self.ids: np.ndarray = ids.values.to_numpy()
        self.digests: np.ndarray = batch.column("digest").to_numpy()
        self.word_starts = _bits(batch, "word_starts")
        self.predicted = _bits(batch, "predicted")

    def predicted_tokens(self) -> np.ndarray:
        if self.predicted is None:
            return np.diff(self.offsets).astype(np.int32)
        before = np.concatenate([[0], np.cumsum(_unpack(self.predicted, 0, int(self.offsets[-1])))])
        return np.diff(before[self.offsets]).astype(np.int32)


def _bits(batch: pa.RecordBatch, name: str) -> np.ndarray | None:
    """uint8 [tokens / 8] of a column of booleans, or None."""
    if name not in batch.schema.names:
        return None
    return np.frombuffer(batch.column(name).values.buffers()[1], np.uint8)


def _unpack(bits: np.ndarray, start: int, stop: int) -> np.ndarray:
    """bool [stop - start]."""
    first = start >> 3
    flags = np.unpackbits(bits[first : (stop + 7) >> 3], bitorder="little")
    return flags[start - 8 * first : stop - 8 * first].view(bool)
