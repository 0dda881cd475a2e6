"""The training loop of one stage."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.objective import targets_of
from pipeline.engine.optimizer import Hold
from pipeline.errors import BadGradient, TrainingStopped
from pipeline.methods.method import Method
from pipeline.migu.gradient_mask import GradientMask, NonFiniteMagnitude
from pipeline.model.attention import Separation, arrange
from pipeline.model.chunked_loss import ChunkedLoss
from pipeline.model.load import PredictedPositions, predict, predicted_places
from pipeline.progress import EventLog
from pipeline.quantity import as_written
from pipeline.ranks import summed, totals, world_size
from pipeline.recipe import Optimizer, Recipe
from pipeline.run.bad_steps import BadStepRule
from pipeline.run.domain_losses import DomainLosses
from pipeline.run.speed import Stopwatch
from pipeline.run.stage_rows import FrozenRows
from pipeline.run.step_report import StepReport

Batch = dict[str, Tensor]
Mask = GradientMask | FrozenRows


@dataclass
class StageResult:
    """What a stage has trained, in all attempts; tokens without padding, of all ranks."""

    steps: int = 0
    tokens: int = 0


def train_stage(
    engine: Any,
    mask: Mask | None,
    batches: Iterator[list[Batch]],
    recipe: Recipe,
    stage: int,
    steps: int,
    log: EventLog | None,
    after_step: Callable[[int], bool] | None = None,
    domains: list[str] | None = None,
    separation: Separation | None = None,
    methods: Sequence[Method] = (),
    done: StageResult | None = None,
    bad: BadStepRule | None = None,
    lr_factor: Callable[[], float] | None = None,
) -> StageResult:
    """Train at most `steps` steps; the model, the optimizer and the schedule, which runs over all
    of them, start fresh with the stage.

    Args:
        mask: None trains dense.
        batches: per step, this rank's micro-batches.
        stage: from 1.
        log: None on every rank but 0.
        after_step: called by all ranks after every step, to evaluate or save within the stage; True
            ends it.
        domains: names of those that `domains` of a micro-batch counts; their losses are logged.
        separation: how the packed batches of `collate` are given to the model; None: the batches
            are what its forward takes, with labels.
        methods: prepared for the stage; the engine knows how many micro-batches they add.
        done: what earlier attempts have; engine, batches and methods are as behind it. Counted on
            in place.
        bad: what becomes of steps whose numbers are bad; None: what the recipe says.
        lr_factor: of the scheduled learning rate; asked before every step.

    Raises:
        TrainingStopped: the weights are those of the last good step.
    """
    done = done or StageResult()
    name = recipe.stages[stage - 1].name
    objective = recipe.model.objective
    peak_lr = recipe.stages[stage - 1].lr or recipe.optimizer.lr
    head = PredictedPositions(engine.module) if _trims_head(recipe, mask) else None
    chunked = ChunkedLoss(head) if head and recipe.train.chunked_loss else None
    report = StepReport(engine, recipe, stage, steps, log, done.steps) if log is not None else None
    by_domain = DomainLosses(domains, engine.device) if domains and len(domains) > 1 else None
    bad = bad or BadStepRule(recipe.bad_steps, stage, name)
    timer = Stopwatch(engine.device)
    edited = any(type(method).edit is not Method.edit for method in methods)

    def forward(waiting: Batch, count: int) -> tuple[Tensor, Tensor]:
        """(what is minimised, the loss): sums over the `count` predictions of a micro-batch."""
        inputs, tokens = arrange(_to(waiting, engine.device), separation, engine.module)
        targets = targets_of(tokens["labels"], objective)
        places = predicted_places(targets, count)
        learnt = targets.reshape(-1).index_select(0, places)
        real = tokens.get("real"), tokens.get("decoder_real")
        with timer("forward"), mask.recording(*real) if mask else nullcontext():
            logits: Any = None  # never all at once, and no method asks for them
            if chunked:
                losses = chunked.losses(engine.forward, inputs, places, learnt)
            else:
                logits = predict(engine.forward, inputs, places, head).float()
                losses = F.cross_entropy(logits, learnt, reduction="none")
        if by_domain is not None:
            by_domain.count(waiting["domains"].to(engine.device))
            of_tokens = targets_of(tokens["domains"], objective).reshape(-1)
            by_domain.add(losses, of_tokens.index_select(0, places))
        minimized = losses
        for method in methods:
            minimized = method.weigh(minimized, logits, targets, inputs)
        return minimized.sum(), losses.detach().sum()

    for step in range(done.steps + 1, steps + 1):
        timer.begin()
        with timer("data"):
            micro_batches = next(batches)
            extras = [(method, batch) for method in methods for batch in method.batches(step)]
        # Every predicted token of the step weighs the same, however the batch is split.
        counts = [int((targets_of(b["labels"], objective) >= 0).sum()) for b in micro_batches]
        sizes = [sum(counts), sum(map(_real_tokens, micro_batches))]
        predicted, read = summed(torch.tensor(sizes, dtype=torch.float64), engine.device)
        parts = len(micro_batches) + len(extras)
        scale = (parts * world_size() / predicted.clamp_min(1)).float()  # the host does not wait
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        where = f"stage {stage} ({name}), step {step}"
        losses: Iterable[tuple[Tensor, Tensor]] = map(forward, micro_batches, counts)  # when asked
        if mask and mask.defers:  # the backwards need the rows, the rows all the forwards
            losses = list(losses)
            with timer("mask"):
                _select(mask, engine, step, where)
        for i, (minimized, loss) in enumerate(losses, start=1):
            with timer("backward"):
                engine.backward(minimized * scale, last=i == parts)
            loss_sum += loss
        mean_loss = (summed(loss_sum, engine.device) / predicted.clamp_min(1)).item()
        tokens = int(read)
        with timer("backward"):
            method_losses = extra_backwards(engine, head, extras, mask)
        domain_losses = by_domain.reduce() if by_domain is not None else None
        lr = learning_rate(recipe.optimizer, peak_lr, step, steps)
        if lr_factor is not None:
            lr *= lr_factor()
        problem = bad.problem({"loss": mean_loss, **method_losses})
        for method in methods if problem is None else ():  # what they keep is of good steps
            method.edit(engine.shards, step, lr)
        with timer("mask"):
            kept = 1.0
            try:  # also where the loss is no number: this names the layer
                kept = mask.apply(engine.shards, step, edited) if mask else 1.0
            except NonFiniteMagnitude as error:
                kept = 0.0
                if not (engine.scales_loss and recipe.mask.criterion == "gradient"):
                    problem = f"the loss is {mean_loss}, {error}"
                # else the gradient overflowed: the step is skipped, with a smaller scale
        hold = partial(mask.hold, engine.shards) if mask else nullcontext
        with timer("step"):
            applied = _step(engine, bad, step, lr, hold, mean_loss, problem)
            for method in methods if applied else ():
                method.after_step(engine, step, steps)
            if mask and not applied:
                mask.forget(step)
        timer.end()
        done.steps, done.tokens = step, done.tokens + tokens
        if report is not None:
            report.step(
                step, timer.seconds(), tokens=tokens, predicted=int(predicted), loss=mean_loss,
                lr=lr, kept=kept, applied=applied, domains=domain_losses, methods=method_losses,
            )  # fmt: skip
        if after_step is not None and after_step(step):
            break
    for part in (report, chunked, head):
        if part is not None:
            part.close()
    return done


def _real_tokens(batch: Batch) -> int:
    return int(batch["real"].sum()) if "real" in batch else batch["labels"].numel()


def _select(mask: Mask, engine: Any, step: int, where: str) -> None:
    try:
        mask.select(engine.shards, step)
    except NonFiniteMagnitude as error:
        raise TrainingStopped(f"{where}: {error}") from None


def _step(
    engine: Any,
    bad: BadStepRule,
    step: int,
    lr: float,
    hold: Hold,
    loss: float,
    problem: str | None,
) -> bool:
    """Whether the optimizer's step was taken; one with a problem is dropped before it reaches the
    weights. hold: as of the engine's `step`."""
    if problem is None:
        try:
            applied = engine.step(lr, hold=hold)
            bad.good(loss)
            return applied
        except BadGradient as error:
            problem = f"the loss is {loss}, {error}"
    else:
        engine.drop_step()
    bad.dropped(step, problem)
    return False


