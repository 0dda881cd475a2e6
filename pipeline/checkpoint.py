"""Publish a folder atomically, with a manifest that says whether it is whole; replace a file."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, advice

MANIFEST = "manifest.json"
LEFT_OVER = 3600.0  # seconds after which nobody writes a temporary file any more


def publish(folder: Path, write: Callable[[Path], None], info: dict[str, Any]) -> None:
    """Fill a temporary sibling of `folder`, then rename it: readers see all of it or nothing.

    Args:
        write: writes the files into the folder it is given.
        info: goes into the manifest beside the SHA-256 of each file.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            _fsync(path)
        seal(temporary, folder, info, {str(p.relative_to(temporary)): sha256(p) for p in files})
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors wraps the system's error in one of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            help_ = advice(error) or "Mend it"
            raise UserError(
                f"cannot publish {folder}: {error} ({_free(folder)}). {help_}, and run the same "
                "command again: it continues after the last finished stage."
            ) from None
        raise


def seal(temporary: Path, folder: Path, info: dict[str, Any], digests: dict[str, str]) -> None:
    """Write the manifest of files that are on the disk, and rename their folder to `folder`.

    digests: SHA-256 by file name.
    """
    text = json.dumps({**info, "files": digests}, indent=2) + "\n"
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    _fsync(temporary / MANIFEST)
    _fsync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _fsync(folder.parent)


def replace_file(path: Path, content: bytes | str) -> None:
    """Readers see the old file or the new one, whole, also while several processes write it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def keep_file(path: Path, content: bytes | str) -> None:
    """As `replace_file`, in a folder that is made where it is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def remove_left_over(folder: Path) -> None:
    """Delete what killed processes left of `replace_file` in a folder: no write takes an hour."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(OSError):  # another one does the same; a folder
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                path.unlink()


def is_published(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `publish` has written about a folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def verify(folder: Path) -> None:
    """Raises UserError where a file is missing or differs from the manifest."""
    if found := damage(folder):
        raise UserError(f"{found}; the checkpoint is damaged")


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a published folder, of which `shares` look at every so many-th file."""
    try:
        files = sorted(read_manifest(folder)["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{folder / MANIFEST}: cannot be read ({error})"
    for name, digest in files[share::shares]:
        path = folder / name
        if not path.is_file():
            return f"{path}: missing, but listed in {MANIFEST}"
        if sha256(path) != digest:
            return f"{path}: differs from its SHA-256 in {MANIFEST}"
    return None


def require_space(folder: Path, size: int) -> None:
    """Raises UserError where `size` bytes do not fit beside what is there."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: a checkpoint takes about {size / 1e9:.2f} GB, only {free / 1e9:.2f} GB are "
            "free. Free some space, or set another run folder with --runs."
        )


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _free(folder: Path) -> str:
    there = next(p for p in folder.parents if p.exists())
    return f"{shutil.disk_usage(there).free / 1e6:,.0f} MB free there"


# What file systems say that cannot flush (a folder, mostly): then they do it when they like.
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def _fsync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
