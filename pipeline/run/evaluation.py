"""What is measured of a checkpoint, and where its results lie."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import is_published, read_manifest, replace_file
from pipeline.recipe import Recipe
from pipeline.run.folder import stage_folder, step_folder

RESULTS = {
    "heldout": "eval.json", "benchmarks": "benchmarks.json", "humaneval": "humaneval.json",
    "end_tasks": "end_tasks.json", "tasks": "tasks.json",
}  # fmt: skip


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
        results = [place / name for name in RESULTS.values() if (place / name).is_file()]
        beside = [p for p in place.iterdir() if p.is_file() and p not in results]
        for path in beside:  # before the results, by which is seen what has been measured
            shutil.copyfile(path, end.folder / path.name)
        for path in results:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = {k: v for k, v in found.items() if k not in ("step", "progress")}
            text = json.dumps({**found, **end.describe()}, indent=2) + "\n"
            replace_file(end.folder / path.name, text)
        return int(known["steps"])
    return None