def learning_rate(optimizer: Optimizer, peak: float, step: int, steps: int) -> float:
    """The rate of step 1..steps: linear warm-up to `peak`, then the schedule, to 0 at the end."""
    warmup = math.ceil(as_written(optimizer.warmup) * steps)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if optimizer.schedule == "linear":
        return peak * (1 - done)
    if optimizer.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def extra_backwards(
    engine: Any,
    head: PredictedPositions | None,
    extras: list[tuple[Method, Any]],
    mask: Mask | None = None,
) -> dict[str, float]:
    """The micro-batches that methods add, behind those of the new text; each method's mean loss
    (nats a prediction, without its weight) over all ranks.

    mask: of the step, whose rows are known where a method is not masked.

    The new text's loss is a mean over its predictions; a method's is one over its own, times its
    weight, whatever the numbers of rows.
    """
    counts: dict[Method, int] = defaultdict(int)
    sums: dict[Method, Tensor] = {}
    for method, batch in extras:
        counts[method] += method.predictions(batch)
    predicted = dict(zip(counts, totals(counts.values(), engine.device), strict=True))
    for i, (method, batch) in enumerate(extras, start=1):
        loss = method.loss(engine, head, batch)
        scale = engine.micro_batches * world_size() / max(predicted[method], 1)
        with mask.all_rows() if mask and not method.masked else nullcontext():
            engine.backward(loss * method.weight * scale, last=i == len(extras))
        sums[method] = sums.get(method, 0.0) + loss.detach().double()
    means = totals([sums[m].item() for m in counts], engine.device)
    return {m.name: s / max(predicted[m], 1) for m, s in zip(counts, means, strict=True)}


def _trims_head(recipe: Recipe, mask: Mask | None) -> bool:
    """Not where the mask covers the head: its magnitudes are taken over all tokens."""
    return mask is None or all(t.component != "head" for t in mask.targets)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}
