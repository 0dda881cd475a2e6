"""Attempts at a small run in processes that a test may kill, and what each of them did.

The processes are forked from one that has imported everything, so that fifty of them are cheap.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.spawn import free_port

# What the runs have besides `tiny_recipe`: saving, evaluations within a stage, a mixture.
SETTINGS = [
    "name=run",
    "stages=[{domain: a, steps: 12, evaluate_every: 5}, {domain: {a: 0.4, b: 0.6}, steps: 12}]",
    "train={batch_size: 12}",
    "resume={steps: 3, keep: 2}",
]


@dataclass
class Scene:
    """One run, of `tiny_recipe`; every attempt appends what it does to `notes`."""

    recipe: Path
    runs: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def notes(self) -> Path:
        return self.runs / "notes"

    @property
    def folder(self) -> Path:
        return self.runs / "run"

    def read(self) -> list[dict[str, Any]]:
        """Of all attempts and ranks, in the order in which they were written by each process."""
        found = []
        for path in sorted(self.notes.glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns):
            found += [json.loads(line) for line in path.read_text().splitlines() if line[-1] == "}"]
        return found

    def steps(self, what: str) -> dict[tuple[int, int], set[str]]:
        """(stage, step) -> the digests of what its ranks and attempts saw."""
        seen: dict[tuple[int, int], set[str]] = defaultdict(set)
        for note in self.read():
            if note["what"] == what:
                seen[note["stage"], note["step"]].add(note["digest"])
        return seen

    def measured(self) -> dict[str, Any]:
        """The held-out losses that each evaluation found, by its folder."""
        stages = self.folder / "stages"
        return {
            str(p.parent.relative_to(stages)): json.loads(p.read_text())["domains"]
            for p in sorted(stages.rglob("eval.json"))
        }


def start(
    scene: Scene, ranks: int = 1, engine: str = "zero2", act: Callable[..., None] | None = None
) -> list[Any]:
    """One attempt's processes. act(place, stage, step) is called by rank 0 at each of its places:
    "preparing" (model, tokenizer, data), "step" (behind it), "saving" (in the thread, when the
    files are written), "measuring", "publishing"."""
    scene.notes.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.attempts", "pipeline.run.run", "pipeline.run.cli",
                                    "eval.measure.lm"])  # fmt: skip
    port = free_port()
    started = []
    for r in range(ranks):
        process = context.Process(target=_attempt, args=(scene, r, ranks, port, engine, act))
        process.start()
        started.append(process)
    return started


def end(processes: list[Any], timeout: float = 120) -> list[int]:
    """Wait for an attempt; its exit codes (negative: the signal that has killed it)."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    late = [p.pid for p in processes if p.is_alive()]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert not late, f"processes {late} of {[p.pid for p in processes]} did not end"
    return [p.exitcode for p in processes]


def attempt(scene: Scene, ranks: int = 1, engine: str = "zero2", act: Any = None) -> list[int]:
    return end(start(scene, ranks, engine, act))


def kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)


def _attempt(scene: Scene, rank: int, ranks: int, port: int, engine: str, act: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false",
        MIGU_PREPARED=str(scene.recipe.parent / "prepared"),
    )  # fmt: skip
    output = os.open(scene.notes / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from pipeline.run.cli import run_command

    torch.set_num_threads(1)
    run_command(lambda: _run(scene, rank, ranks, engine, act))


def _run(scene: Scene, rank: int, ranks: int, engine: str, act: Any) -> None:
    from eval.measure.lm import measure_in_engine
    from pipeline.data.batches import StageBatches
    from pipeline.engine.config import resolve_ds_config, resolve_fsdp_config
    from pipeline.engine.distributed import start_distributed
    from pipeline.migu.gradient_mask import GradientMask
    from pipeline.run import resume, run, saver, state
    from pipeline.run.recipe_file import load_recipe
    from tests.test_parity import ENGINES

    start_distributed()
    recipe = load_recipe(scene.recipe, [*SETTINGS, *scene.overrides])
    if engine == "fsdp":
        recipe.engine.kind = "fsdp"
        config = resolve_fsdp_config(recipe, ranks, "cpu")
    else:
        config = resolve_ds_config({"zero_optimization": ENGINES[engine]}, recipe, ranks, "cpu")
    notes = (scene.notes / f"{time.time_ns()}-{rank}.jsonl").open("a")
    now = {"stage": 0, "step": 0}

    def note(what: str, digest: str) -> None:
        notes.write(json.dumps({"what": what, "rank": rank, **now, "digest": digest}) + "\n")
        notes.flush()

    def at(place: str) -> None:
        if act is not None and rank == 0:
            act(place, now["stage"], now["step"])

    following, applying = StageBatches.__next__, GradientMask.apply
    preparing, publishing, saving = run._prepare, state.publish_model, saver.seal
    behind = resume.Attempt.after_step

    def follow(batches: Any) -> Any:
        taken = following(batches)
        now.update(stage=batches.stage, step=batches._state["step"])
        columns = [[b[k] for k in ("input_ids", "labels", "segments")] for b in taken]
        rows = [row for of_batch in columns for row in zip(*of_batch, strict=True)]
        for i, row in enumerate(rows):  # whose places in the global batch are known
            place = rank + i * ranks
            text = b"".join(t[row[-1] >= 0].numpy().tobytes() for t in row)  # not the padding
            note("row", f"{place} {hashlib.sha256(text).hexdigest()[:16]}")
        return taken

    def apply(mask: Any, shards: Any, step: int, *more: Any) -> float:
        kept = applying(mask, shards, step, *more)
        note("mask", hashlib.sha256(mask.keep.numpy().tobytes()).hexdigest())
        return kept

    def prepare(*args: Any) -> Any:
        at("preparing")
        return preparing(*args)

    def publish(*args: Any) -> None:
        at("publishing")
        publishing(*args)

    def seal(*args: Any) -> None:
        at("saving")
        saving(*args)

    def after_step(self: Any, step: int) -> None:
        at("step")
        behind(self, step)

    StageBatches.__next__, GradientMask.apply = follow, apply  # type: ignore[method-assign]
    run._prepare, state.publish_model, saver.seal = prepare, publish, seal
    resume.Attempt.after_step = after_step  # type: ignore[method-assign]

    def measure(engine: Any, separation: Any, task: Any, asked: Any) -> None:
        at("measuring")
        assert not (task.folder / "eval.json").exists()
        weights = {n: w.clone() for n, w in engine.full_weights()}
        if rank == 0:  # before eval.json, behind which nobody measures here again
            torch.save(weights, task.folder / "weights.pt")
        measure_in_engine(engine, separation, task, asked)

    import torch

    def report(folder: Path) -> Path:
        return folder

    def refuse(*_: Any) -> None:
        raise AssertionError("there are no benchmarks")

    run.run_recipe(recipe, config, scene.runs, measure, refuse, report)
