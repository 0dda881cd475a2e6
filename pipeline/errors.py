"""Exceptions whose message is all that the user sees."""

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: bad recipe, missing file, full disk.

    The message is all that the user sees (no traceback, exit code 2), so it names what is wrong,
    where (key, file, line) and the fix.
    """


def everywhere(message: str) -> UserError:
    """An error that every rank raises alike, so that rank 0 alone prints it."""
    error = UserError(message)
    error.everywhere = True  # type: ignore[attr-defined]
    return error


class TrainingStopped(Exception):
    """Training cannot go on: the loss or a magnitude is not finite (raised on all ranks alike), or
    a rank is gone."""


# The exit code that says that the same command goes on: EX_TEMPFAIL of sysexits.h.
RETRY = 75


class RankLost(TrainingStopped):
    """Another rank is gone, and with it what this attempt can do.

    code: the exit code of all: RETRY, or that of a rank which has ended with a message.
    """

    def __init__(self, message: str, code: int = RETRY):
        super().__init__(message)
        self.code = code


class Interrupted(Exception):
    """The run was asked to end (a signal). Nothing is lost; the same command goes on."""


class BadGradient(TrainingStopped):
    """The gradient of a step is not finite. The step was dropped: weights and moments are as they
    were before it, on every rank, and the next one may follow."""


ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of your quota there",
    errno.EACCES: "Ask for permission to write there, or choose another folder",
    errno.EPERM: "Ask for permission to write there, or choose another folder",
    errno.EROFS: "That file system can only be read; choose another folder",
    errno.ENAMETOOLONG: "The file system takes no name of that length; choose a shorter one",
    errno.EEXIST: "A file is in the place of a folder; choose another",
    errno.ENOTDIR: "A file is in the place of a folder; choose another",
    errno.EIO: "The device reports errors; choose another folder",
}


def advice(error: BaseException) -> str | None:
    """What helps against an error of the system; None where nothing is known to."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in ADVICE:
            return ADVICE[seen.errno]
        seen = seen.__cause__ or seen.__context__
    # safetensors and tokenizers give the system's error as text.
    text = str(error)
    return next((a for code, a in ADVICE.items() if f"(os error {code})" in text), None)


def near(word: str, known: Iterable) -> str:
    """The end of a message about an unknown word: the known one that it is like, if any."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
