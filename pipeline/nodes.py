"""Nodes that share no file system: which ranks see a folder, and sending one to the others."""

import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.ranks import gather, on_rank0, rank, world_size

PIECE = 64 << 20  # bytes that are sent at a time


def first_beside(folder: Path) -> list[int]:
    """For every rank, the lowest rank that sees the same `folder`: 0 where all share it.

    All ranks call it; the folder is made where there is none.
    """
    if world_size() == 1:
        return [0]
    token = on_rank0(partial(secrets.token_hex, 8))  # a name that no file system remembers
    mark = folder / f".rank-{rank()}-{token}"

    def leave_mark() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()

    _everywhere(_try(leave_mark))
    others = (r for r in range(rank()) if (folder / f".rank-{r}-{token}").exists())
    first = gather(next(others, rank()))
    mark.unlink()
    return first


def send_folder(folder: Path) -> None:
    """Give a published folder of rank 0 to the nodes that do not see it; all ranks call it.

    Raises:
        UserError: a node cannot write it.
    """
    first = first_beside(folder.parent)
    receives = rank() in set(first) - {0}
    manifests = gather(_manifest(folder))
    if all(m == manifests[0] for m in manifests):
        return
    files = on_rank0(lambda: [(p.relative_to(folder), p.stat().st_size) for p in _files(folder)])
    temporary = folder.with_name(f".{folder.name}.tmp")
    problem = _try(partial(shutil.rmtree, temporary, ignore_errors=True)) if receives else None
    for name, size in files:
        for start in range(0, max(size, 1), PIECE):
            piece: list = [None]
            if rank() == 0:
                with (folder / name).open("rb") as file:
                    file.seek(start)
                    piece[0] = file.read(PIECE)
            dist.broadcast_object_list(piece, src=0)
            if receives and problem is None:
                problem = _try(partial(_append, temporary / name, piece[0]))
    if receives and problem is None:
        shutil.rmtree(folder, ignore_errors=True)
        problem = _try(partial(os.replace, temporary, folder))
    _everywhere(problem)


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _manifest(folder: Path) -> bytes | None:
    path = folder / "manifest.json"
    return path.read_bytes() if path.is_file() else None


def _try(act: Callable[[], Any]) -> str | None:
    try:
        act()
    except OSError as error:
        return str(error)
    return None


def _everywhere(problem: str | None) -> None:
    """Raise the first rank's problem on all of them."""
    for r, text in enumerate(gather(problem)):
        if text is not None:
            error = UserError(f"rank {r}: {text}")
            error.everywhere = True  # type: ignore[attr-defined]
            raise error
