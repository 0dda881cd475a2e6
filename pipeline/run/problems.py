"""What is wrong with a recipe, beyond what types say; found before anything is loaded."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.reader import check_domain
from pipeline.errors import UserError, near
from pipeline.hub_name import missing_folder
from pipeline.recipe import (
    EIGHT_BIT_DRIFT,
    Evaluation,
    HumanEval,
    Recipe,
    Resume,
    mask_problems,
)
from pipeline.run.end_task_problems import end_task_problems
from pipeline.run.method_problems import (
    anchor_problems,
    baseline_problems,
    companion_problems,
    hat_problems,
    method_problems,
    mocl_problems,
    stop_problems,
)
from pipeline.run.prompt_problems import prompt_problems
from pipeline.run.rule_problems import rule_problems
from pipeline.run.seq2seq_problems import seq2seq_problems
from pipeline.run.speed_problems import speed_problems
from pipeline.run.unused_keys import unused_keys

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a domain or a benchmark: it names files


def check_precision(recipe: Recipe, precision: str) -> None:
    """Raises UserError for what does not go with fp16, where DeepSpeed's JSON has asked for it."""
    if precision != "fp16" or recipe.train.precision == "fp16":
        return
    told = replace(recipe, train=replace(recipe.train, precision="fp16"))
    if found := recipe_problems(told):
        raise UserError("\n  ".join(["DeepSpeed's configuration has fp16 enabled:", *found]))


