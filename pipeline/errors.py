"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
    """Something the user can mend: bad recipe, missing file, full disk.

    The message is all that the user sees (no traceback, exit code 2), so it names what is wrong,
    where (key, file, line) and the fix.
    """
