"""What is measured of a checkpoint, and where its results lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