def _not_finite(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The keys of a recipe whose numbers are infinite, or none."""
    if isinstance(node, float) and not math.isfinite(node):
        yield key, node
    elif is_dataclass(node):
        for part in fields(node):
            yield from _not_finite(getattr(node, part.name), f"{key}.{part.name}".lstrip("."))
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _not_finite(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _not_finite(value, f"{key}[{i}]")


def recipe_problems(r: Recipe) -> list[str]:
    """Every problem as 'key: what is wrong; the fix'."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    found += [f"{key}: {value} is no finite number" for key, value in _not_finite(r)]
    m, d, k, o, t = r.model, r.data, r.mask, r.optimizer, r.train
    need(
        0 < len(r.name.encode()) <= 200
        and r.name.isprintable()
        and not r.name.startswith((".", "-"))
        and not set(r.name) & {"/", "\\"},
        f"name: {r.name!r} names the run's folder: at most 200 letters, no '/' and no '.' before "
        "them",
    )
    need((m.path is None) != (m.config is None), "model: give exactly one of `path` and `config`")
    need(
        not (m.path is None and m.tokenizer is None and m.train_tokenizer is None),
        "model.tokenizer: a model built from `config` needs `tokenizer` or `train_tokenizer`",
    )
    need(
        m.config is not None or m.initial_positions == "random",
        "model.initial_positions: has no effect on a pretrained model; remove it",
    )
    need(
        m.path is not None or not m.initialize_missing,
        "model.initialize_missing: has no effect without `path`: all weights are random; remove it",
    )
    need(
        m.lora is None or not m.initialize_missing,
        "model.initialize_missing: LoRA would freeze the random weights as they are; train them "
        "without `lora` first",
    )
    need(
        not (m.tokenizer and m.train_tokenizer),
        "model: give at most one of `tokenizer` and `train_tokenizer`",
    )
    need(
        not (m.path and m.train_tokenizer),
        "model.train_tokenizer: a pretrained model comes with its own vocabulary; remove it",
    )
    need(
        m.train_tokenizer is None or m.train_tokenizer >= 300,
        f"model.train_tokenizer: {m.train_tokenizer} is too small; byte-level BPE needs 300",
    )
    for key in ("path", "tokenizer"):
        problem = missing_folder(getattr(m, key) or "")
        need(problem is None, f"model.{key}: {problem}")
    if m.lora is not None:
        need(m.lora.r >= 1, f"model.lora.r: {m.lora.r} must be at least 1")
        x = m.lora.experts
        need(x >= 1, f"model.lora.experts: {x} must be at least 1")
        need(
            x < 2 or m.lora.r % x == 0,
            f"model.lora.experts: {x} cannot share r={m.lora.r} ranks evenly",
        )
        for key, other in (
            ("model.lora.incremental", m.lora.incremental),
            ("hat_adapter", r.hat_adapter),
            ("epi", r.epi),
            ("evaluate.end_tasks", r.evaluate.end_tasks),
        ):
            need(
                x == 1 or not other,
                f"model.lora.experts: {key} works on plain adapters, without a router; remove one",
            )
        need(m.lora.alpha > 0, f"model.lora.alpha: {m.lora.alpha} must be positive")
        need(0 <= m.lora.dropout < 1, f"model.lora.dropout: {m.lora.dropout} is outside [0, 1)")
        need(
            m.lora.targets is None or len(m.lora.targets) > 0,
            "model.lora.targets: the list is empty; leave it out for every linear of the blocks",
        )
    need(bool(d.domains), "data.domains: name at least one corpus")
    for name, domain in d.domains.items():
        need(
            NAME.fullmatch(name) is not None,
            f"data.domains.{name}: a name is made of letters, digits, '.', '_' and '-' (it names "
            "files)",
        )
        found += check_domain(name, domain)
    need(d.sequence_length >= 16, f"data.sequence_length: {d.sequence_length} is below 16 tokens")
    for key in ("masking", "heldout_masking"):
        need(0 < getattr(d, key) < 1, f"data.{key}: {getattr(d, key)} is outside (0, 1)")
    for key in ("heldout_sequences", "shuffle_window", "open_shards"):
        need(getattr(d, key) >= 1, f"data.{key}: must be at least 1")
    need(d.bad_lines >= 0, "data.bad_lines: must be at least 0")
    need(d.prefetch >= 0, "data.prefetch: must be at least 0")
    need(
        not d.cross_document or d.keep_apart == "auto",
        "data.keep_apart: has no effect with data.cross_document, which lets documents see each "
        "other; remove one",
    )
    need(
        d.keep_apart != "masks" or m.attention != "flash_attention_2",
        "data.keep_apart: flash_attention_2 takes no masks; choose positions or rows",
    )
    need(
        d.keep_apart != "positions" or m.objective == "causal",
        "data.keep_apart: a masked model makes no masks from positions; choose masks or rows",
    )
    found += streaming_problems(r)
    instructions = [n for n, domain in d.domains.items() if domain.instruction or domain.task]
    whole = [n for n, domain in d.domains.items() if domain.whole]
    need(
        not whole or m.objective != "masked",
        f"data.domains.{(whole or [''])[0]}: responses are learnt by a causal or an "
        "encoder-decoder model; set model.objective=causal, or seq2seq",
    )
    need(
        bool(instructions) or d.template == "alpaca",
        "data.template: has no effect without a domain of instructions; remove it",
    )
    need(bool(r.stages), "stages: list at least one domain to train on")
    for i, stage in enumerate(r.stages):
        for name in stage.domains:
            need(
                name in d.domains,
                f"stages[{i}].domain: {name!r} is not in data.domains{near(name, d.domains)}",
            )
        lengths = [x for x in (stage.steps, stage.epochs, stage.tokens) if x is not None]
        need(len(lengths) == 1, f"stages[{i}]: give exactly one of `steps`, `epochs`, `tokens`")
        need(all(x > 0 for x in lengths), f"stages[{i}]: `steps`, `epochs`, `tokens` are positive")
        need(stage.lr is None or stage.lr > 0, f"stages[{i}].lr: must be positive")
        found += mixture_problems(r, i)
        every = stage.evaluate_every
        need(every is None or every > 0, f"stages[{i}].evaluate_every: must be positive")
        if every is not None and len(lengths) == 1:
            need(
                every < lengths[0],
                f"stages[{i}].evaluate_every: {every:g} has no effect in a stage of "
                f"{lengths[0]:g}: its end is always evaluated; lower it or remove it",
            )
    found += stop_problems(r)
    for name in r.evaluate.domains or []:
        need(
            name in d.domains,
            f"evaluate.domains: {name!r} is not in data.domains{near(name, d.domains)}",
        )
    need(
        r.evaluate.domains is None or bool(r.evaluate.domains),
        "evaluate.domains: the list is empty; leave it out for every domain",
    )
    need(0 <= r.seed < 2**32, f"seed: {r.seed} must be at least 0 and less than 2**32")
    found += evaluation_problems(r.evaluate)
    for what in ("benchmarks", "humaneval"):
        need(
            not getattr(r.evaluate, what) or m.objective == "causal",
            f"evaluate.{what}: needs a causal model: a masked LM such as RoBERTa gives text no "
            "likelihood, and its scores would mean nothing"
            + (", and an encoder-decoder continues no text" if m.objective == "seq2seq" else "")
            + ". Remove it, or set model.objective=causal",
        )
    found += seq2seq_problems(r) + prompt_problems(r) + anchor_problems(r)
    found += method_problems(r) + baseline_problems(r) + companion_problems(r) + hat_problems(r)
    found += mocl_problems(r)
    tasks = r.evaluate.end_tasks
    for name, task in tasks.tasks.items() if tasks else ():
        where = f"evaluate.end_tasks.tasks.{name}.domain"
        need(
            task.domain is None or task.domain in d.domains,
            f"{where}: {task.domain!r} is not in data.domains{near(str(task.domain), d.domains)}",
        )
    need(
        not (tasks and tasks.score == "likelihood" and m.objective != "causal"),
        "evaluate.end_tasks.score: likelihood needs a causal model; remove it for a classifier",
    )
    found += resume_problems(r.resume)
    found += mask_problems(k)
    if k.enabled:
        need(
            k.clusters is None or m.lora is None or m.lora.quantize == "none",
            "mask.clusters: groups are made of the base's weights, which are not quantized for it; "
            "set model.lora.quantize=none",
        )
        need(
            k.clusters is None or k.cluster_by != "magnitude" or d.prepare,
            "mask.cluster_by: magnitude reads the first stage's prepared corpus, and "
            "data.prepare=false makes none; remove one of them",
        )
        for key in ("l2_to_start", "hft", "ssu", "ewc", "das"):
            need(
                k.refresh != "stage" or getattr(r, key) is None,
                f"mask.refresh: stage splits the weights that {key} works on as wholes; give a "
                "number of steps, or remove one of the two",
            )
        for key, sparse in (("backward", k.backward != "dense"), ("refresh", k.refresh == "stage")):
            need(
                m.lora is None or not sparse,
                f"mask.{key}: {getattr(k, key)} gains nothing with LoRA, whose gradients, masters "
                "and moments are small; remove it",
            )
        need(
            1 <= k.from_stage <= max(1, len(r.stages)),
            f"mask.from_stage: {k.from_stage} is not one of the stages 1 to {len(r.stages)}",
        )
    need(o.lr > 0, f"optimizer.lr: {o.lr} must be positive")
    need(all(0 <= b < 1 for b in o.betas), f"optimizer.betas: {o.betas} are outside [0, 1)")
    need(
        0 <= o.warmup < 1, f"optimizer.warmup: {o.warmup} is outside [0, 1): a fraction of a stage"
    )
    need(o.weight_decay >= 0, "optimizer.weight_decay: must be at least 0")
    need(o.eps > 0, "optimizer.eps: must be positive")
    need(t.batch_size >= 1, "train.batch_size: must be at least 1")
    need(
        t.micro_batch_size is None or t.micro_batch_size >= 1,
        "train.micro_batch_size: must be at least 1",
    )
    found += rule_problems(r) + speed_problems(r)
    need(t.gradient_clipping >= 0, "train.gradient_clipping: must be at least 0 (0 is off)")
    e = r.engine
    for key, default in (("replicas", 1), ("reshard_after_forward", True)):
        need(
            e.kind == "fsdp" or getattr(e, key) == default,
            f"engine.{key}: has no effect with DeepSpeed; remove it, or set engine.kind=fsdp",
        )
    need(e.replicas >= 1, "engine.replicas: must be at least 1")
    need(
        not (e.kind == "fsdp" and t.precision == "fp16"),
        "train.precision: fp16 needs loss scaling, which fsdp does not have here; use bf16",
    )
    need(
        not (e.kind == "fsdp" and o.name == "adamw8bit"),
        "optimizer.name: adamw8bit does not step FSDP's sharded tensors; use adamw, or "
        "engine.kind=deepspeed",
    )
    need(
        not (
            o.name == "adamw8bit" and k.enabled and k.update == "gradient" and k.refresh != "stage"
        ),
        f"optimizer.name: adamw8bit {EIGHT_BIT_DRIFT}",
    )
    need(
        m.objective == "causal" or not (m.config or {}).get("is_decoder"),
        "model.config.is_decoder: a masked LM is an encoder; set model.objective=causal",
    )
    return found + unused_keys(r)


def streaming_problems(r: Recipe) -> list[str]:
    """What has no effect, or is not possible, in the way in which the data is read."""
    found = []
    if r.data.prepare:
        for key, default in (("shuffle_window", 1024), ("open_shards", 8)):
            if getattr(r.data, key) != default:
                found.append(
                    f"data.{key}: has no effect on prepared data, whose order is of the whole "
                    "corpus; remove it, or set data.prepare=false"
                )
        return found
    if r.data.prepared is not None:
        found.append("data.prepared: has no effect with data.prepare=false; remove one of them")
    for i, stage in enumerate(r.stages):
        if stage.epochs is not None:
            found.append(
                f"stages[{i}].epochs: what an epoch is, is not known of a stream "
                "(data.prepare=false); give `tokens` or `steps`"
            )
        times = stage.max_repetitions
        if times is not None and times != int(times):
            found.append(
                f"stages[{i}].max_repetitions: a stream (data.prepare=false) is read a whole "
                f"number of times; give {int(times) or 1} or {int(times) + 1}"
            )
    for name, domain in r.data.domains.items():
        for key, off in (("deduplicate", False), ("decontaminate", []), ("max_documents", None)):
            if getattr(domain, key) != off:
                found.append(
                    f"data.domains.{name}.{key}: needs the whole corpus, and data.prepare=false "
                    "reads it as a stream; remove one of them"
                )
    return found


def mixture_problems(r: Recipe, index: int) -> list[str]:
    """What is wrong with the weights, the repetitions and the replay of a stage."""
    stage, where = r.stages[index], f"stages[{index}]"
    found = []
    if twice := [n for n, times in Counter(stage.domains).items() if times > 1]:
        found.append(
            f"{where}.domain: {twice[0]!r} is named twice; name it once, with weights if more is "
            f"to be read of it: {{{twice[0]}: 2, OTHER: 1}}"
        )
    if isinstance(stage.domain, dict) and stage.epochs is not None:
        found.append(f"{where}.epochs: domains with weights have no common epoch; give `tokens`")
    if stage.max_repetitions is not None:
        if stage.max_repetitions <= 0:
            found.append(f"{where}.max_repetitions: must be positive")
        if stage.epochs is not None and stage.replay is None:
            found.append(
                f"{where}.max_repetitions: has no effect beside `epochs`, which says how often "
                "every document is read; remove one of them"
            )
    if isinstance(stage.replay, dict):
        for name in stage.replay:
            if name not in r.data.domains:
                known = near(name, r.data.domains)
                found.append(f"{where}.replay: {name!r} is not in data.domains{known}")
            if name in stage.domains:
                found.append(f"{where}.replay: {name!r} is a domain of the stage itself; remove it")
        share = sum(stage.replay.values())
    elif stage.replay is not None:
        share = stage.replay
        if not {n for s in r.stages[:index] for n in s.domains} - set(stage.domains):
            found.append(
                f"{where}.replay: no stage before it reads other domains; name one, as in "
                "{general: 0.01}, or remove it"
            )
    else:
        return found
    if not 0 < share < 1:
        found.append(f"{where}.replay: {share:g} is outside (0, 1): a share of the stage's tokens")
    return found


def resume_problems(r: Resume | None) -> list[str]:
    """What is wrong with the recipe's `resume`."""
    if r is None:
        return []
    found = [
        f"resume.{key}: must be above 0; resume=null saves nothing"
        for key in ("steps", "minutes")
        if getattr(r, key) is not None and not getattr(r, key) > 0
    ]
    if r.steps is None and r.minutes is None:
        found.append("resume: neither `steps` nor `minutes` says when to save; give one, or null")
    if r.keep < 1:
        found.append("resume.keep: must be at least 1")
    if r.keep_every is not None and (not r.steps or r.keep_every < 1 or r.keep_every % r.steps):
        found.append("resume.keep_every: must be a multiple of resume.steps, or null")
    if not r.grace > 0:
        found.append("resume.grace: must be above 0, in seconds")
    return found


def evaluation_problems(e: Evaluation) -> list[str]:
    """What is wrong with the settings of the evaluation by themselves."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    h = e.humaneval
    need(e.batch_size >= 1, "evaluate.batch_size: must be at least 1")
    for name, benchmark in e.benchmarks.items():
        where = f"evaluate.benchmarks.{name}"
        need(
            NAME.fullmatch(name) is not None,
            f"{where}: a name is made of letters, digits, '.', '_' and '-'",
        )
        need(benchmark.shots >= 0, f"{where}.shots: must be at least 0")
        need(
            benchmark.limit is None or benchmark.limit >= 1,
            f"{where}.limit: must be at least 1; leave it out for all documents",
        )
    a = e.answers
    for key in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(a, key)
        need(value is None or value >= 1, f"evaluate.answers.{key}: must be at least 1")
    need(
        e.benchmark_files is None or Path(e.benchmark_files).is_dir(),
        f"evaluate.benchmark_files: no such folder: {e.benchmark_files}",
    )
    if e.end_tasks:
        found += end_task_problems(e.end_tasks)
    if h:
        where = "evaluate.humaneval"
        need(h.limit is None or h.limit >= 1, f"{where}.limit: must be at least 1")
        need(h.samples >= 0, f"{where}.samples: must be at least 0")
        drawn = (h.temperature, h.top_p) != (HumanEval.temperature, HumanEval.top_p)
        need(
            h.samples > 0 or not drawn,
            f"{where}: `temperature` and `top_p` have no effect without `samples`",
        )
        need(h.temperature > 0, f"{where}.temperature: must be positive; greedy always runs too")
        need(0 < h.top_p <= 1, f"{where}.top_p: {h.top_p} is outside (0, 1]")
        for key in ("max_new_tokens", "batch_size"):
            need(getattr(h, key) >= 1, f"{where}.{key}: must be at least 1")
        need(h.timeout > 0, f"{where}.timeout: must be positive, in seconds")
    return found
