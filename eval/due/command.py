"""`report.py due`: once, or every so often."""

import re
from pathlib import Path

from pipeline.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def due_command(root: Path, budget: str | None, interval: str | None, notify: Path | None) -> None:
    """An evaluation that failed is no error: the index says so.

    Args:
        budget, interval: as they are written on the command line: 2h, 90m, 1h30m.

    Raises:
        UserError: a mistake of the user.
    """
    from eval.due.due import due
    from eval.due.notify import load_notify

    limit = None if budget is None else _seconds("--budget", budget)
    seconds = None if interval is None else _seconds("--every", interval)
    settings = load_notify(notify) if notify else None
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; give the folder that holds the runs")
    if seconds is None:
        page = due(root, limit, settings)
        if page:
            print(f"page: {page}")
    else:
        from eval.due.every import every

        every(seconds, lambda stop: due(root, limit, settings, stop))


def _seconds(option: str, text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not total > 0:
        raise UserError(f"{option} {text}: write a time such as 45s, 30m, 2h, 1h30m or 1d")
    return total
