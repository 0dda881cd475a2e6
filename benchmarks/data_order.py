"""How fast prepared tokens become packed rows, and how long a seek takes; CPU seconds of one core.

    python benchmarks/data_order.py

Reading: 100,000 documents of 500 tokens on average, memory-mapped, in rows of 2,048, packing
included; against `datasets.map`, which groups the same documents to rows, and torch's DataLoader.
Seeking: in a corpus of 10 million documents (10 GB of ids), whose index is simulated.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from pipeline.data.encode import Frame, Tokens
from pipeline.data.mixture import Mixture, Part, Source
from pipeline.data.packing import Packer, Shape
from pipeline.data.prepared import Corpus
from pipeline.data.sequences import read_rows
from pipeline.data.shards import ShardWriter

LENGTH, ROWS, DOCUMENTS = 2048, 32, 100_000


def write(folder: Path, lengths: np.ndarray) -> Corpus:
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train-0.arrow", np.dtype("uint16")) as writer:
        for i, n in enumerate(lengths):
            writer.add(Tokens(rng.integers(0, 50_000, n).astype(np.int32)), i)
    np.save(folder / "train-lengths.npy", lengths.astype(np.int32))
    total = int(lengths.sum())
    side = {"documents": len(lengths), "tokens": total, "predicted": total, "longest": 1000}
    shard = {"side": "train", "file": "train-0.arrow", "documents": len(lengths)}
    manifest = {"sides": {"train": side}, "whole": False, "units": [{"shards": [shard]}]}
    return Corpus(folder, "train", manifest)


def packer_of(corpus: object) -> tuple[Packer, list[Part]]:
    parts = [Part("a", corpus)]  # type: ignore[arg-type]
    source = Source(parts, [0], (1,), limit=parts[0].corpus.documents)
    return Packer(Mixture([source], LENGTH), ROWS, Shape(LENGTH)), parts


def group(batch: dict) -> dict:
    flat = np.concatenate(batch["input_ids"])
    return {"input_ids": flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)}


class Index:
    """The lengths of 10 million documents; their tokens are not there."""

    documents, whole = 10_000_000, False

    def __init__(self) -> None:
        self._lengths = np.random.default_rng(0).integers(20, 980, self.documents).astype(np.int32)
        self.tokens = self.predicted = int(self._lengths.sum())

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return self._lengths[places].astype(np.int64)


def reading() -> None:
    lengths = np.random.default_rng(1).integers(20, 980, DOCUMENTS)
    tokens = int(lengths.sum())
    with tempfile.TemporaryDirectory() as name:
        corpus = write(Path(name), lengths)
        packer, parts = packer_of(corpus)
        start = time.process_time()
        for rows in packer:
            read_rows(rows, parts, LENGTH, Frame([], [], 0))
        ours = tokens / (time.process_time() - start)
        some = [corpus.piece(i, 0, None).ids.astype(np.int32) for i in range(20_000)]
        Dataset.from_dict({"input_ids": some}).save_to_disk(f"{name}/documents")
        documents = Dataset.load_from_disk(f"{name}/documents").with_format("numpy")
        start = time.process_time()
        rows_of = documents.map(group, batched=True, batch_size=1000)
        grouping = time.process_time() - start
        read = 0
        for batch in DataLoader(rows_of.with_format("torch"), ROWS, shuffle=True):
            read += batch["input_ids"].numel()
        theirs = read / (time.process_time() - start)
        later = read / (time.process_time() - start - grouping)
    print(f"reading and packing       {ours / 1e6:6.1f} M tokens/s/core")
    print(f"datasets.map, DataLoader  {theirs / 1e6:6.1f} M: a ratio of {ours / theirs:.1f}")
    print(f"DataLoader after the map  {later / 1e6:6.1f} M: a ratio of {ours / later:.1f}")


def seeking() -> None:
    """What a stage that goes on waits for its place in the data."""
    index = Index()
    for at in (0.01, 0.9):  # of an epoch
        packer, _ = packer_of(index)
        next(packer)
        state, drawn = packer.state_dict(), int(at * Index.documents)
        state["drawn"] = [drawn]
        state["rows"] = [[0, drawn - i, 5] for i in range(ROWS)]
        start = time.perf_counter()
        packer.load_state_dict(state)
        next(packer)
        milliseconds = 1000 * (time.perf_counter() - start)
        print(f"seek to {at:3.0%}, first step   {milliseconds:6.1f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seek", action="store_true", help="only that")
    if not parser.parse_args().seek:
        reading()
    seeking()
