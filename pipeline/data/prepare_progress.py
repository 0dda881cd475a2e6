"""What a person sees while a domain is prepared: a bar on a terminal, lines in a log file."""

import sys
import time

from tqdm import tqdm

from pipeline.data.work import Done
from pipeline.progress import say

LINE_EVERY = 30  # seconds, without a terminal


class PrepareProgress:
    """Text read, time left, MB/s, tokens/s and broken rows of one process and its helpers."""

    def __init__(self, name: str, text_bytes: int | None, speaks: bool):
        """text_bytes: about how much there is, or None. speaks: whether to print at all."""
        self._name, self._expected, self._speaks = name, text_bytes, speaks
        self._start = self._said = time.perf_counter()
        self._total = Done()
        self._waited = 0
        self._told: str | None = None
        self._bar: tqdm | None = None

    def add(self, done: Done) -> None:
        total = self._total
        total.text_bytes += done.text_bytes
        total.tokens += done.tokens
        total.documents += done.documents
        total.bad += done.bad
        self._waited = 0
        if not self._speaks:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=self._expected, desc=f"preparing {self._name}", unit="B",
                    unit_scale=True, dynamic_ncols=True,
                )  # fmt: skip
            rate = total.tokens / self.seconds()
            self._bar.set_postfix({"tok/s": f"{rate:,.0f}", "bad": total.bad}, refresh=False)
            self._bar.update(done.text_bytes)
        elif time.perf_counter() - self._said > LINE_EVERY:
            self._said = time.perf_counter()
            share = f" ({min(1, total.text_bytes / self._expected):.0%})" if self._expected else ""
            say(f"preparing {self._name}: {total.text_bytes / 1e6:,.0f} MB{share}{self.speed()}")

    def wait(self, owner: str | None) -> None:
        """A moment, as another process is making what is left."""
        self._waited += 1
        if self._speaks and self._waited > 10 and owner and owner != self._told:
            self._told = owner
            say(f"{self._name} is being prepared by {owner}: waiting for it")
        time.sleep(min(2, 0.05 * self._waited))

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def speed(self) -> str:
        """How fast it went, as a phrase; empty where this process did nothing."""
        total, seconds = self._total, self.seconds()
        if not total.text_bytes:
            return ""
        bad = f", {total.bad:,} broken rows" if total.bad else ""
        return (
            f", {seconds:,.1f} s ({total.text_bytes / 1e6 / seconds:,.1f} MB/s, "
            f"{total.tokens / seconds:,.0f} tokens/s{bad})"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
