"""Nodes that share no file system: which ranks see a folder, and sending one to the others."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.errors import everywhere
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
    manifests = gather(_manifest(folder))
    if all(m == manifests[0] for m in manifests):  # or it is no published folder, but a hub's id
        return
    receives = rank() in set(first_beside(folder.parent)) - {0}
    files = on_rank0(lambda: [p.relative_to(folder) for p in _files(folder)])
    temporary = folder.with_name(f".{folder.name}.tmp")
    problem = _try(partial(shutil.rmtree, temporary, ignore_errors=True)) if receives else None
    for name in files:
        for piece in _sent(folder / name, 0):
            if receives and problem is None:
                problem = _try(partial(_append, temporary / name, piece))
    if receives and problem is None:
        shutil.rmtree(folder, ignore_errors=True)
        problem = _try(partial(os.replace, temporary, folder))
    _everywhere(problem)


def exchange_files(folder: Path, pattern: str) -> None:
    """Give every node the files of a folder that lie on the others; all ranks call it.

    A file of one name is the same everywhere. Raises UserError where a node cannot write it.
    """
    first = first_beside(folder)
    machines = sorted(set(first))
    own = sorted(p.name for p in folder.glob(pattern)) if rank() in machines else []
    known = gather(own)
    problem: str | None = None
    for source in machines:
        for name in known[source]:
            lacking = [m for m in machines if name not in known[m]]
            if not lacking or any(name in known[m] for m in machines if m < source):
                continue
            receives = rank() in lacking and problem is None
            temporary = folder / f".{name}.tmp"
            if receives:
                problem = _try(partial(temporary.unlink, missing_ok=True))
            for piece in _sent(folder / name, source):
                if receives and problem is None:
                    problem = _try(partial(_append, temporary, piece))
            if receives and problem is None:
                problem = _try(partial(os.replace, temporary, folder / name))
    _everywhere(problem)


def _sent(path: Path, source: int) -> Iterator[bytes]:
    """The pieces of a file of one rank, on every rank."""
    size: list = [path.stat().st_size if rank() == source else None]
    dist.broadcast_object_list(size, src=source)
    for start in range(0, max(size[0], 1), PIECE):
        piece: list = [None]
        if rank() == source:
            with path.open("rb") as file:
                file.seek(start)
                piece[0] = file.read(PIECE)
        dist.broadcast_object_list(piece, src=source)
        yield piece[0]


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
            raise everywhere(f"rank {r}: {text}")
