"""`launch/evaluate.py` in a process of its own, which measures one checkpoint after another."""

import contextlib
import os
import subprocess
import sys
from multiprocessing import Pipe

from eval.measure.command import SCRIPT


class Evaluator:
    """Its imports take five seconds, so behind a measurement it waits for the next one.

    It ends with this process; of what it could not measure it ends at once.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        """Start with what `arguments` of the script ask for."""
        self._made_in = (environment, os.getcwd())
        self._line, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments, "--line", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    def waits(self, environment: dict[str, str]) -> bool:
        """Whether it could go on, as one that is started now would."""
        same = self._made_in == (environment, os.getcwd())
        return same and self._process.poll() is None

    def ask(self, arguments: list[str]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone, as `wait` will say
            self._line.send(arguments)

    def wait(self, seconds: float) -> int | None:
        """0: it has measured; its exit code, or minus its signal, where it has ended instead; None
        where it is still at it."""
        if not self._line.poll(seconds):
            return None
        try:
            self._line.recv()
        except (EOFError, ConnectionResetError):
            return self._process.wait()
        return 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._line.close()
