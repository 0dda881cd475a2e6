"""The runs of a sweep: as many at a time as the machine takes, or as the jobs of a cluster.

A sweep's folder holds the run folders, a log per run and `sweep.json`, which says what became of
each. Running the same sweep again does what is left: what has finished is not started, what failed
is tried again.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from pipeline.checkpoint import replace_file
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.run.recipe_file import RECIPES
from pipeline.run.sweep import Point

OVERHEAD = 2_000_000_000  # bytes of a process beside its model: libraries, evaluation
LASTING = (1, 2)  # the exit codes of what starting again would meet again (docs/reliability.md)


@dataclass
class Outcome:
    """What became of a point. seconds: of its processes, one an attempt, since its run folder was
    made; cpu_seconds: of all their threads and of the processes they waited for; memory: their
    peak, in bytes; attempts: of the last call; code and said: with which the last one
    ended, and its message, if it had one."""

    overrides: list[str]
    finished: bool
    seconds: float
    memory: int
    attempts: int
    log: str
    cpu_seconds: float = 0.0
    code: int = 0
    said: str = ""


def jobs_at_once(memory: int, threads: int, gpus: int) -> int:
    """How many runs the machine takes: one a GPU, or by its cores and its free memory.

    memory: bytes of a run's model state; threads: of each run.
    """
    if gpus:
        return gpus
    cores = len(os.sched_getaffinity(0)) // threads
    room = psutil.virtual_memory().available // (memory + OVERHEAD)
    return max(1, min(cores, int(room)))


def run_sweep(
    points: Sequence[Point],
    command: Sequence[str],
    folder: Path,
    jobs: int,
    threads: int = 1,
    gpus: int = 0,
    attempts: int = 2,
) -> dict[str, Outcome]:
    """Run what is not done of `points`; the outcomes of all of them, by name.

    Args:
        command: of a run, without its name and overrides.
        folder: of the sweep; run folders are made in it.
        attempts: how often a run is started before it counts as failed.

    Raises:
        UserError: another process works on the sweep; the folder cannot be written.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, after the running processes have been ended.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".sweep.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process works on this sweep; wait for it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    with lock:
        return _Runner(list(points), command, folder, jobs, threads, gpus, attempts).run()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A scheduler's SIGTERM ends the running processes too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Runner:
    """The processes of a sweep."""

    def __init__(
        self,
        points: list[Point],
        command: Sequence[str],
        folder: Path,
        jobs: int,
        threads: int,
        gpus: int,
        attempts: int,
    ):
        self.points, self.command, self.folder = points, command, folder
        self.jobs, self.threads, self.attempts = jobs, threads, attempts
        self.devices = list(range(gpus))
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.changing = threading.Lock()
        self.outcomes = self._read()

    def __getstate__(self) -> dict[str, Any]:
        """For a cluster's task: without the lock."""
        return {k: v for k, v in vars(self).items() if k != "changing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, changing=threading.Lock())

    def run(self) -> dict[str, Outcome]:
        left = [p for p in self.points if not self.finished(p)]
        done = len(self.points) - len(left)
        if done:
            say(f"{done} of {len(self.points)} runs have finished before")
        bar = tqdm(total=len(self.points), initial=done, desc="sweep", unit="run", disable=None)
        try:
            with _sigterm_interrupts(), ThreadPoolExecutor(self.jobs) as pool:
                try:
                    for _ in pool.map(lambda p: self._run(p, bar), left):
                        pass
                except KeyboardInterrupt:
                    self._end()
                    raise
        finally:
            bar.close()
        return {p.name: self.outcomes[p.name] for p in self.points}

    def _run(self, point: Point, bar: tqdm) -> None:
        for attempt in range(1, self.attempts + 1):
            if self.stopped:
                return
            outcome = self.attempt(point, attempt)
            with self.changing:
                self.outcomes[point.name] = outcome
                self.write()
            if outcome.finished:
                break
            tried_again = attempt < self.attempts and outcome.code not in LASTING
            if not self.stopped:
                again = "; once more" if tried_again else ""
                why = f": {outcome.said}" if outcome.said else ""
                say(f"{point.name} failed{why}; see {outcome.log}{again}")
            if not tried_again:
                break
        bar.update()
        if bar.disable:
            state = "finished" if outcome.finished else "failed"
            say(f"{point.name} {state} after {outcome.seconds:.0f} s")

    def attempt(self, point: Point, attempt: int) -> Outcome:
        log = self.folder / "logs" / f"{point.name}.log"
        command = [*self.command, "--runs", str(self.folder), f"name={point.name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with self.changing:
            device = self.devices.pop() if self.devices else None
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        earlier = self.outcomes.get(point.name)
        if earlier and (earlier.finished or not (self.folder / point.name).is_dir()):
            earlier = None  # deleted: it begins anew
        start = time.monotonic()
        with log.open("ab") as output:
            begun = output.tell()  # behind earlier attempts
            process = subprocess.Popen(
                [*command, *point.overrides],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            with self.changing:
                self.running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self.changing:
            self.running.discard(process)
            if device is not None:
                self.devices.append(device)
        seconds, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
        memory = usage.ru_maxrss * 1024
        if earlier:  # a run goes on where it was broken off: what that took is part of it
            seconds, cpu = seconds + earlier.seconds, cpu + earlier.cpu_seconds
            memory = max(memory, earlier.memory)
        return Outcome(
            list(point.overrides),
            process.returncode == 0,
            round(seconds, 1),
            memory,
            attempt,
            str(log),
            round(cpu, 2),
            process.returncode,
            _said(log, begun),
        )

    def _end(self) -> None:
        """End what runs: a run that is told so leaves its folder in order. Not by SIGINT, which the
        processes of a background job ignore."""
        self.stopped = True
        with self.changing:
            for process in self.running:
                process.terminate()

    def finished(self, point: Point) -> bool:
        known = self.outcomes.get(point.name)
        if known is None or not known.finished:
            return False
        if known.overrides != list(point.overrides):
            raise UserError(
                f"{self.folder}: {point.name} was run with {' '.join(known.overrides)}, now it is "
                f"{' '.join(point.overrides)}; give this sweep a folder of its own (--sweep NAME)"
            )
        return (self.folder / point.name).is_dir()  # it may have been deleted, to run it again

    def _read(self) -> dict[str, Outcome]:
        file = self.folder / "sweep.json"
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return {name: Outcome(**values) for name, values in content.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: damaged ({error}); delete it: the runs that are complete are then only "
                "looked at"
            ) from None

    def write(self) -> None:
        content = {name: asdict(o) for name, o in self.outcomes.items()}
        replace_file(self.folder / "sweep.json", json.dumps(content, indent=2) + "\n")


def _said(log: Path, begun: int) -> str:
    """With which message a run ended, whose log begins there."""
    lines = log.read_bytes()[begun:].decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("error: ", "stopped: "))]
    return said[-1].partition(": ")[2] if said else ""


def submit_sweep(
    points: Sequence[Point],
    command: Sequence[str],
    folder: Path,
    cluster: str,
    threads: int,
    options: dict[str, Any],
) -> dict[str, Outcome]:
    """As `run_sweep`, each run a task of an array job, through submitit; waits for all of them.

    Args:
        cluster: "slurm", or "local" for processes of this machine.
        options: of submitit's executor, such as slurm_partition.

    Raises:
        UserError: submitit is not installed; an option that it does not know.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--cluster needs submitit: pip install submitit") from None
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder / "logs", cluster=cluster)
    try:
        executor.update_parameters(**{"cpus_per_task": threads, "timeout_min": 24 * 60, **options})
    except (TypeError, ValueError, NameError, AssertionError) as error:
        raise UserError(f"--option: {error}") from None
    runner = _Runner(list(points), command, folder, 1, threads, 0, 1)
    left = [p for p in points if not runner.finished(p)]
    jobs: list[Any] = []
    if left:
        with executor.batch():
            jobs = [executor.submit(runner.attempt, point, 1) for point in left]
        say(f"submitted {len(jobs)} runs as job {jobs[0].job_id.split('_')[0]}")
    for point, job in zip(left, tqdm(jobs, desc="sweep", unit="run", disable=None), strict=True):
        try:
            outcome = job.result()
        except Exception as error:  # the job was cancelled, ran out of time, never started
            say(f"{point.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            outcome = Outcome(list(point.overrides), False, 0, 0, 1, str(job.paths.stderr))
        runner.outcomes[point.name] = outcome
        runner.write()
    return {p.name: runner.outcomes[p.name] for p in points}


def program(name: str) -> list[str]:
    """The command of a program in launch/."""
    return [sys.executable, str(RECIPES.parent / f"{name}.py")]
