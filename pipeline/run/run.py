"""A run: stage 0, then for each stage train, publish, evaluate, report. Rerun to continue.

One engine serves all stages. An interrupted run starts it from what was published last, in fp32,
so a run that was interrupted and continued is the same run (docs/runs.md).
"""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from pipeline import signals
from pipeline.checkpoint import damage, is_published, publish, read_manifest, require_space, verify
from pipeline.data.bad_lines import BadLines
from pipeline.data.heldout import prepare_heldout
from pipeline.data.stage import StagePlan
from pipeline.data.tokenizer import vocabulary_size
from pipeline.engine.config import check_quantized, check_row_sparse
from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.methods.method import Method, Start, published
from pipeline.model.attention import Separation
from pipeline.model.load import build_model, check_model, check_pretrained, load_config
from pipeline.model.split_linear import is_split
from pipeline.nodes import send_folder
from pipeline.progress import EventLog, say
from pipeline.ranks import end_if_asked, on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.run.bad_steps import BadStepRule
from pipeline.run.build import Engine, build_engine, starts_elsewhere
from pipeline.run.data import RunData, describe_unread, open_data
from pipeline.run.evaluation import Evaluation
from pipeline.run.folder import MASTERS, RESUME, describe_model, open_run, stage_folder, step_folder
from pipeline.run.guard import KeptWeights, watch_of
from pipeline.run.methods import methods_of, run_start, stage_start
from pipeline.run.nearest import nearest_start
from pipeline.run.published import check_masters, publish_masters, publish_model, remove
from pipeline.run.replicas import check_replicas, compare_replicas
from pipeline.run.resume import Attempt, StageState, discard
from pipeline.run.stage_rows import mask_of_stage, split_for_stage, split_stage
from pipeline.run.stop import target_of
from pipeline.run.tokenizer import run_tokenizer
from pipeline.run.trackers import Trackers
from pipeline.run.train import train_stage

GRACE = 120.0  # seconds from a signal to the end, where nothing is saved within a stage
# (engine, separation, held-out folder, domains, batch size) -> nats per predicted token by domain.
HeldoutLosses = Callable[[Any, Separation | None, Path, list[str], int], dict[str, float]]


@dataclass
class Run:
    """What the stages share."""

    folder: Path
    recipe: Recipe
    engine_config: dict[str, Any]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    data: RunData
    log: EventLog | None  # on rank 0
    engine: Engine | None = None  # made when it is first needed: `_engine_with`
    methods: list[Method] = field(default_factory=list)
    heldout_losses: HeldoutLosses | None = None
    begun: Start | None = None  # what the methods know of the run
    check_folder: Callable[[], None] = lambda: None  # raises where another process has taken it
    separation: Separation | None = None  # found before the engine shards the model
    holds: str | None = None  # the checkpoint whose weights it has; None: of no checkpoint
    rows: int | None = None  # the stage by whose rows it is split: `split_stage`

    def checkpoint(self, stage: int) -> Path:
        name = self.recipe.stages[stage - 1].name if stage else "base"
        return stage_folder(self.folder, stage, name) / "checkpoint"

    def masters(self, stage: int) -> Path:
        """Beside the newest checkpoint, where that has a lower precision than fp32."""
        return self.checkpoint(stage).with_name(MASTERS)

    @property
    def keeps_masters(self) -> bool:
        return self.recipe.train.publish_dtype != "float32" and not self.adds_adapters

    @property
    def adds_adapters(self) -> bool:
        """Whether every stage trains an adapter of its own, beside what is published."""
        lora = self.recipe.model.lora
        return lora is not None and lora.incremental


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
            pending = on_rank0(partial(task.pending, recipe))
            if pending:
                _tell(f"{_place(task)}: measuring {', '.join(pending)}")
                if "heldout" in pending:
                    coming = min(task.stage + 1, len(recipe.stages))
                    engine = _engine_with(run, task.checkpoint, coming, train=False)
                    assert run.separation is not None  # known with the engine
                    measure_heldout(engine, run.separation, task, recipe)
                    pending.remove("heldout")
                try:
                    if pending:
                        _free_memory()  # room for the evaluation's own copy of the model
                        evaluate(task, recipe, pending)
                except RuntimeError as error:
                    failed.append(f"{task.folder}: {error}")
                    _tell(f"{_place(task)}: evaluation failed ({error}); training goes on")
                on_rank0(partial(report, folder))
                if run.log is not None and task.step is None:
                    run.log.evaluated(task.stage, task.folder)
            return time.perf_counter() - start

        base = _base_checkpoint(run)
        run.begun = run_start(recipe, run.tokenizer, run.data, folder, base)
        for method in run.methods:  # before the engine takes the memory
            method.begin(run.begun)
        measure(Evaluation(folder, 0, "base", base, recipe.model.revision))
        for stage, s in enumerate(recipe.stages, start=1):
            published = run.checkpoint(stage)
            result = None
            if on_rank0(partial(is_published, published)):
                _tell(f"stage {stage} {s.name}: finished before")
                on_rank0(partial(verify, published))
                for task in on_rank0(partial(_within, run, stage)):  # what failed there before
                    measure(task)
                discard(published.with_name(RESUME))
                result = _unlogged(run, stage)
            else:
                try:
                    result = _train(run, stage, measure)
                except TrainingStopped:
                    if rank() == 0:  # the others may be gone
                        report(folder)  # says so
                    raise
            eval_seconds = measure(Evaluation(folder, stage, s.name, str(published)))
            if result is not None and run.log is not None:
                run.log.write(
                    "stage", stage=stage, domain=s.name, **result, eval_seconds=eval_seconds
                )
        _close_engine(run)
        remove(run.masters(len(recipe.stages)))
        page = on_rank0(partial(report, folder))
        if run.log is not None:
            run.log.close()
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
    if recipe.mask.enabled:
        check_row_sparse(recipe.mask.backward, engine_config)
    check_replicas(recipe, engine_config, world_size())
    on_rank0(partial(describe_model, folder, recipe, config))
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


