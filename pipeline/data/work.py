"""Units of a domain turned into shards, by as many processes as share the working folder.

A unit is claimed with a file lock, which ends with the process that holds it. A finished unit has
`unit-00000.json` beside its shards; what lies there without one is written again.
"""

import json
import multiprocessing
import os
import queue
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from pipeline.data.bad_lines import BadLines
from pipeline.data.cleaning import Overlap
from pipeline.data.encode import Encoder
from pipeline.data.instruct import Document, document_text
from pipeline.data.prepared import SIDES, Side, describe_file
from pipeline.data.reader import _digest, _row
from pipeline.data.shards import ShardWriter
from pipeline.data.sources import Unit, file_identity, read_unit, sampled, side_of
from pipeline.errors import UserError
from pipeline.recipe import Domain

BATCH = 256  # documents that are tokenized in one call
BATCH_TEXT = 1 << 20  # characters, at which a batch ends before


@dataclass
class Job:
    """A domain to prepare; goes to worker processes."""

    name: str
    domain: Domain
    encoder: Encoder
    units: list[Unit]
    sources: list[dict[str, Any]]  # identities of what is read
    work: Path  # the working folder
    locks: Path  # beginning of the names of lock files; their folder stays
    bad_lines: int  # budget
    dtype: str  # of the ids
    flags: tuple[str, ...]  # columns beside the ids
    overlap: Overlap | None
    large: bool = True  # worth the start of helpers

    def lock(self, name: str) -> Path:
        return self.locks.with_name(f"{self.locks.name}.{name}.lock")

    def info(self, unit: Unit) -> Path:
        """The file that says that a unit is finished."""
        return self.work / f"unit-{unit.number:05d}.json"

    def pending(self) -> list[Unit]:
        return [unit for unit in self.units if not self.info(unit).is_file()]


@dataclass
class Done:
    """What was done since the last report."""

    text_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    bad: int = 0
    failure: str = ""  # a message for the user
    crash: str = ""  # a traceback


Report = Callable[[Done], None]


def work(job: Job, processes: int, threads: int, first: int, report: Report) -> None:
    """Make the units that nobody else makes, starting with number `first`.

    processes: 0 works in this one. threads: that each process tokenizes with.

    Raises:
        UserError: of a unit; a process that was killed. Finished units stay.
    """
    if not processes:
        _work(job, first, report)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    reports = context.Queue()
    environment = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)  # of the processes that start now
    share = max(1, len(job.units) // processes)
    workers = [
        context.Process(target=_worker, args=(job, first + i * share, reports), daemon=True)
        for i in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    try:
        _listen(job, workers, reports, report)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def is_free(job: Job, unit: Unit) -> bool:
    """Whether nobody is making a unit just now."""
    try:
        with FileLock(_lock_file(job, unit)).acquire(timeout=0):
            return True
    except Timeout:
        return False


def owner(job: Job, unit: Unit) -> str | None:
    """Who holds a unit: "process 123 on host"; None where nobody says so."""
    try:
        return _owner_file(job, unit).read_text(encoding="utf-8")
    except OSError:
        return None


def _listen(job: Job, workers: list[Any], reports: Any, report: Report) -> None:
    ended = False
    while True:
        try:
            done = reports.get(timeout=0.2)
        except queue.Empty:
            if ended:
                break
            ended = not any(w.is_alive() for w in workers)  # then empty the queue once more
            continue
        if done.failure:
            raise UserError(done.failure)
        if done.crash:
            raise RuntimeError(f"preparing {job.name} failed in a process:\n{done.crash}")
        report(done)
    codes = [w.exitcode for w in workers if w.exitcode]
    if codes:
        raise UserError(
            f"data.domains.{job.name}: a process that prepares it ended with exit code {codes[0]} "
            "(-9: killed, often for want of memory). Run the same command again: what is finished "
            "is kept"
        )


def _worker(job: Job, first: int, reports: Any) -> None:
    parent = os.getppid()

    def report(done: Done) -> None:
        if os.getppid() != parent:  # killed: nobody waits for this any more
            os._exit(1)
        reports.put(done)

    try:
        _work(job, first, report)
    except UserError as error:
        reports.put(Done(failure=str(error)))
    except Exception:
        reports.put(Done(crash=traceback.format_exc()))


def _work(job: Job, first: int, report: Report) -> None:
    if job.large:
        job.encoder.speed_up()
    start = first % len(job.units)
    for unit in [*job.units[start:], *job.units[:start]]:
        with _claimed(job, unit) as mine:
            # in this order: a folder that is published meanwhile takes the information along
            if mine and not job.info(unit).is_file() and job.work.is_dir():
                try:
                    _make(job, unit, report)
                except OSError as error:  # of writing; the reader has messages of its own
                    free = shutil.disk_usage(job.work.parent).free
                    raise UserError(
                        f"data.domains.{job.name}: cannot be prepared in {job.work.parent}: "
                        f"{error} ({free / 1e9:,.2f} GB free). What is finished is kept: run the "
                        "same command again, or set data.prepared to another folder"
                    ) from None


@contextmanager
def _claimed(job: Job, unit: Unit) -> Iterator[bool]:
    lock = FileLock(_lock_file(job, unit))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        name = f"process {os.getpid()} on {socket.gethostname()}"
        with suppress(OSError):  # it is there for messages only
            _owner_file(job, unit).write_text(name, encoding="utf-8")
        yield True
    finally:
        _owner_file(job, unit).unlink(missing_ok=True)
        lock.release()


def _lock_file(job: Job, unit: Unit) -> Path:
    return job.lock(f"{unit.number:05d}")


def _owner_file(job: Job, unit: Unit) -> Path:
    return _lock_file(job, unit).with_suffix(".owner")


@dataclass
class _Counts:
    """What became of the documents of a unit."""

    contaminated: int = 0
    sampled_out: int = 0
    without_tokens: int = 0
    refused: int = 0  # by the chat template
    refusal: str = ""  # the first reason
    text_bytes: int = 0
    sides: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            side: {"documents": 0, "tokens": 0, "predicted": 0, "longest": 0} for side in SIDES
        }
    )


