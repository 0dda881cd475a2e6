"""What comes over the network is asked for again where the network failed, and only there."""

import io
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.progress import say

T = TypeVar("T")

WAITS = (5.0, 30.0)  # seconds before the next attempts; the hub's library tries for a while itself

# Of httpx, requests, urllib3, aiohttp, fsspec and the hub's library, and of Python itself.
_TRANSIENT = {
    "TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError",
    "ProtocolError", "IncompleteRead", "LocalEntryNotFoundError", "ClientConnectionError",
    "ClientPayloadError", "FSTimeoutError", "gaierror", "HTTPException",
}  # fmt: skip
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


def retried(what: str, fetch: Callable[[], T]) -> T:
    """The result of `fetch`, which is called again after `WAITS` where the network fails.

    Every other error is raised at once, and the last one too; under HF_HUB_OFFLINE all are.
    """
    for wait in WAITS:
        try:
            return fetch()
        except Exception as error:
            if offline() or not of_the_network(error):
                raise
            say(f"{what}: {reason(error)}; trying again in {wait:g} seconds")
            time.sleep(wait)
    return fetch()


def offline() -> bool:
    """Whether the user has said that no network is to be touched."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(n, "").lower() in ("1", "true", "yes", "on") for n in names)


def of_the_network(error: BaseException | None) -> bool:
    """Whether the error, or one behind it, is of a kind that may be gone a moment later."""
    seen = 0
    while error is not None and seen < 20:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in _TRANSIENT_STATUS
        if {c.__name__ for c in type(error).__mro__} & _TRANSIENT:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


class RemoteFile(io.RawIOBase):
    """A file behind an address that fsspec knows, for reading. Where the connection drops, it is
    opened again at the place where it broke.

    Raises:
        UserError: it cannot be read, also not later (so that nobody takes the rest for damaged).
    """

    def __init__(self, path: str):
        super().__init__()
        self._path, self._at = path, 0
        self._file: Any = None
        self._size: int = retried(path, self._open)

    def _open(self) -> int:
        import fsspec

        self._file = fsspec.open(self._path, "rb").open()
        size = getattr(self._file, "size", None)
        if size is None:
            size = self._file.seek(0, 2)
        self._file.seek(self._at)
        return int(size)

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")

        def read() -> bytes:
            if self._file is None:
                self._open()
            try:
                self._file.seek(self._at)
                piece = self._file.read(min(len(wanted), self._size - self._at))
                if not piece and self._at < self._size:
                    raise ConnectionError(f"the file ends at byte {self._at} of {self._size}")
                return piece
            except Exception:
                self._file = None
                raise

        if self._at >= self._size:
            return 0
        try:
            piece = retried(self._path, read)
        except Exception as error:
            raise UserError(
                f"{self._path}: cannot be read behind byte {self._at:,} ({reason(error)}). Check "
                "the network, and run the same command again."
            ) from None
        wanted[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def reason(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
