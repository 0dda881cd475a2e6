"""`--dry-run`: what a recipe would do and take, without loading weights or training."""

import math
from pathlib import Path
from typing import Any

from pipeline.data.batches import frame_of
from pipeline.data.encode import Frame
from pipeline.data.heldout import check_answers
from pipeline.data.instruct import Example
from pipeline.data.mixture import Corpus
from pipeline.data.prepare import describe as describe_domain
from pipeline.data.prepare import estimated_tokens, prepared_before
from pipeline.data.sources import task_examples
from pipeline.data.stage import StagePlan, domains_of, plan_stage, shares_of
from pipeline.data.tasks import described, options_of
from pipeline.data.tokenizer import vocabulary_size
from pipeline.engine.config import (
    check_compiled,
    check_quantized,
    describe,
    emulated_bf16,
    precision_of,
)
from pipeline.migu.targets import count_rows
from pipeline.model.gguf import local_weights
from pipeline.model.load import check_model, check_pretrained, empty_model, load_config
from pipeline.recipe import Lora, Model, Recipe
from pipeline.run.memory import memory_lines, split_as_in_training
from pipeline.run.methods import check_methods
from pipeline.run.problems import check_precision
from pipeline.run.stage_rows import masked_targets
from pipeline.run.tokenizer import model_tokenizer


def describe_run(recipe: Recipe, engine_config: dict[str, Any], ranks: int) -> str:
    """The resolved recipe, the mask, the stages and the memory per rank, as text.

    Raises:
        UserError: what the run itself would refuse.
    """
    m = recipe.model
    tokenizer, vocabulary = planned_tokenizer(m)
    config = load_config(m, vocabulary)
    check_model(config, recipe, vocabulary)
    check_quantized(m.lora, engine_config)
    check_compiled(recipe.train.compile, engine_config)
    check_precision(recipe, precision_of(engine_config))
    if tokenizer is not None:
        check_answers(recipe, tokenizer)
    if m.path is not None and Path(local_weights(m.path)).exists():  # nothing is fetched for it
        check_pretrained(m, config)
    model = empty_model(m, config)
    parameters = sum(p.numel() for p in model.parameters())
    lines = [recipe.to_yaml()]
    lines += [
        f"model      {type(model).__name__}, {parameters:,} parameters, vocabulary {vocabulary:,}"
    ]
    lines += [
        f"engine     {describe(engine_config)}, {precision_of(engine_config)}, {ranks} rank(s), "
        f"batch {recipe.train.batch_size} = {ranks} x {recipe.train.micro_batch_size} x "
        f"{engine_config['gradient_accumulation_steps']} (ranks x micro-batch x accumulation)"
    ]
    if slow := emulated_bf16(recipe, engine_config):
        lines += [f"           {slow}"]
    if m.lora is not None:
        lines += _lora_lines(m.lora, model)
    if m.prompt is not None:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines += [f"prompt     {m.prompt.tokens} vectors, {count:,} parameters; the rest is frozen"]
    check_methods(model, recipe)
    lines += _mask_lines(recipe, model)
    lines += _data_lines(recipe, tokenizer)
    examples = _task_examples(recipe)
    lines += _task_lines(recipe, examples)
    lines += _stage_lines(recipe, tokenizer, {n: len(e["train"]) for n, e in examples.items()})
    split_as_in_training(model, recipe)
    lines += memory_lines(model, recipe, engine_config, ranks)
    return "\n".join(lines)