def _make(job: Job, unit: Unit, report: Report) -> None:
    """Read a unit, write its shards, then say that it is finished."""
    bad, counts = BadLines(budget=job.bad_lines), _Counts()
    start = time.perf_counter()
    names = {side: f"{side}-{unit.number:05d}.arrow" for side in SIDES}
    try:
        with ExitStack() as stack:
            writers = {
                side: stack.enter_context(
                    ShardWriter(job.work / name, np.dtype(job.dtype), job.flags)
                )
                for side, name in names.items()
            }
            told = 0
            for batch in _batches(read_unit(unit, job.domain, bad)):
                done = _encode_batch(job, unit, batch, writers, counts)
                done.bad, told = bad.count - told, bad.count
                report(done)
    except OSError:  # a full disk: leave room for others
        for name in names.values():
            (job.work / name).unlink(missing_ok=True)
        raise
    _check_unchanged(job, unit)
    shards = []
    for side, name in names.items():
        if writers[side].documents:
            shards.append(
                {"side": side, "file": name, "documents": writers[side].documents,
                 "tokens": writers[side].tokens, **describe_file(job.work / name)}
            )  # fmt: skip
        else:
            (job.work / name).unlink()
    info = {
        "shards": shards,
        "sides": counts.sides,
        "contaminated": counts.contaminated,
        "sampled_out": counts.sampled_out,
        "without_tokens": counts.without_tokens,
        "refused": counts.refused,
        "refusal": counts.refusal,
        "text_bytes": counts.text_bytes,
        "core": job.encoder.core,
        "bad": {
            "count": bad.count,
            "examples": bad.examples,
            "damaged": bad.damaged,
            "blank": bad.blank,
        },
        "seconds": time.perf_counter() - start,
    }
    temporary = job.info(unit).with_suffix(".tmp")
    temporary.write_text(json.dumps(info), encoding="utf-8")
    os.replace(temporary, job.info(unit))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document_text(document))
        if len(batch) == BATCH or size >= BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(
    job: Job, unit: Unit, batch: list[Document], writers: dict[Side, ShardWriter], counts: _Counts
) -> Done:
    texts = [document_text(d) for d in batch]
    size = sum(len(t.encode()) for t in texts)
    counts.text_bytes += size
    kept: list[tuple[Document, Side, int]] = []
    for document, text in zip(batch, texts, strict=True):
        row = _row(document)
        digest = _digest(row)
        side = side_of(unit, job.domain, digest)
        if job.overlap is not None and job.overlap.hits(text):
            counts.contaminated += 1
        elif side == "train" and not sampled(row, job.domain):
            counts.sampled_out += 1
        else:
            kept.append((document, side, digest))
    encoded = job.encoder.encode([d for d, _, _ in kept]) if kept else []
    for tokens, (_, side, digest) in zip(encoded, kept, strict=True):
        length = len(tokens.ids)
        if tokens.refused:
            counts.refused += 1
            counts.refusal = counts.refusal or tokens.refused
        elif not length:
            counts.without_tokens += 1
        if not length:
            continue
        writers[side].add(tokens, digest)
        mine = counts.sides[side]
        mine["documents"] += 1
        mine["tokens"] += length
        mine["predicted"] += length if tokens.predicted is None else int(tokens.predicted.sum())
        mine["longest"] = max(mine["longest"], length)
    return Done(size, sum(len(t.ids) for t in encoded), len(batch))


def _check_unchanged(job: Job, unit: Unit) -> None:
    known = {source["name"]: source for source in job.sources}
    files = () if unit.hub_split else unit.files
    changed = [path for path in files if file_identity(path) != known[path]]
    if changed:
        raise UserError(
            f"data.domains.{job.name}: changed while it was read: {', '.join(changed)}. Run the "
            "same command again when nothing writes there any more"
        )
