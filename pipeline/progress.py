"""What a person sees of a stage while it trains: a bar on a terminal, lines in a log file."""

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pipeline.redact import redact, redacted


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def say(text: str) -> None:
    """A line for the user; standard output is theirs, not the libraries'."""
    tqdm.write(redact(text), file=sys.stdout)
    sys.stdout.flush()


class Trackers(Protocol):
    """Where numbers go beside the log (`run/trackers.py`)."""

    def step(self, record: dict[str, Any]) -> None: ...
    def evaluated(self, stage: int, folder: Path) -> None: ...
    def close(self) -> None: ...


class EventLog:
    """`log.jsonl`: one JSON object a line, flushed line by line."""

    def __init__(self, path: Path, trackers: Trackers | None = None):
        """`trackers` get the steps and the results too."""
        self._path = path
        self._trackers = trackers
        self._file = path.open("a", encoding="utf-8")
        if half_line(path):  # of a process that was killed
            self._file.write("\n")
        self.step = 0  # the last one written here, of its stage

    def has_stage(self, stage: int) -> bool:
        """Whether a stage's own line is there, from whatever process."""
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["event"] == "stage" and record["stage"] == stage:
                    return True
            except (ValueError, KeyError, TypeError):  # half a line
                continue
        return False

    def write(self, event: str, **values: Any) -> None:
        if event in ("step", "stage"):
            self.step = values["step"] if event == "step" else 0
        record = redacted({"event": event, **values, "time": now()})
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if event == "step" and self._trackers is not None:
            self._trackers.step(values)

    def evaluated(self, stage: int, folder: Path) -> None:
        """The results of a stage are in its folder."""
        if self._trackers is not None:
            self._trackers.evaluated(stage, folder)

    def close(self) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def half_line(path: Path) -> bool:
    """Whether the file's last line has no end."""
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


class StageProgress:
    """One live line per stage: steps, time left, tokens/s, loss, gradient norm, kept rows.

    Without a terminal the same numbers come as plain lines: of the first step, the last, every
    tenth part of the stage, and else once a minute.
    """

    def __init__(self, title: str, steps: int, behind: int = 0, seconds: float = 60.0):
        """behind: steps that are done already. seconds: the longest time without a line."""
        self._title = title
        self._steps, self._behind = steps, behind
        self._every = max(1, steps // 10)
        self._longest = seconds
        self._start = self._shown = time.perf_counter()
        self._tokens, self._training = 0, 0.0  # seconds of the steps
        self._bar = (
            tqdm(total=steps, initial=behind, desc=title, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(
        self,
        step: int,
        tokens: int,
        loss: float,
        norm: float,
        kept: float,
        fast: dict[str, float],
    ) -> None:
        """fast: from `Speed.numbers`, of the step."""
        self._tokens += tokens
        self._training += tokens / fast["tokens_per_second"]
        seconds = time.perf_counter() - self._start
        speed = self._tokens / self._training  # without evaluations within the stage
        numbers = {
            "loss": f"{loss:.3f}",
            "norm": f"{norm:.2f}",
            "kept": f"{kept:.0%}",
            "tok/s": f"{speed:,.0f}",
            "TFLOPS": f"{fast['tflops']:.3g}",
        }
        if "mfu" in fast:
            numbers["MFU"] = f"{fast['mfu']:.0%}"
        numbers["GB"] = f"{fast['peak_memory_gb']:.1f}"
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update()
        elif self._is_due(step):
            self._shown = time.perf_counter()
            left = tqdm.format_interval(seconds / (step - self._behind) * (self._steps - step))
            text = "  ".join(f"{k} {v}" for k, v in numbers.items())
            say(f"{self._title}  step {step}/{self._steps}  {text}  left {left}")

    def _is_due(self, step: int) -> bool:
        """Whether a step has a line of its own where there is no bar."""
        an_end = step in (self._behind + 1, self._steps)
        waited = time.perf_counter() - self._shown >= self._longest
        return an_end or step % self._every == 0 or waited

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
