"""What lies in a folder of runs: runs, sweeps of runs, and what is neither."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = (".json", ".npz", ".gz")  # of an evaluation


@dataclass
class Found:
    """A folder below the root; `problem` says why it is no run, "" for one."""

    path: Path
    folder: str  # below the root, with slashes
    problem: str = ""


def find_folders(root: Path) -> list[Found]:
    """Every folder in the root but hidden ones; of a sweep, the runs in it. By name."""
    found = []
    for path in _folders(root):
        try:
            if (path / "recipe.yaml").is_file():
                found.append(Found(path, path.name))
                continue
            inner = [p for p in _folders(path) if (p / "recipe.yaml").is_file()]
            found += [Found(p, f"{path.name}/{p.name}") for p in inner]
            if not inner and not _is_comparison(path):
                found.append(Found(path, path.name, _why_none(path)))
        except OSError as error:
            reason = f"it cannot be read ({error.strerror or error})"
            found.append(Found(path, path.name, reason))
    return found


def stamp(run: Path) -> str:
    """The same as long as no file that the run's page is made of has changed.

    Sizes and times of change are compared for being equal, never by their order: no clock that was
    set back or forward hides a change.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(run)):
        try:
            seen = path.stat()
        except OSError:
            continue
        digest.update(f"{path.relative_to(run)}\0{seen.st_size}\0{seen.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def stage_folders(run: Path) -> list[Path]:
    """Of the stages, and of the points within them, in their order."""
    ends = sorted(path for path in (run / "stages").glob("[0-9]*_*") if path.is_dir())
    return [place for end in ends for place in (*sorted(end.glob("step-*")), end)]


def checkpoints(run: Path) -> list[Path]:
    """What was published after the stages and within them, and is still there."""
    places = (stage / "checkpoint" for stage in stage_folders(run))
    return [path for path in places if path.is_dir()]


def _sources(run: Path) -> Iterator[Path]:
    yield from (run / name for name in ("recipe.yaml", "environment.json", "log.jsonl"))
    yield run / "heldout" / "manifest.json"
    for place in stage_folders(run):
        yield from (p for p in place.iterdir() if p.suffix in RESULTS and p.name[0] != ".")


def _folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [path / name for name in sorted(names)]


def _is_comparison(path: Path) -> bool:
    """What `report.py RUN RUN --out` writes."""
    return (path / "report.json").is_file() and (path / "index.html").is_file()


def _why_none(path: Path) -> str:
    if not any(path.iterdir()):
        return "it is empty"
    if (path / "stages").is_dir():
        return "its recipe.yaml is missing; put it back, or delete the folder"
    return "it is not a run: it has no recipe.yaml"
