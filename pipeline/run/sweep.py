"""Many runs over a grid of settings: as many at a time as the machine takes, each a process.

A sweep's folder holds the run folders, a log per run and `sweep.json`, which says what became of
each. Running the same sweep again does what is left: what has finished is not started, what failed
is tried again.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tqdm import tqdm

from pipeline.checkpoint import replace_file
from pipeline.engine.config import memory_per_rank, resolve_engine_config
from pipeline.errors import UserError, near
from pipeline.model.load import empty_model, load_config
from pipeline.progress import say
from pipeline.run.folder import require_same
from pipeline.run.problems import NAME
from pipeline.run.recipe_file import RECIPES, find_recipe, load_recipe, read_over_base

SWEEPS = RECIPES / "sweeps"
OVERHEAD = 2_000_000_000  # bytes of a process beside its model: libraries, evaluation
LASTING = (1, 2)  # the exit codes of what starting again would meet again (docs/reliability.md)


@dataclass
class Sweep:
    """A YAML file of launch/recipes/sweeps, or what the command line says. A file may be laid over
    another, its `base`, as recipes may; a method of it that is null here is left out.

    Every method is a set of overrides of the recipe; it runs over the product of `grid`, its own
    entry in `grids` (which goes before `grid` key by key), and, with several `seeds`, 0..seeds-1;
    with `seeds_of: best` all of it with seed 0, and the other seeds of each method's best setting.
    """

    recipe: str
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    grid: dict[str, list[Any]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: int = 1
    seeds_of: Literal["all", "best"] = "all"
    program: str = "cpt"
    config: str | None = None  # DeepSpeed's JSON

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Point:
    """One run: its name and the overrides that make it. setting: its name without the seed."""

    name: str
    overrides: tuple[str, ...]
    method: str
    setting: str
    seed: int


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


def load_sweep(name: str) -> Sweep | None:
    """The sweep of that name or file; None where it is a recipe (it has no key `recipe`).

    Raises:
        UserError: a key or a value that a sweep does not take.
    """
    for path in (Path(name), SWEEPS / f"{name}.yaml"):
        if not path.is_file():
            continue
        content = OmegaConf.to_container(read_over_base(path, _find_base))
        if not isinstance(content, dict) or "recipe" not in content:
            return None
        _leave_out(content)
        try:
            sweep = TypeAdapter(Sweep).validate_python(content)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise UserError(
                "\n".join([f"{path}: not a sweep", *(f"  {w}" for w in wrong)])
            ) from None
        for method in sweep.grids:
            if method not in sweep.methods:
                hint = near(method, sweep.methods)
                raise UserError(f"{path}: grids.{method}: no such method{hint}")
        return sweep
    return None


def _leave_out(content: dict[Any, Any]) -> None:
    """The base's methods that are null."""
    methods, grids = content.get("methods"), content.get("grids")
    if isinstance(methods, dict):
        for name in [n for n, settings in methods.items() if settings is None]:
            del methods[name]
            if isinstance(grids, dict):
                grids.pop(name, None)


def _find_base(name: str) -> Path:
    """A sweep's base is a sweep, a recipe's a recipe: what a file is, is known once it is read."""
    sweep = SWEEPS / f"{name}.yaml"
    return sweep if sweep.is_file() else find_recipe(name)


def sweep_points(sweep: Sweep, more: Sequence[str] = ()) -> list[Point]:
    """Every run of a sweep: all settings with the first seed, then all with the next, so that a
    sweep that is ended early compares them all.

    more: settings of all runs, as the command line has them.

    Raises:
        UserError: an empty list of values, no seed, two runs of one name; one of `more` that would
            undo what tells the runs apart.
    """
    _check_settings_of_all(sweep, more)
    if sweep.seeds < 1:
        raise UserError(f"--seeds {sweep.seeds}: must be at least 1")
    if sweep.seeds_of == "best" and sweep.seeds < 2:
        raise UserError("seeds_of: best: has no effect without several seeds; give --seeds")
    points = []
    for seed, (method, settings) in itertools.product(range(sweep.seeds), sweep.methods.items()):
        grid = {**sweep.grid, **sweep.grids.get(method, {})}
        for key, values in grid.items():
            if not values:
                raise UserError(f"--grid {key}: the list of values is empty")
        if sweep.seeds > 1 and "seed" in {**settings, **grid}:
            raise UserError("--seeds: has no effect on a seed that is given too; remove one")
        seeds = {"seed": seed} if sweep.seeds > 1 else {}  # one seed is the recipe's own
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination, strict=True))
            written = tuple(
                f"{k}={_written(v)}" for k, v in {**settings, **chosen, **seeds}.items()
            )
            varied = {k: v for k, v in chosen.items() if len(grid[k]) > 1}
            name, setting = _name(method, varied | seeds), _name(method, varied)
            points.append(Point(name, (*written, *more), method, setting, seed))
    for p in points:
        if not NAME.fullmatch(p.name):
            raise UserError(
                f"the sweep has a run named {p.name!r}, which names files: letters, digits, '.', "
                "'_' and '-', and no '.', '_' or '-' first; name the method so"
            )
    doubled = {p.name for p in points if sum(q.name == p.name for q in points) > 1}
    if doubled:
        raise UserError(f"the sweep has two runs named {sorted(doubled)[0]!r}; vary their values")
    return points


