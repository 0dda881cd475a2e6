"""Whether published checkpoints are what was published: hashed once, and again when they change."""

import hashlib
from pathlib import Path

from eval.due.state import State
from pipeline.checkpoint import MANIFEST, verify
from pipeline.errors import UserError


def damage_of(checkpoint: Path, name: str, state: State) -> str:
    """What is wrong with a checkpoint, "" for nothing."""
    try:
        now = _stamp(checkpoint)
        known = state.checkpoints.get(name)
        if known is None or known["stamp"] != now:
            known = {"stamp": now, "damage": check(checkpoint)}
            if _stamp(checkpoint) == now:  # not of one that was replaced or deleted meanwhile
                state.checkpoints[name] = known
        return known["damage"]
    except FileNotFoundError:  # deleted meanwhile
        state.checkpoints.pop(name, None)
        return ""


def digest_of(checkpoint: Path) -> str:
    """Of what was published there; "" where nothing is."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def check(checkpoint: Path) -> str:
    """Hash its files: what is wrong, "" for nothing. Raises FileNotFoundError where it is gone."""
    if not (checkpoint / MANIFEST).is_file():
        return f"{checkpoint}: no {MANIFEST}, so it was never published whole"
    try:
        verify(checkpoint)
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST}: cannot be read ({error}); the checkpoint is damaged"
    except FileNotFoundError:
        raise
    except OSError as error:
        return f"{checkpoint}: cannot be read: {error}"
    return ""


def _stamp(checkpoint: Path) -> str:
    """Of all files: also a write that keeps size and time of change moves `ctime`."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*")):
        seen = path.stat()
        if path.is_file():
            times = f"{seen.st_mtime_ns}\0{seen.st_ctime_ns}"
            digest.update(f"{path.relative_to(checkpoint)}\0{seen.st_size}\0{times}\n".encode())
    if not checkpoint.is_dir():
        raise FileNotFoundError(checkpoint)
    return digest.hexdigest()[:16]
