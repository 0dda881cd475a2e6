"""A run: stage 0, then for each stage train, publish, evaluate, report. Rerun to continue.

One engine serves all stages. An interrupted run starts it from what was published last, in fp32,
so a run that was interrupted and continued is the same run (docs/runs.md).
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import signals
from pipeline.checkpoint import is_published, read_manifest, verify
from pipeline.data.heldout import check_answers, prepare_heldout
from pipeline.data.tokenizer import vocabulary_size
from pipeline.engine.config import check_compiled, check_quantized, emulated_bf16, precision_of
from pipeline.errors import TrainingStopped, UserError
from pipeline.model.attention import Separation
from pipeline.model.load import check_model, check_pretrained, empty_model, load_config
from pipeline.nodes import send_folder
from pipeline.progress import EventLog
from pipeline.ranks import end_if_asked, on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.run.data import open_data
from pipeline.run.evaluation import Evaluation, one_measures, take_base, take_measured
from pipeline.run.folder import describe_model, open_run, stage_folder
from pipeline.run.methods import check_methods, methods_of, run_start
from pipeline.run.problems import check_precision
from pipeline.run.published import remove
from pipeline.run.replicas import check_replicas
from pipeline.run.row_groups import row_groups
from pipeline.run.stage import clean_up, run_stage
from pipeline.run.state import (
    HeldoutLosses,
    Run,
    base_checkpoint,
    close_engine,
    engine_with,
    free_memory,
    place_of,
    tell,
)
from pipeline.run.tokenizer import run_tokenizer
from pipeline.run.trackers import Trackers

GRACE = 120.0  # seconds from a signal to the end, where nothing is saved within a stage


def run_recipe(
    recipe: Recipe,
    engine_config: dict[str, Any],
    runs: Path,
    measure_heldout: Callable[[Any, Separation, Evaluation, Recipe], None],
    evaluate: Callable[[Evaluation, Recipe, list[str]], None],
    report: Callable[[Path], Path],
    heldout_losses: HeldoutLosses | None = None,
) -> Path:
    """Do what is not done yet of a recipe; returns the report's page. All ranks call it.

    measure_heldout: called by all ranks, with the engine that holds the weights of the checkpoint
        and how documents are kept apart in it: its held-out loss.
    evaluate: called by all ranks, for the other RESULTS; raises RuntimeError on all of them where
        an evaluation failed. Training goes on then, and the next run tries it again.
    report: called by rank 0 with the run folder.
    heldout_losses: of what the engine holds, within a stage; for `stop`. Called by all ranks.

    Raises:
        UserError: the folder is in use or another recipe's; bad data; a full disk; at the end, if
            an evaluation failed.
        TrainingStopped: a loss, magnitude or gradient is not finite; a rank is gone.
        Interrupted: a signal; on every rank.
    """
    folder = runs / recipe.name
    grace = recipe.resume.grace if recipe.resume else GRACE
    with open_run(folder, recipe, engine_config) as lock, signals.listening(grace):
        run = _prepare(folder, recipe, engine_config)
        run.check_folder, run.heldout_losses = lock.check, heldout_losses
        signals.be_careful()
        failed: list[str] = []

        def measure(task: Evaluation) -> float:
            end_if_asked()
            start = time.perf_counter()
            if on_rank0(partial(task.pending, recipe)):
                with ExitStack() as held:
                    on_rank0(lambda: held.enter_context(one_measures(task, recipe)))
                    measure_pending(task)
                on_rank0(partial(report, folder))
                if run.log is not None and task.step is None:
                    run.log.evaluated(task.stage, task.folder)
            return time.perf_counter() - start

        def measure_pending(task: Evaluation) -> None:
            if step := on_rank0(partial(take_measured, task)):
                tell(f"{place_of(task)}: its weights are those of step {step}, as measured")
            if other := on_rank0(partial(take_base, task, recipe)):
                tell(f"{place_of(task)}: the run {other} has measured the same base")
            pending = on_rank0(partial(task.pending, recipe))
            if pending:
                tell(f"{place_of(task)}: measuring {', '.join(pending)}")
            if "heldout" in pending:
                by_rows_of = _split_by(recipe, task)
                engine = engine_with(run, task.checkpoint, by_rows_of, train=False)
                assert run.separation is not None  # known with the engine
                measure_heldout(engine, run.separation, task, recipe)
                pending.remove("heldout")
            try:
                if pending:
                    free_memory()  # room for the evaluation's own copy of the model
                    evaluate(task, recipe, pending)
            except RuntimeError as error:
                failed.append(f"{task.folder}: {error}")
                tell(f"{place_of(task)}: evaluation failed ({error}); training goes on")

        base = base_checkpoint(run)
        run.begun = run_start(recipe, run.tokenizer, run.data, folder, base)
        for method in run.methods:  # before the engine takes the memory
            method.begin(run.begun)
        row_groups(run.begun)  # kept for the stages
        measure(Evaluation(folder, 0, "base", base, recipe.model.revision))
        for stage, s in enumerate(recipe.stages, start=1):
            published = run.checkpoint(stage)
            result = None
            if on_rank0(partial(is_published, published)):
                tell(f"stage {stage} {s.name}: finished before")
                on_rank0(partial(verify, published))
                for task in on_rank0(partial(_within, run, stage)):  # what failed there before
                    measure(task)
                clean_up(run, stage)
                result = _unlogged(run, stage)
            else:
                try:
                    result = run_stage(run, stage, measure)
                except TrainingStopped:
                    if rank() == 0:  # the others may be gone
                        report(folder)  # says so
                    raise
            eval_seconds = measure(Evaluation(folder, stage, s.name, str(published)))
            if result is not None and run.log is not None:
                run.log.write(
                    "stage", stage=stage, domain=s.name, **result, eval_seconds=eval_seconds
                )
        close_engine(run)
        remove(run.masters(len(recipe.stages)))
        page = on_rank0(partial(report, folder))
        # Trackers may send for minutes; the other ranks wait, as rank 0 would miss them.
        on_rank0(lambda: run.log.close() if run.log is not None else None)
    if failed:
        raise UserError(
            "some evaluations failed; run the same command again to retry them alone:\n  "
            + "\n  ".join(failed)
        )
    return page


def _prepare(folder: Path, recipe: Recipe, engine_config: dict[str, Any]) -> Run:
    tokenizer = run_tokenizer(folder, recipe)
    config = load_config(recipe.model, vocabulary_size(tokenizer))
    check_model(config, recipe, vocabulary_size(tokenizer))
    check_quantized(recipe.model.lora, engine_config)
    check_compiled(recipe.train.compile, engine_config)
    check_precision(recipe, precision_of(engine_config))
    check_replicas(recipe, engine_config, world_size())
    check_answers(recipe, tokenizer)
    if slow := emulated_bf16(recipe, engine_config):
        tell(slow)

    def look() -> None:
        model = empty_model(recipe.model, config)
        describe_model(folder, recipe, model)
        check_methods(model, recipe)

    on_rank0(look)
    on_rank0(partial(check_pretrained, recipe.model, config))
    data = open_data(recipe, tokenizer, folder)
    if not on_rank0(partial(is_published, folder / "heldout")):
        target = folder / "heldout"
        on_rank0(lambda: prepare_heldout(recipe, tokenizer, data.sides(), target))
    send_folder(folder / "heldout")
    log = EventLog(folder / "log.jsonl", Trackers(recipe, folder)) if rank() == 0 else None
    if log is not None:
        for name, counts in data.counts().items():
            log.write("corpus", domain=name, **counts)
    methods = methods_of(recipe)
    return Run(folder, recipe, engine_config, config, tokenizer, data, log, methods=methods)


def _split_by(recipe: Recipe, task: Evaluation) -> int:
    """The stage by whose rows a model is split for its held-out loss (`split_stage`): the next one,
    which chooses them by these weights, where it goes on from them; else the one they are of."""
    if task.stage == 0:
        return 1
    last = task.stage == len(recipe.stages)
    goes_on = recipe.start_from == "previous" and task.step is None and not last
    return task.stage + 1 if goes_on else task.stage


def _unlogged(run: Run, stage: int) -> dict[str, Any] | None:
    """The numbers of a published stage whose line in the log got lost: its process was killed
    between the two."""
    if run.log is None or run.log.has_stage(stage):
        return None
    known = read_manifest(run.checkpoint(stage))
    return {
        key: known[key]
        for key in ("steps", "tokens", "seconds", "data", "unread", "guard")
        if key in known
    }


def _within(run: Run, stage: int) -> list[Evaluation]:
    """The evaluations within a finished stage, from the checkpoints that lie there."""
    name = run.recipe.stages[stage - 1].name
    tasks = []
    for folder in sorted(stage_folder(run.folder, stage, name).glob("step-*/checkpoint")):
        info = read_manifest(folder)
        tasks.append(
            Evaluation(run.folder, stage, name, str(folder), None, info["steps"], info["progress"])
        )
    return tasks
