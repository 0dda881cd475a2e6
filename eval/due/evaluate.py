"""What of the published checkpoints is not evaluated yet, and the evaluation of it.

Every kind of measurement runs as `launch/evaluate.py`, in a process of its own that ends with this
one, into a folder of its own; results move to their place when they are whole. So nobody ever sees
half of them, and training may go on or do the same meanwhile.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.analysis.files import Damaged, read_json
from eval.due.whole import digest_of
from eval.measure.command import SCRIPT, arguments, ended
from eval.measure.results import write_json
from pipeline.checkpoint import is_published
from pipeline.recipe import Recipe
from pipeline.redact import redact
from pipeline.run.evaluation import RESULTS, Evaluation
from pipeline.run.recipe_file import load_recipe

PLACE = ".due"  # in the folder of the results, until they are whole


@dataclass
class Due:
    """One kind of measurement of one checkpoint."""

    folder: str  # of the run, below the root
    task: Evaluation
    kind: str  # of RESULTS
    recipe: Recipe
    digest: str  # of the checkpoint
    outdated: bool  # there is a result, of an older version of a task

    @property
    def key(self) -> str:
        return (
            f"{self.folder}/{self.task.folder.name}/{self.task.step or 0}/{self.kind}/{self.digest}"
        )

    @property
    def where(self) -> str:
        step = f", step {self.task.step}" if self.task.step else ""
        return f"stage {self.task.stage} ({self.task.name}){step}"


@dataclass
class Outcome:
    """Of an evaluation: `done`, `gone` (the checkpoint, meanwhile), `cut` (by the end of the
    budget) or `failed`, and why."""

    kind: str
    reason: str = ""


def find_due(run: Path, folder: str) -> list[Due]:
    """Of a run, in the order of its stages.

    Raises:
        UserError: its recipe is not one of this version.
    """
    recipe = load_recipe(run / "recipe.yaml")
    found = []
    for task in _published(run, recipe):
        pending = task.pending(recipe)
        outdated = _outdated(task, recipe) if "benchmarks" not in pending else []
        digest = digest_of(Path(task.checkpoint))
        found += [Due(folder, task, kind, recipe, digest, kind in outdated)
                  for kind in (*pending, *outdated)]  # fmt: skip
    return found


def _published(run: Path, recipe: Recipe) -> list[Evaluation]:
    """The model before training, and every checkpoint that is there."""
    base = Evaluation(run, 0, "base", str(recipe.model.path), recipe.model.revision)
    own = base.folder / "checkpoint"
    if is_published(own):
        base = Evaluation(run, 0, "base", str(own))
    found = [base] if recipe.model.path or is_published(own) else []
    for stage, s in enumerate(recipe.stages, start=1):
        end = Evaluation(run, stage, s.name, "")
        for place in sorted(end.folder.glob("step-*/checkpoint")):
            info = read_json(place / "manifest.json") if is_published(place) else None
            if info and {"steps", "progress"} <= set(info):
                found.append(Evaluation(run, stage, s.name, str(place), None, info["steps"],
                                        info["progress"]))  # fmt: skip
        checkpoint = end.folder / "checkpoint"
        if is_published(checkpoint):
            found.append(Evaluation(run, stage, s.name, str(checkpoint)))
    return found


def _outdated(task: Evaluation, recipe: Recipe) -> list[str]:
    """Benchmarks that lm-eval defines anew since they were measured, or that the recipe has more
    of."""
    if not recipe.evaluate.benchmarks:
        return []
    from eval.measure.benchmark_sources import task_version

    try:
        record = read_json(task.folder / RESULTS["benchmarks"]) or {}
        entries, skipped = record.get("benchmarks") or {}, record.get("skipped") or {}
        for name, benchmark in recipe.evaluate.benchmarks.items():
            entry = entries.get(name)
            if entry is None and name in skipped:
                continue
            version = task_version(benchmark.task or name)
            if entry is None or version not in (None, entry["version"]):
                return ["benchmarks"]
    except (Damaged, KeyError, TypeError, AttributeError):
        return ["benchmarks"]
    return []


def evaluate(due: Due, seconds: float | None, stop: Callable[[], bool]) -> Outcome:
    """Measure and put the results into place.

    Args:
        seconds: after which it is cut off; None: never.
        stop: asked every second; true ends it like the end of the budget.
    """
    place = due.task.folder / PLACE
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        outcome = _measure(due, place, seconds, stop)
        if outcome.kind == "done":
            outcome = _move(due, place)
        return outcome
    except OSError as error:
        return Outcome("failed", f"{due.kind}: {error}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measure(due: Due, place: Path, seconds: float | None, stop: Callable[[], bool]) -> Outcome:
    said = place / "said.txt"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *_arguments(due, place)],
            stdout=subprocess.DEVNULL,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if stop() or (end is not None and time.monotonic() > end):
                        return Outcome("cut")
        finally:
            process.kill()
            process.wait()
    if code == 0 and (place / RESULTS[due.kind]).is_file():
        return Outcome("done")
    if _gone(due):
        return Outcome("gone")
    return Outcome("failed", _reason(said.read_text(encoding="utf-8", errors="replace"), code))


def _arguments(due: Due, place: Path) -> list[str]:
    given = arguments(due.task, due.recipe, [due.kind], place)
    if due.kind == "heldout":
        given += ["--threshold", str(due.recipe.mask.threshold)]
        with suppress(OSError, ValueError):
            environment = json.loads((due.task.run / "environment.json").read_bytes())
            if environment.get("precision") in ("fp32", "bf16"):  # as the run measures the others
                given += ["--precision", environment["precision"]]
    return [*given, "--with-parent"]


def _move(due: Due, place: Path) -> Outcome:
    """Results into the folder of the stage, the file that others look for last."""
    if _gone(due):
        return Outcome("gone")
    target, name = due.task.folder, RESULTS[due.kind]
    if (target / name).is_file() and not due.outdated:
        return Outcome("done")  # the run has measured it itself meanwhile
    measured: dict[str, Any] = json.loads((place / name).read_bytes())
    write_json(place / name, {**measured, **due.task.describe()})
    others = [p for p in place.iterdir() if p.is_file() and p.name not in (name, "said.txt")]
    for path in (*others, place / name):
        os.replace(path, target / path.name)
    return Outcome("done")


def _gone(due: Due) -> bool:
    """Whether the checkpoint was deleted or replaced since it was found."""
    return bool(due.digest) and digest_of(Path(due.task.checkpoint)) != due.digest


def _reason(said: str, code: int) -> str:
    """The last that the process said, or how it ended."""
    if code < 0:
        return ended("the process", code)
    lines = [line.strip() for line in redact(said).splitlines() if line.strip()]
    _, found, after = "\n".join(lines).rpartition("could not be measured:\n")
    if found:
        return after.replace("\n", "; ")
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [ended("the process", code)])[-1]
