"""A prepared corpus: a domain's documents as tokens, in files that are memory-mapped.

One folder a domain, published whole: `train-00000.arrow`, `heldout-00000.arrow`, ... (see
`shards.py`), `train-lengths.npy` (int32, 4 bytes a document), with duplicates left out
`train-places.npy` (int64: where the documents that count lie), and `manifest.json` with the size
and hash of each file, what was read and what was left out. `prepare.py` makes it.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.checkpoint import MANIFEST, is_published, sha256
from pipeline.data.encode import Tokens
from pipeline.data.shards import Shard

Side = Literal["train", "heldout"]
SIDES: tuple[Side, Side] = ("train", "heldout")
SAMPLE = 1 << 16  # bytes at the beginning, in the middle and at the end of a file


class Corpus:
    """One side of a prepared domain; documents are addressed by their place, from 0.

    documents, tokens: how many there are. whole: whether they must not be cut (examples).
    """

    def __init__(self, folder: Path, side: Side, manifest: dict[str, Any]):
        counts = manifest["sides"][side]
        self.documents: int = counts["documents"]
        self.tokens: int = counts["tokens"]
        self.longest: int = counts["longest"]
        self.predicted: int = counts["predicted"]
        self.whole: bool = manifest["whole"]
        shards = [s for u in manifest["units"] for s in u["shards"] if s["side"] == side]
        self._paths = [folder / s["file"] for s in shards]
        self._starts = np.cumsum([0] + [s["documents"] for s in shards]).tolist()
        self._shards: list[Shard | None] = [None] * len(shards)
        mode: Literal["r"] | None = "r" if self.documents else None  # nothing cannot be mapped
        self._lengths = np.load(folder / f"{side}-lengths.npy", mmap_mode=mode)
        kept = folder / f"{side}-places.npy"
        self._places = np.load(kept, mmap_mode=mode) if kept.is_file() else None

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens of the documents at these places."""
        return self._lengths[places].astype(np.int64)

    def piece(self, place: int, start: int, stop: int | None) -> Tokens:
        """Tokens start..stop of a document (None: to its end).

        Raises:
            IndexError: a place outside of 0 ... documents - 1.
        """
        if not 0 <= place < self.documents:
            raise IndexError(f"place {place} of {self.documents} documents")
        if self._places is not None:
            place = int(self._places[place])
        number = bisect_right(self._starts, place) - 1
        return self._shard(number).piece(place - self._starts[number], start, stop, self.whole)

    def digests(self) -> np.ndarray:
        """uint64 [documents]: a hash of each document's text. The documents with the smallest
        ones are a sample that changes little when the corpus grows."""
        parts = [self._shard(i).digests() for i in range(len(self._paths))]
        found = np.concatenate([np.zeros(0, np.uint64), *parts])
        return found if self._places is None else found[self._places]

    def _shard(self, number: int) -> Shard:
        shard = self._shards[number]
        if shard is None:  # opened when first needed: there may be thousands
            shard = self._shards[number] = Shard(self._paths[number])
        return shard


@dataclass(frozen=True)
class Prepared:
    """A domain that is ready to be read."""

    folder: Path
    manifest: dict[str, Any]
    train: Corpus
    heldout: Corpus


def open_prepared(folder: Path) -> Prepared | None:
    """The corpus of a folder, or None where there is none (yet). Reads next to nothing."""
    if not is_published(folder):
        return None
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    train, heldout = (Corpus(folder, side, manifest) for side in SIDES)
    return Prepared(folder, manifest, train, heldout)


def damaged_files(folder: Path, files: dict[str, dict[str, Any]], thorough: bool) -> list[str]:
    """Which of a manifest's files are missing or differ: in size or in a sample of their bytes, and
    if thorough in their whole content."""
    found = []
    for name, known in files.items():
        path = folder / name
        same = path.is_file() and fingerprint(path) == known["sample"]
        if not same or (thorough and sha256(path) != known["sha256"]):
            found.append(name)
    return found


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a file."""
    return {"size": path.stat().st_size, "sample": fingerprint(path), "sha256": sha256(path)}


def fingerprint(path: Path) -> str:
    """Of a file's size and of a sample of its bytes: 16 hex digits, in a millisecond."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)}):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
