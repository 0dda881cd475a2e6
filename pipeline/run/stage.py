"""One stage of a run: train from the weights of the one before, look within it, publish."""

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import damage, is_published, require_space
from pipeline.data.bad_lines import BadLines
from pipeline.data.stage import StagePlan
from pipeline.errors import Interrupted, TrainingStopped
from pipeline.methods.method import published
from pipeline.model.compiled import compiled_blocks
from pipeline.model.split_linear import is_split
from pipeline.progress import EventLog
from pipeline.ranks import end_if_asked, on_rank0, rank
from pipeline.run.bad_steps import BadStepRule
from pipeline.run.build import Engine
from pipeline.run.data import describe_unread
from pipeline.run.evaluation import Evaluation
from pipeline.run.folder import RESUME, stage_folder, step_folder
from pipeline.run.guard import KeptWeights, watch_of
from pipeline.run.methods import stage_start
from pipeline.run.nearest import nearest_start
from pipeline.run.published import check_masters, publish_masters, remove
from pipeline.run.replicas import compare_replicas
from pipeline.run.resume import Attempt
from pipeline.run.row_groups import row_groups
from pipeline.run.saver import discard
from pipeline.run.stage_rows import mask_of_stage
from pipeline.run.stage_state import StageState
from pipeline.run.state import (
    Run,
    base_checkpoint,
    close_engine,
    engine_with,
    publish_weights,
    tell,
)
from pipeline.run.stop import target_of
from pipeline.run.train import StageResult, train_stage


def run_stage(run: Run, stage: int, measure: Callable[[Evaluation], float]) -> dict[str, Any]:
    """Train a stage from the weights of the one before and publish it; its numbers for the log."""
    recipe = run.recipe
    s = recipe.stages[stage - 1]
    plan: StagePlan = on_rank0(partial(run.data.plan, stage))
    for line in plan.describe(recipe.data.sequence_length):
        tell(f"{s.name}: {line}")
    end_if_asked()
    source = _source(run, stage)
    goes_on = source > 0
    before = str(run.checkpoint(source)) if goes_on else base_checkpoint(run)
    if run.keeps_masters and goes_on and run.holds != before:
        check_masters(run.masters(stage - 1))
    if run.adds_adapters:
        close_engine(run)
    engine = engine_with(run, before, stage)
    _require_space(run, engine, stage, plan)
    assert run.begun is not None  # by `run_recipe`
    begun = stage_start(run.begun, stage, before, run.separation, engine)
    for method in run.methods:
        method.prepare(begun)
    engine.start_stage(sum(method.micro_batches() for method in run.methods))
    run.holds = None
    torch.manual_seed(recipe.stage_seed(stage) * 100_003 + rank())
    mask = mask_of_stage(engine.module, recipe, stage, row_groups(run.begun))
    batches = run.data.batches(stage)
    pauses, every = plan.pauses(s.evaluate_every), recipe.train.compare_replicas

    kept = KeptWeights(run.checkpoint(stage).parent, engine, run.methods)
    loss = partial(_published_loss, run, engine)
    evaluated = partial(_evaluate_within, run, stage, engine, measure, plan)
    guard = watch_of(recipe.guard, stage, plan.steps, loss, evaluated, kept, run.log)
    bad = BadStepRule(recipe.bad_steps, stage, s.name, run.log, batches.documents)
    rules = [bad, *([guard] if guard else [])]
    state = StageState(engine, batches, mask, [*run.methods, *rules], recipe.stage_seed(stage))
    attempt = Attempt(stage_resume(run, stage), recipe.resume, state, plan.steps)
    bad.go_back = attempt.go_back
    if attempt.behind:
        tell(f"stage {stage} {s.name}: goes on behind step {attempt.behind} of {plan.steps}")
    elif guard is not None:
        guard.begin(run.checkpoint(0).parent, run.checkpoint(source).parent)
    if run.log is not None:
        run.log.write("begin", stage=stage, step=attempt.behind)
    on_rank0(partial(_clear_within, run, stage, attempt.behind))

    target = target_of(recipe, stage, plan.steps, loss, run.log)

    done = StageResult(attempt.behind, state.tokens)

    def after_step(step: int) -> bool:
        ended = False
        with state.not_training():
            state.tokens = done.tokens
            if step > attempt.behind:
                run.check_folder()
                if every and step % every == 0:
                    compare_replicas(engine, step)
            try:
                ended = guard is not None and guard.after_step(step)
                if step > attempt.behind and not ended:
                    attempt.after_step(step)
                ended = ended or (step > 0 and target is not None and target.reached(step))
                if step in pauses and not ended:
                    evaluated(step)
            except Interrupted:
                attempt.leave(step)
                raise
        return ended

    # What was interrupted behind that step: a look at the target, an evaluation.
    steps = attempt.behind if after_step(attempt.behind) else plan.steps
    try:
        with compiled_blocks(engine.module) if recipe.train.compile else nullcontext():
            train_stage(
                engine, mask, batches, recipe, stage, steps, run.log, after_step,
                batches.domains, run.separation, run.methods, done=done, bad=bad,
                lr_factor=guard.lr if guard else None,
            )  # fmt: skip
    except TrainingStopped as error:
        if run.log is not None:
            run.log.write("stopped", reason=str(error), stage=stage, step=run.log.step + 1)
        raise
    attempt.finish()
    batches.close()
    unread = batches.unfinished()
    if unread:
        tell(f"{s.name}: {describe_unread(unread)}")
    _report_bad_lines(run.data.bad, batches.domains, run.log)
    since = time.perf_counter()
    if mask:
        mask.close()
    for method in run.methods:
        method.finish(engine, stage)
    guarded = {"guard": guard.end(kept)} if guard is not None else {}
    numbers = {
        "steps": done.steps, "tokens": done.tokens, "seconds": state.seconds,
        "data": asdict(plan.examples) if plan.examples else None,
        "unread": {n: {"documents": d, "tokens": t} for n, (d, t) in unread.items()},
        **guarded,
    }  # fmt: skip
    info = {"stage": stage, "name": s.name, **numbers}  # the log may lose them: `_unlogged`
    if run.keeps_masters:  # before what it belongs to: a published stage has its masters
        publish_masters(run.masters(stage), engine, info)
    publish_weights(run, run.checkpoint(stage), engine, info)
    clean_up(run, stage)
    publish_seconds = time.perf_counter() - since
    return {**numbers, "publish_seconds": publish_seconds}


