"""The text of an anchor, with what its teacher predicts on it: made once, then memory-mapped.

A folder holds `text.safetensors` (input_ids, labels int32, segments int16: [sequences, length], as
held-out text) and, where the predictions are cached, `teacher.safetensors`: the k likeliest tokens
of every labelled position, int32 [positions, k], and their log-probabilities with that of the rest,
fp32 [positions, k + 1]; `first` int64 [sequences + 1] says where a sequence's positions begin.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline import signals
from pipeline.checkpoint import is_published, publish, verify
from pipeline.data.mlm import collate
from pipeline.errors import UserError
from pipeline.methods.divergence import top_k
from pipeline.nodes import send_folder
from pipeline.ranks import meet, on_rank0, rank, world_size

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids, labels, segments: [length]
BATCH = 16  # sequences of a forward of the teacher


@dataclass
class AnchorText:
    """The rows of a folder, read where they are asked for."""

    folder: Path

    def __post_init__(self) -> None:
        self._text = safe_open(self.folder / "text.safetensors", "pt")
        teacher = self.folder / "teacher.safetensors"
        self._teacher = safe_open(teacher, "pt") if teacher.is_file() else None
        self._first = self._teacher.get_tensor("first").tolist() if self._teacher else []
        self.sequences: int = self._text.get_slice("labels").get_shape()[0]

    def rows(self, places: list[int]) -> list[Row]:
        columns = [self._text.get_slice(k) for k in ("input_ids", "labels", "segments")]
        return [tuple(c[i].numpy() for c in columns) for i in places]  # type: ignore[misc]

    def predictions(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """(tokens, log-probabilities) of the labelled positions of these sequences, in order."""
        assert self._teacher is not None
        tokens, known = (self._teacher.get_slice(k) for k in ("tokens", "log_probabilities"))
        spans = [slice(self._first[i], self._first[i + 1]) for i in places]
        if not spans:
            return tokens[0:0], known[0:0]
        return torch.cat([tokens[s] for s in spans]), torch.cat([known[s] for s in spans])


def make_text(
    folder: Path,
    rows: Callable[[tuple[int, int]], Iterator[tuple[int, Row]]],
    predict: Callable[[list[Row]], Tensor] | None,
    k: int,
    info: dict[str, Any],
) -> AnchorText:
    """Make a folder if it is not there yet. All ranks call it, each makes its share.

    Runs that need the same text at the same time wait for the first of them.

    Args:
        rows: gives the numbered rows of a share (r, n): those of rank r of n.
        predict: the teacher's logits [positions, vocabulary] at the labelled positions of some
            rows; None caches nothing.
        info: for the manifest.

    Raises:
        UserError: the folder cannot be written, or is damaged.
        Interrupted: a signal.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    on_rank0(partial(_acquire, lock))
    try:
        if not on_rank0(partial(is_published, folder)):
            mine = list(rows((rank(), world_size())))
            made = (mine, list(_cached(mine, predict, k)) if predict else [])
            parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
            if world_size() > 1:
                meet()  # however long the others take
                dist.gather_object(made, parts, dst=0)
            else:
                parts = [made]
            on_rank0(lambda: publish(folder, partial(_write, parts or []), info))
        on_rank0(partial(verify, folder))
    finally:
        if rank() == 0:
            lock.release()
    send_folder(folder)
    return AnchorText(folder)


def _acquire(lock: FileLock) -> None:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        signals.acquire(lock, "the anchor's text is being made by a run beside this one; waiting")
    except OSError as error:
        raise UserError(
            f"the anchor's text cannot be written to {Path(lock.lock_file).parent}: {error}. Set "
            "data.prepared, or the environment variable MIGU_PREPARED, to a folder that can be "
            "written"
        ) from None


def _cached(
    rows: list[tuple[int, Row]], predict: Callable[[list[Row]], Tensor], k: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, log-probabilities) of each row."""
    starts = range(0, len(rows), BATCH)
    bar = tqdm(
        starts,
        desc="the teacher's predictions",
        unit="batch",
        leave=False,
        disable=None if rank() == 0 else True,
    )
    for start in bar:
        signals.check()
        batch = [row for _, row in rows[start : start + BATCH]]
        tokens, known = top_k(predict(batch), k)
        counts = [int((labels >= 0).sum()) for _, labels, _ in batch]
        yield from zip(tokens.cpu().split(counts), known.cpu().split(counts), strict=True)


def _write(gathered: list[tuple[list, list]], folder: Path) -> None:
    rows = sorted((row for mine, _ in gathered for row in mine), key=lambda r: r[0])
    batch = collate([row for _, row in rows])
    save_file(
        {
            "input_ids": batch["input_ids"].int(),
            "labels": batch["labels"].int(),
            "segments": batch["segments"].to(torch.int16),
        },
        folder / "text.safetensors",
    )
    known = {
        number: prediction
        for mine, cached in gathered
        if cached
        for (number, _), prediction in zip(mine, cached, strict=True)
    }
    if known:
        tokens, chances = zip(*(known[number] for number, _ in rows), strict=True)
        counts = torch.tensor([0, *(len(t) for t in tokens)])
        save_file(
            {
                "tokens": torch.cat(tokens),
                "log_probabilities": torch.cat(chances),
                "first": counts.cumsum(0),
            },
            folder / "teacher.safetensors",
        )
