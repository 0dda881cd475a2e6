"""Evaluate a published checkpoint in processes of its own: one per rank, each on its share.

Only the ranks that see the run folder of rank 0 take part: the checkpoint lies there. What they
measured reaches rank 0 through the process group, so no file has to be seen by another machine.
"""

import os
from functools import partial
from pathlib import Path

import torch

from eval.measure.checkpoint import failure, merge, part
from eval.measure.command import arguments, ended
from eval.measure.evaluator import Evaluator
from pipeline import heartbeat, signals
from pipeline.nodes import first_beside
from pipeline.ranks import gather, meet, on_rank0, rank
from pipeline.recipe import Recipe
from pipeline.run.evaluation import Evaluation

# What a launcher sets for its ranks; the evaluation is not one of them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

Files = dict[str, bytes]  # by name

_waiting: Evaluator | None = None


def evaluate_in_processes(task: Evaluation, recipe: Recipe, kinds: list[str]) -> None:
    """Called by every rank; rank 0 merges the shares of each kind into a file in `task.folder`.

    Raises:
        RuntimeError: something could not be measured (on every rank alike); the rest is there.
        TrainingStopped: a rank is gone.
    """
    on_rank0(partial(_prepare, task.folder))
    near = [r for r, first in enumerate(first_beside(task.run)) if first == 0]
    files: Files = {}
    if rank() in near:
        files = _measure(task, recipe, kinds, near.index(rank()), len(near))
    meet()  # not in a collective: its timeout is shorter than a long evaluation
    shares = gather(files)

    def merge_shares() -> list[str]:
        for name, content in (f for share in shares for f in share.items()):
            (task.folder / name).write_bytes(content)
        heldout, threshold = task.run / "heldout", recipe.mask.threshold
        try:
            return merge(
                task.folder, kinds, len(near), recipe.evaluate, heldout, threshold, task.describe()
            )
        finally:
            _clear(task.folder)

    if failed := on_rank0(merge_shares):
        raise RuntimeError("; ".join(failed))


def _measure(task: Evaluation, recipe: Recipe, kinds: list[str], share: int, shares: int) -> Files:
    """Run the evaluation of one share; its results, or for each kind the reason why there is none.

    Raises:
        TrainingStopped: another rank is gone meanwhile.
        Interrupted: the run is to end, which every rank notices here or when they meet.
    """
    asked = _arguments(task, recipe, kinds, share, shares)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        asked += ["--device", f"cuda:{torch.cuda.current_device()}"]
    evaluator, code = _asked(asked), None  # what it could not do, it writes down
    heart = heartbeat.mine()
    try:
        while (code := evaluator.wait(1)) is None:
            signals.check()
            if heart:
                heart.check()
    finally:
        if code is None or on_gpu:  # there it would keep memory
            evaluator.end()
    for kind in kinds:
        if not part(task.folder, kind, share).is_file():
            reason = failure(task.folder, kind, share)
            if not reason.is_file():
                how = ended(f"the evaluation process of rank {rank()}", code)
                reason.write_text(f"{kind}: {how}", encoding="utf-8")
    found = sorted(task.folder.glob(f"share-{share}.*"))
    content = {path.name: path.read_bytes() for path in found}
    for path in found:
        path.unlink()
    return content


def _asked(arguments: list[str]) -> Evaluator:
    """The evaluator that waits since the last measurement, or a new one; it is at it."""
    global _waiting
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    if _waiting is not None and _waiting.waits(environment):
        _waiting.ask(arguments)
        return _waiting
    if _waiting is not None:
        _waiting.end()
    _waiting = Evaluator(arguments, environment)
    return _waiting


def _arguments(
    task: Evaluation, recipe: Recipe, kinds: list[str], share: int, shares: int
) -> list[str]:
    given = arguments(task, recipe, kinds, task.folder)
    return [*given, "--share", f"{share}/{shares}"]


def _prepare(folder: Path) -> None:
    """An empty place for the shares: those of a broken attempt may be of another number."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)


def _clear(folder: Path) -> None:
    for leftover in folder.glob("share-*"):
        leftover.unlink()