def _source(run: Run, stage: int) -> int:
    """The stage whose weights a stage starts from; 0: the base."""
    start_from = run.recipe.start_from
    if stage == 1 or start_from == "base":
        return 0
    if start_from == "previous":
        return stage - 1
    assert run.begun is not None  # by `run_recipe`
    close_engine(run)  # room for whole models
    checkpoints = [base_checkpoint(run), *(str(run.checkpoint(i)) for i in range(1, stage))]
    source = nearest_start(run.begun, stage, checkpoints)
    names = ["the base", *(f"stage {i} {s.name}" for i, s in enumerate(run.recipe.stages, 1))]
    tell(f"stage {stage} {run.recipe.stages[stage - 1].name}: starts from {names[source]}")
    return source


def _evaluate_within(
    run: Run,
    stage: int,
    engine: Engine,
    measure: Callable[[Evaluation], float],
    plan: StagePlan,
    step: int,
) -> Path:
    """Publish and measure the model as it is after a step of a stage; the folder of the results."""
    name, every = run.recipe.stages[stage - 1].name, run.recipe.stages[stage - 1].evaluate_every
    progress = plan.pauses(every).get(step, step / plan.steps_per_unit)
    target = step_folder(stage_folder(run.folder, stage, name), step) / "checkpoint"
    info = {"stage": stage, "name": name, "steps": step, "progress": progress}
    with published(engine, run.methods):
        if not on_rank0(lambda: is_published(target) and not damage(target)):
            publish_weights(run, target, engine, info)
        run.holds = str(target)
        measure(Evaluation(run.folder, stage, name, str(target), None, step, progress))
    run.holds = None
    return target.parent


def _published_loss(run: Run, engine: Engine, domain: str) -> float:
    """Held-out loss of a domain, of what would be published now. All ranks call it."""
    assert run.heldout_losses is not None, "for what looks at losses within a stage"
    folder, size = run.folder / "heldout", run.recipe.evaluate.batch_size
    with published(engine, run.methods):
        return run.heldout_losses(engine, run.separation, folder, [domain], size)[domain]


def _require_space(run: Run, engine: Engine, stage: int, plan: StagePlan) -> None:
    """For what the stage will publish and keep, with what it has on the disk already."""
    recipe, folder = run.recipe, run.checkpoint(stage).parent
    split = is_split(engine.module)
    parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad or split]
    within = len(plan.pauses(recipe.stages[stage - 1].evaluate_every))
    size = getattr(torch, recipe.train.publish_dtype).itemsize * (1 + within)
    size += 4 * run.keeps_masters
    if recipe.resume is not None:  # fp32 and two moments; the new one beside those kept
        every = recipe.resume.keep_every
        size += 12 * (recipe.resume.keep + 1 + (plan.steps // every if every else 0))
    if recipe.guard is not None and recipe.guard.action == "stop":
        size += 4 * 2
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)

    def require() -> None:
        there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        require_space(run.folder, numbers * size - there)

    on_rank0(require)


def _clear_within(run: Run, stage: int, behind: int) -> None:
    """Delete what a broken attempt of this stage published, unless this one goes on from it."""
    folder = stage_folder(run.folder, stage, run.recipe.stages[stage - 1].name)
    for leftover in folder.glob("step-*"):
        if not behind:
            shutil.rmtree(leftover)


def _report_bad_lines(bad: dict[str, BadLines], names: list[str], log: EventLog | None) -> None:
    for name in names:
        lines = bad.get(name)
        if lines and lines.count and log is not None:
            examples = [{"file": f, "line": n, "reason": r} for f, n, r in lines.examples]
            log.write("bad_lines", domain=name, count=lines.count, examples=examples)
            tell(f"  {name}: skipped {lines.count} broken rows, for example\n{lines.listing()}")


def clean_up(run: Run, stage: int) -> None:
    """Delete what is needed no more once a stage is published. All ranks call it."""
    discard(stage_resume(run, stage))
    KeptWeights(run.checkpoint(stage).parent, run.engine, run.methods).remove()
    if stage > 1:
        remove(run.masters(stage - 1))


def stage_resume(run: Run, stage: int) -> Path:
    return run.checkpoint(stage).with_name(RESUME)
