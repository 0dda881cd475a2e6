"""What one call of `report.py due` leaves to the next: `ROOT/.report/state.json`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.checkpoint import replace_file
from pipeline.errors import UserError, advice

FOLDER = ".report"


@dataclass
class State:
    path: Path
    # run folder -> the stamp of its files when its entry and its page were made, and the entry
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # checkpoint -> the stamp of its files when they were hashed, and what was wrong with them
    checkpoints: dict[str, dict[str, str]] = field(default_factory=dict)
    # evaluation -> {"run", "where", "kind", "reason", "attempts"}: failed, and not yet made good
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: str = ""  # the evaluation that the end of the budget cut off: the next call begins with it
    # channel -> event -> when it was sent
    sent: dict[str, dict[str, str]] = field(default_factory=dict)

    def save(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        replace_file(self.path, json.dumps(content, indent=1) + "\n")


def read_state(root: Path) -> State:
    """Raises UserError where the file is damaged: without it, messages would be sent again."""
    path = root / FOLDER / "state.json"
    if not path.exists():
        return State(path)
    try:
        content = json.loads(path.read_bytes())
        state = State(path, **content)
        if not all(isinstance(getattr(state, key), type(getattr(State(path), key)))
                   for key in content):  # fmt: skip
            raise TypeError("its values are of another kind")
        return state
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete it: every checkpoint is then checked again, "
            "and every message sent again."
        ) from None


@contextmanager
def locked(root: Path) -> Iterator[bool]:
    """Hold the root for this call; False where another one has it.

    Raises:
        UserError: the root is no folder that can be written.
    """
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; give the folder that holds the runs")
    lock = FileLock(root / FOLDER / "lock")
    try:
        (root / FOLDER).mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except OSError as error:
        help_ = advice(error) or "Mend it"
        raise UserError(f"--root {root}: cannot be written: {error}. {help_}.") from None
    try:
        yield True
    finally:
        lock.release()
