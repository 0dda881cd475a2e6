"""What is measured of a checkpoint, and where its results lie."""

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from pipeline import signals
from pipeline.checkpoint import is_published, read_manifest, replace_file
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.run.base_files import FILE as BASE
from pipeline.run.folder import stage_folder, step_folder
from pipeline.run.recipe_defaults import with_defaults
from pipeline.yaml_file import Loader, read_yaml

RESULTS = {
    "heldout": "eval.json", "benchmarks": "benchmarks.json", "humaneval": "humaneval.json",
    "end_tasks": "end_tasks.json", "tasks": "tasks.json",
}  # fmt: skip
SHARED = ("heldout", "benchmarks", "humaneval", "tasks")  # end tasks are trained for hours
MASK = ("threshold", "components", "split_fused", "refresh")  # what the overlap of rows is of
RECIPE = ("seed", "model", "data", "evaluate", "epi", "hat_adapter", "das", "engine")
ENVIRONMENT = ("commit", "versions", "hardware", "engine", "precision")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate (a published folder or a hub id), and where the results go."""

    run: Path
    stage: int
    name: str
    checkpoint: str
    revision: str | None = None
    step: int | None = None  # within the stage; None at its end
    progress: float | None = None  # at that step, in the stage's unit

    @property
    def folder(self) -> Path:
        folder = stage_folder(self.run, self.stage, self.name)
        return folder if self.step is None else step_folder(folder, self.step)

    def describe(self) -> dict[str, Any]:
        """What a result says of where it belongs."""
        within = {} if self.step is None else {"step": self.step, "progress": self.progress}
        return {"stage": self.stage, "name": self.name, "checkpoint": self.checkpoint, **within}

    def pending(self, recipe: Recipe) -> list[str]:
        """What of RESULTS the recipe wants and is not there yet."""
        wanted = {
            "heldout": True,
            "benchmarks": bool(recipe.evaluate.benchmarks),
            "humaneval": recipe.evaluate.humaneval is not None,
            "end_tasks": self.step is None and bool(recipe.end_tasks_after(self.stage)),
            "tasks": bool(recipe.tasks()),
        }
        return [k for k, yes in wanted.items() if yes and not (self.folder / RESULTS[k]).is_file()]


def take_measured(end: Evaluation) -> int | None:
    """Give the end of a stage the results of the step within it that published the same files; that
    step, or None where none did.

    So the guard's check behind the last step is not repeated, nor that of the step to which it has
    brought the stage back.
    """
    checkpoint = Path(end.checkpoint)
    if end.step is not None or not is_published(checkpoint):
        return None
    files = read_manifest(checkpoint)["files"]
    for place in sorted(end.folder.glob("step-*"), reverse=True):
        published = place / "checkpoint"
        if not is_published(published) or (known := read_manifest(published))["files"] != files:
            continue
        _take(place, end, list(RESULTS), {})
        return int(known["steps"])
    return None


def take_base(base: Evaluation, recipe: Recipe) -> str | None:
    """Give the base of a run what another run beside it has measured of the same base; its name, or
    None where there is none.

    The same: weights, held-out text, what is measured and how, engine, versions, hardware and
    commit, without changes to the code. So the runs of a sweep measure their base once.
    """
    wanted = [k for k in base.pending(recipe) if k in SHARED] if base.stage == 0 else []
    if not wanted or (mine := _what_measures(base.run)) is None:
        return None
    seed = mine.pop("seed")
    for other in sorted(base.run.parent.iterdir()):
        place = stage_folder(other, 0, base.name)
        there = [k for k in wanted if (place / RESULTS[k]).is_file()]
        if other == base.run or not there or (theirs := _what_measures(other)) is None:
            continue
        if theirs.pop("seed") != seed:  # with which HumanEval draws
            there = [k for k in there if k != "humaneval"]
        if theirs != mine:
            continue
        if "benchmarks" in there and _changed_since(recipe, place / RESULTS["benchmarks"]):
            there.remove("benchmarks")
        if there:
            _take(place, base, there, {"measured_by": other.name})
            return other.name
    return None


@contextmanager
def one_measures(base: Evaluation, recipe: Recipe) -> Iterator[None]:
    """While a run measures its base, those beside it that have the same one wait here, for what it
    finds (`take_base`). Only rank 0 enters it.

    Raises:
        Interrupted: while it waits.
    """
    lock = _base_lock(base, recipe)
    try:
        if lock is not None:
            signals.acquire(lock, "stage 0 base: waits for a run beside it, which measures it too")
    except (OSError, NotImplementedError):  # no file to be locked here: each measures it itself
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            Path(lock.lock_file).unlink(missing_ok=True)  # who has it open goes on, one by one
            lock.release()


def _base_lock(base: Evaluation, recipe: Recipe) -> FileLock | None:
    if base.stage or not any(kind in SHARED for kind in base.pending(recipe)):
        return None
    if (what := _what_measures(base.run)) is None:
        return None
    text = json.dumps({k: v for k, v in what.items() if k != "seed"}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    return FileLock(base.run.parent / f".base-{name}.lock")


def _what_measures(run: Path) -> dict[str, Any] | None:
    """All on which the results of a run's base depend; None where it is not known."""
    try:
        recipe = with_defaults(yaml.load(read_yaml(run / "recipe.yaml"), Loader))
        environment = json.loads((run / "environment.json").read_text("utf-8"))
        base = json.loads((run / BASE).read_text("utf-8"))
        heldout = json.loads((run / "heldout" / "manifest.json").read_text("utf-8"))["files"]
        published = stage_folder(run, 0, "base") / "checkpoint"
        weights = read_manifest(published)["files"] if is_published(published) else None
        files = [run / "ds_config.json", run / "fsdp.json"]
        engine = {p.name: p.read_text("utf-8") for p in files if p.is_file()}
        if environment["dirty"]:
            return None
        mask = {k: recipe["mask"][k] for k in MASK}
        # Of tasks that are asked when they have been seen, the base is asked the others.
        seen = (recipe["evaluate"].get("answers") or {}).get("asked") == "seen"
        stages = [s["domain"] for s in recipe["stages"]] if seen else []
        trained = sorted({n for d in stages for n in ([d] if isinstance(d, str) else d)})
        return {
            **{k: recipe[k] for k in RECIPE},
            **{k: environment[k] for k in ENVIRONMENT},
            **{"mask": mask, "trained": trained, "base": base, "heldout": heldout},
            **{"weights": weights, "engine_files": engine},
        }
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _changed_since(recipe: Recipe, result: Path) -> bool:
    """Whether a local file of a benchmark is younger than a result."""
    patterns = [f for b in recipe.evaluate.benchmarks.values() for f in b.files]
    if recipe.evaluate.benchmark_files:
        patterns.append(str(Path(recipe.evaluate.benchmark_files) / "**"))
    files = [f for pattern in patterns for f in glob.glob(pattern, recursive=True)]
    return any(Path(f).stat().st_mtime > result.stat().st_mtime for f in files)


def _take(place: Path, to: Evaluation, kinds: list[str], more: dict[str, Any]) -> None:
    """Copy results, and what lies beside them, into the folder of another evaluation."""
    results = [p for k in kinds if (p := place / RESULTS[k]).is_file()]
    others = set(RESULTS.values())
    to.folder.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():  # before the results, by which is seen what has been measured
        if path.is_file() and path.name not in others and not path.name.startswith((".", "share-")):
            shutil.copyfile(path, to.folder / path.name)
    for path in results:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = {k: v for k, v in found.items() if k not in ("step", "progress")}
        text = json.dumps({**found, **to.describe(), **more}, indent=2) + "\n"
        replace_file(to.folder / path.name, text)
