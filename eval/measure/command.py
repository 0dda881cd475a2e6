"""`launch/evaluate.py` as a process of its own: what it is called with, and how it ended."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # end tasks run in processes that would import all of a run for it
    from pipeline.recipe import Recipe
    from pipeline.run.evaluation import Evaluation

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"


def arguments(task: "Evaluation", recipe: "Recipe", kinds: list[str], output: Path) -> list[str]:
    """To measure a checkpoint of a run as its recipe says. kinds: of RESULTS."""
    settings = {
        "--checkpoint": task.checkpoint,
        "--revision": task.revision,
        "--tokenizer": recipe.model.tokenizer if task.stage == 0 else None,
        "--recipe": str(task.run / "recipe.yaml"),
        "--heldout": str(task.run / "heldout"),
        "--output": str(output),
        "--attention": recipe.model.attention,
    }
    given = [word for name, value in settings.items() if value for word in (name, value)]
    if "end_tasks" in kinds:
        given += ["--end-tasks", *recipe.end_tasks_after(task.stage)]
    if "tasks" in kinds:
        given += ["--answer", *recipe.tasks_after(task.stage)]
    return [*given, "--tasks", *kinds]


def ended(process: str, code: int) -> str:
    """Of a process that said nothing itself. process: its name in the sentence."""
    if code >= 0:
        return f"{process} ended with exit code {code}"
    text = f"{process} was ended by {signal.Signals(-code).name}"
    return text + ": was there enough memory?" * (code == -signal.SIGKILL)