def _train(run: Run, stage: int, measure: Callable[[Evaluation], float]) -> dict[str, Any]:
    """Train a stage from the weights of the one before and publish it; its numbers for the log."""
    recipe = run.recipe
    s = recipe.stages[stage - 1]
    plan: StagePlan = on_rank0(partial(run.data.plan, stage))
    for line in plan.describe(recipe.data.sequence_length):
        _tell(f"{s.name}: {line}")
    end_if_asked()
    source = _source(run, stage)
    goes_on = source > 0
    before = str(run.checkpoint(source)) if goes_on else _base_checkpoint(run)
    if run.keeps_masters and goes_on and run.holds != before:
        check_masters(run.masters(stage - 1))
    if run.adds_adapters:
        _close_engine(run)
    engine = _engine_with(run, before, stage)
    _require_space(run, engine, plan.steps)
    assert run.begun is not None  # by `run_recipe`
    begun = stage_start(run.begun, stage, before, run.separation, engine)
    for method in run.methods:
        method.prepare(begun)
    engine.start_stage(sum(method.micro_batches() for method in run.methods))
    run.holds = None
    torch.manual_seed(recipe.stage_seed(stage) * 100_003 + rank())
    mask = mask_of_stage(engine.module, recipe, stage)
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
        _tell(f"stage {stage} {s.name}: goes on behind step {attempt.behind} of {plan.steps}")
    elif guard is not None:
        guard.begin(run.checkpoint(0).parent, run.checkpoint(stage - 1 if goes_on else 0).parent)
    if run.log is not None:
        run.log.write("begin", stage=stage, step=attempt.behind)
    on_rank0(partial(_clear_within, run, stage, attempt.behind))

    target = target_of(recipe, stage, plan.steps, loss, run.log)

    def after_step(step: int) -> bool:
        ended = False
        with state.not_training():
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
        result = train_stage(
            engine, mask, batches, recipe, stage, steps, run.log, after_step,
            batches.domains, run.separation, run.methods, behind=attempt.behind, bad=bad,
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
        _tell(f"{s.name}: {describe_unread(unread)}")
    _report_bad_lines(run.data.bad, batches.domains, run.log)
    since = time.perf_counter()
    if mask:
        mask.close()
    for method in run.methods:
        method.finish(engine, stage)
    guarded = {"guard": guard.end(kept)} if guard is not None else {}
    numbers = {
        "steps": result.steps, "tokens": result.tokens, "seconds": state.seconds,
        "data": asdict(plan.examples) if plan.examples else None,
        "unread": {n: {"documents": d, "tokens": t} for n, (d, t) in unread.items()},
        **guarded,
    }  # fmt: skip
    info = {"stage": stage, "name": s.name, **numbers}  # the log may lose them: `_unlogged`
    if run.keeps_masters:  # before what it belongs to: a published stage has its masters
        publish_masters(run.masters(stage), engine, info)
    _publish(run, run.checkpoint(stage), engine, info)
    discard(stage_resume(run, stage))
    kept.remove()
    if stage > 1:
        remove(run.masters(stage - 1))
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
    _close_engine(run)  # room for whole models
    checkpoints = [_base_checkpoint(run), *(str(run.checkpoint(i)) for i in range(1, stage))]
    source = nearest_start(run.begun, stage, checkpoints)
    names = ["the base", *(f"stage {i} {s.name}" for i, s in enumerate(run.recipe.stages, 1))]
    _tell(f"stage {stage} {run.recipe.stages[stage - 1].name}: starts from {names[source]}")
    return source


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
            _publish(run, target, engine, info)
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


def _engine_with(run: Run, checkpoint: str, stage: int, train: bool = True) -> Engine:
    """The run's engine with the weights of a checkpoint: a stage's, or what stage 1 starts from.

    It is made once in a run. What an interrupted run has left to measure at an older checkpoint
    makes another one, and so does each stage where the rows that it trains are chosen before it.

    stage: that it trains, or the one to come where it measures (`train` False).
    """
    rows = split_stage(run.recipe, stage)
    if run.engine is not None and run.holds == checkpoint and (not train or run.rows == rows):
        return run.engine
    _close_engine(run)
    run.engine, run.separation = build_engine(
        run.recipe, run.engine_config, run.config, checkpoint,
        None if rows is None else partial(
            split_for_stage, stage=rows, recipe=run.recipe, engine_config=run.engine_config,
            folder=run.checkpoint(rows).parent, batches=partial(run.data.batches, rows),
        ),
    )  # fmt: skip
    run.holds, run.rows = checkpoint, rows
    return run.engine


def _close_engine(run: Run) -> None:
    if run.engine is not None:
        run.engine.close()
        run.engine = run.holds = None
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _require_space(run: Run, engine: Engine, steps: int) -> None:
    """For what the stage will publish."""
    split = is_split(engine.module)
    parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad or split]
    size = getattr(torch, run.recipe.train.publish_dtype).itemsize + 4 * run.keeps_masters
    if run.recipe.resume is not None:  # fp32 and two moments; the new one beside those kept
        every = run.recipe.resume.keep_every
        size += 12 * (run.recipe.resume.keep + 1 + (steps // every if every else 0))
    if run.recipe.guard is not None and run.recipe.guard.action == "stop":
        size += 4 * 2
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    on_rank0(partial(require_space, run.folder, numbers * size))


def _publish(run: Run, target: Path, engine: Engine, info: dict[str, Any]) -> None:
    dtype = getattr(torch, run.recipe.train.publish_dtype)
    publish_model(target, engine, run.tokenizer, dtype, info)
    run.holds = str(target)


def _base_checkpoint(run: Run) -> str:
    """What stage 0 evaluates: the pretrained model where it is, or what the run published of a
    model with random weights."""
    model = run.recipe.model
    if starts_elsewhere(model):
        return str(model.path)
    target = run.checkpoint(0)

    def write(folder: Path) -> None:
        built: Any = build_model(model, run.config, None, run.recipe.seed)
        built.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    if not on_rank0(partial(is_published, target)):
        on_rank0(partial(publish, target, write, {"stage": 0, "name": "base"}))
    return str(target)


def _report_bad_lines(bad: dict[str, BadLines], names: list[str], log: EventLog | None) -> None:
    for name in names:
        lines = bad.get(name)
        if lines and lines.count and log is not None:
            examples = [{"file": f, "line": n, "reason": r} for f, n, r in lines.examples]
            log.write("bad_lines", domain=name, count=lines.count, examples=examples)
            _tell(f"  {name}: skipped {lines.count} broken rows, for example\n{lines.listing()}")


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


def _clear_within(run: Run, stage: int, behind: int) -> None:
    """Delete what a broken attempt of this stage published, unless this one goes on from it."""
    folder = stage_folder(run.folder, stage, run.recipe.stages[stage - 1].name)
    for leftover in folder.glob("step-*"):
        if not behind:
            shutil.rmtree(leftover)


def stage_resume(run: Run, stage: int) -> Path:
    return run.checkpoint(stage).with_name(RESUME)


def _place(task: Evaluation) -> str:
    return f"stage {task.stage} {task.name}" + (f", step {task.step}" if task.step else "")


def _tell(text: str) -> None:
    if rank() == 0:
        say(text)
