"""Exceptions whose message is all that the user sees."""


class UserError(Exception):
    """Something the user can mend: bad recipe, missing file, full disk.

    The message is all that the user sees (no traceback, exit code 2), so it names what is wrong,
    where (key, file, line) and the fix.
    """


class TrainingStopped(Exception):
    """Training cannot go on (the loss or a magnitude is not finite). Raised on all ranks alike."""
