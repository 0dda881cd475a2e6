"""Pieces of weights in safetensors files: each rank writes its own, any rank reads what it needs.

A tensor is called "<kind>/<first element>/<weight>": a 1-D fp32 piece of a row-major weight.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.shard import Shard

BLOCK = 16 << 20  # bytes that are written and hashed at a time


def key_of(kind: str, name: str, start: int) -> str:
    return f"{kind}/{start}/{name}"


def write_pieces(path: Path, pieces: Mapping[str, Tensor]) -> str:
    """Write 1-D fp32 CPU tensors, flushed to the disk; returns the file's SHA-256.

    By hand: the library holds the interpreter's lock while it writes, which a thread beside a
    training loop must not.
    """
    header, at = {}, 0
    for key, tensor in pieces.items():
        size = 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        start = len(text).to_bytes(8, "little") + text
        for view in [
            memoryview(start),
            *(memoryview(t.numpy().data).cast("B") for t in pieces.values()),
        ]:
            for first in range(0, len(view), BLOCK):
                block = view[first : first + BLOCK]
                while block:  # a raw write may take a part of it
                    written = file.write(block)
                    digest.update(block[:written])
                    block = block[written:]
        os.fsync(file.fileno())
    return digest.hexdigest()


class Pieces:
    """The tensors of a folder's files as one; to be used as a context."""

    def __init__(self, files: Iterable[Path]):
        self._stack = ExitStack()
        self._found: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            file = self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind, start, name = key.split("/", 2)
                size = file.get_slice(key).get_shape()[0]
                self._found[kind, name].append((int(start), int(start) + size, file, key))

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, live: Shard, kind: str) -> str | None:
        """Copy the elements of a live piece, of any device; what is missing of them."""
        start, end, there = live.start, live.start + live.tensor.numel(), 0
        for first, last, file, key in self._found[kind, live.name]:
            low, high = max(start, first), min(end, last)
            if low < high:
                piece = file.get_slice(key)[low - first : high - first]
                with torch.no_grad():
                    live.tensor[low - start : high - start].copy_(piece)
                there += high - low
        return None if there == end - start else f"it has no {kind} of {live.name}"