def _check_settings_of_all(sweep: Sweep, more: Sequence[str]) -> None:
    given: dict[str, list[Any]] = {}  # by key what runs have in grids
    for method in sweep.methods:
        for key, values in {**sweep.grid, **sweep.grids.get(method, {})}.items():
            given.setdefault(key, []).extend(v for v in values if v not in given.get(key, []))
    grids = {key for key, values in given.items() if len(values) > 1}
    methods = {key for settings in sweep.methods.values() for key in settings}

    def touches(key: str, others: Iterable[str]) -> bool:
        return any(f"{a}.".startswith(f"{b}.") for o in others for a, b in ((key, o), (o, key)))

    for setting in more:
        key = setting.partition("=")[0]
        where = ""
        if touches(key, grids):
            where = "the grid varies it"
        elif touches(key, methods):
            where = "the methods differ in it"
        elif key == "seed" and sweep.seeds > 1:
            where = "the seeds are 0 to N-1 of --seeds"
        elif key == "name":
            where = "a run is named by what it varies; name the sweep by --sweep"
        if where:
            raise UserError(f"{setting}: would make the runs alike: {where}; remove it")


def of_the_best(points: Sequence[Point], scores: Mapping[str, float]) -> list[Point]:
    """Those of each method's best setting: the one whose run with seed 0 has the highest score."""
    first = [p for p in points if p.seed == 0]
    methods = dict.fromkeys(p.method for p in points)
    best = {
        max((p for p in first if p.method == m), key=lambda p: scores[p.name]).setting
        for m in methods
    }
    return [p for p in points if p.setting in best]


def _name(method: str, varied: dict[str, Any]) -> str:
    """Of a run folder: the method and what varies, by the last part of each key."""
    parts = [method] if method else []
    for key, value in varied.items():
        short = "".join(c if c.isalnum() or c in ".-" else "_" for c in _written(value))
        parts.append(f"{key.rsplit('.', 1)[-1]}_{short}")
    return "-".join(parts) or "run"


def _written(value: Any) -> str:
    """As the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def jobs_at_once(memory: int, threads: int, gpus: int) -> int:
    """How many runs the machine takes: one a GPU, or by its cores and its free memory.

    memory: bytes of a run's model state; threads: of each run.
    """
    if gpus:
        return gpus
    cores = len(os.sched_getaffinity(0)) // threads
    room = psutil.virtual_memory().available // (memory + OVERHEAD)
    return max(1, min(cores, int(room)))


def require_same_runs(sweep: Sweep, points: Sequence[Point], folder: Path) -> None:
    """Raises UserError where a run that is there is another recipe's: its file has changed."""
    for point in points:
        if (folder / point.name).is_dir():
            overrides = [*point.overrides, f"name={point.name}"]
            require_same(folder / point.name, load_recipe(sweep.recipe, overrides))


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


def model_bytes(sweep: Sweep, points: Sequence[Point]) -> int:
    """Bytes of model state of the largest run. Every run's recipe is read and checked for it.

    Raises:
        UserError: what is wrong with a point's recipe, by the name of the point.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, int] = {}
    for point in points:
        try:
            recipe = load_recipe(sweep.recipe, point.overrides)
            engine = resolve_engine_config(sweep.config, recipe, 1, device)
        except UserError as error:
            raise UserError(f"{point.name}: {error}") from None
        key = f"{recipe.model} {recipe.optimizer.name} {engine}"
        if key not in sizes:
            config = load_config(recipe.model, recipe.model.train_tokenizer)
            parameters = sum(p.numel() for p in empty_model(recipe.model, config).parameters())
            memory = memory_per_rank(parameters, engine, 1, recipe.optimizer.name)
            sizes[key] = sum(device + host for device, host in memory.values())
    return max(sizes.values())


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