def _lora_lines(lora: Lora, model: Any) -> list[str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    share = count / sum(p.numel() for p in model.parameters())
    linears = sum(hasattr(m, "lora_A") for m in model.modules())
    base = "frozen" if lora.quantize == "none" else f"frozen in {lora.quantize}"
    return [
        f"adapter    LoRA of rank {lora.r} on {linears} linears, alpha {lora.alpha}, "
        f"dropout {lora.dropout:g}: trains {count:,} parameters ({share:.2%}); the rest is {base}"
    ]


def _mask_lines(recipe: Recipe, model: Any) -> list[str]:
    k = recipe.mask
    if not k.enabled:
        return ["mask       off: every row is updated"]
    counts = count_rows(masked_targets(model, k), k.threshold, k.rule)
    total = {key: sum(c[key] for c in counts.values()) for key in ("linears", "rows", "kept")}
    lines = [f"mask       criterion {k.criterion}, T = {k.threshold}, from stage {k.from_stage}:"]
    for name, c in [*counts.items(), ("all", total)]:
        lines.append(
            f"  {name:<9}{c['linears']:>4} linears {c['rows']:>9,} rows, {c['kept']:>9,} kept "
            f"({c['kept'] / c['rows']:.1%})"
        )
    return lines


def _data_lines(recipe: Recipe, tokenizer: Any) -> list[str]:
    if tokenizer is None or not recipe.data.prepare:
        why = "streamed" if tokenizer else "to be prepared once the tokenizer is trained"
        return [f"data       {why}"]
    names = dict.fromkeys(n for i in range(len(recipe.stages)) for n in domains_of(recipe, i + 1))
    every = [*names, *(n for n in recipe.heldout_domains() if n not in names)]
    return ["data", *(f"  {describe_domain(recipe, name, tokenizer)}" for name in every)]


def _task_examples(recipe: Recipe) -> dict[str, dict[str, list[Example]]]:
    """Of each task but those of the hub, from which nothing is fetched."""
    domains = recipe.data.domains.items()
    return {n: task_examples(d, recipe.data.bad_lines) for n, d in domains if d.task and not d.hub}


def _task_lines(recipe: Recipe, examples: dict[str, dict[str, list[Example]]]) -> list[str]:
    """Of each task its rows, its labels, and three prompts."""
    lines = []
    for name, domain in recipe.data.domains.items():
        if domain.task and name in examples:
            lines += [f"  {line}" for line in described(name, domain.task, examples[name])]
        elif domain.task:
            lines.append(f"  {name}: of {domain.hub}, labels {', '.join(options_of(domain.task))}")
    return ["tasks", *lines] if lines else []


def _stage_lines(recipe: Recipe, tokenizer: Any, rows: dict[str, int]) -> list[str]:
    """rows: of the tasks that are known."""
    lines = ["stages"]
    per_step = recipe.train.batch_size * recipe.data.sequence_length
    for i, stage in enumerate(recipe.stages, start=1):
        lr = stage.lr or recipe.optimizer.lr
        plan = _plan(recipe, i, tokenizer)
        if plan is None:
            about = _about(recipe, i, tokenizer, rows)
            lines.append(f"  {i} {stage.name}: {stage.epochs:g} epochs{about}, lr {lr:g}")
            continue
        read = round(plan.steps * per_step * (1 - plan.padding))
        most = "" if recipe.data.packing or plan.padding else "at most "  # rows may have padding
        lines.append(f"  {i} {stage.name}: {plan.steps:,} steps, {most}{read:,} tokens, lr {lr:g}")
        lines += [f"    {line}" for line in plan.describe(recipe.data.sequence_length)]
        if pauses := plan.pauses(stage.evaluate_every):
            lines.append(f"    evaluated within, after the steps {', '.join(map(str, pauses))}")
    return lines


def _plan(recipe: Recipe, stage: int, tokenizer: Any) -> StagePlan | None:
    """None for a stage of epochs on domains that are not prepared yet."""
    corpora: dict[str, Corpus] = {}
    names = domains_of(recipe, stage) if recipe.data.prepare and tokenizer else []
    for name in names:
        if prepared := prepared_before(recipe, name, tokenizer):
            corpora[name] = prepared.train
    if names and len(corpora) == len(names):
        return plan_stage(recipe, stage, corpora, frame_of(recipe, tokenizer))
    if recipe.stages[stage - 1].epochs is not None:
        return None
    return plan_stage(recipe, stage, None, Frame([], [], 0))


def planned_tokenizer(model: Model) -> tuple[Any, int]:
    """(tokenizer, size of its vocabulary); None where the run is to train it."""
    if model.train_tokenizer is not None:
        return None, model.train_tokenizer
    tokenizer = model_tokenizer(model)
    return tokenizer, vocabulary_size(tokenizer)


def planned_steps(recipe: Recipe, stage: int, tokenizer: Any) -> int | None:
    """None where the length of the stage's corpora is not known yet."""
    plan = _plan(recipe, stage, tokenizer)
    return None if plan is None else plan.steps


def _about(recipe: Recipe, stage: int, tokenizer: Any, rows: dict[str, int]) -> str:
    """How many steps an epoch of text, or of rows that are not packed, comes to."""
    if tokenizer is None:
        return " (steps are known once the tokenizer is trained)"
    s, packing = recipe.stages[stage - 1], recipe.data.packing
    parts: list[int | float | None]
    if not packing:
        parts = [rows.get(name) for name in s.domains]
    elif any(recipe.data.domains[name].task for name in s.domains):
        parts = [None]  # of the files of a task only some rows are taken
    else:
        parts = [estimated_tokens(recipe, name, tokenizer) for name in s.domains]
    if None in parts:
        return " (steps are known once the data is prepared)"
    own = sum(n or 0 for n in parts) * (s.epochs or 0) / shares_of(recipe, stage)[0].share
    each = recipe.train.batch_size * (recipe.data.sequence_length if packing else 1)
    return f", about {math.ceil(own / each):,} steps"
