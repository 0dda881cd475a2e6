"""The engine's configuration, a dictionary without "auto".

For DeepSpeed it is the JSON file: checked (DeepSpeed accepts misspelt top-level keys without a
word), filled from the recipe where it says "auto", and held against the recipe where it says
something else. For FSDP it comes from the recipe alone and has the block `fsdp`.
"""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.ds_keys import combined_problems, top_level_problems, zero_problems
from pipeline.errors import UserError
from pipeline.model.compiled import check_compiler
from pipeline.recipe import Lora, Recipe

PRECISIONS = ("bf16", "fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
DEFAULT_DS_CONFIG = str(DS_CONFIGS / "zero2.json")


def resolve_engine_config(
    path: str | None, recipe: Recipe, ranks: int, device: str
) -> dict[str, Any]:
    """The configuration of the engine that the recipe names.

    Args:
        path: a DeepSpeed JSON; None takes DEFAULT_DS_CONFIG. FSDP has none.
        ranks: number of processes; device: "cpu" or "cuda".

    Raises:
        UserError: lists every problem.
    """
    if recipe.engine.kind == "deepspeed":
        path = path or DEFAULT_DS_CONFIG
        return resolve_ds_config(load_ds_config(path), recipe, ranks, device, path)
    if path is not None:
        raise UserError(
            f"--config {path}: a DeepSpeed configuration has no effect with engine.kind=fsdp; "
            "remove one of the two"
        )
    return resolve_fsdp_config(recipe, ranks, device)


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file: a path, or the name of one of this project's (zero3,
    ds_configs/zero3.json), which is found from any folder.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    own = DS_CONFIGS / f"{str(path).removeprefix('ds_configs/').removesuffix('.json')}.json"
    if not Path(path).exists() and own.parent == DS_CONFIGS and own.exists():
        path = own
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = sorted(p.name for p in Path(path).parent.glob("*.json"))
        own_names = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        near = f"; the folder has {', '.join(here)}" if here else f"; by name: {own_names}"
        raise UserError(f"--config {path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    return config


def resolve_ds_config(
    config: dict[str, Any], recipe: Recipe, ranks: int, device: str, name: str = "ds_config"
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: complete, without "auto".

    Args:
        config: as read from the file; not changed.
        ranks: number of processes; device: "cpu" or "cuda"; name: the file, for messages.

    Raises:
        UserError: lists every problem: unknown keys, contradictions with the recipe, an "auto"
            that nothing fills.
    """
    config = json.loads(json.dumps(config))
    problems = top_level_problems(config)
    if isinstance(config.setdefault("zero_optimization", {}), dict):
        problems += zero_problems(config["zero_optimization"])
    else:
        problems.append('zero_optimization: must be an object such as {"stage": 2}')
        config["zero_optimization"] = {}
    precision = _resolve_precision(config, recipe, device, problems)
    _check_data_types(config, precision, problems)
    divides = _resolve_batch(config, recipe, ranks, problems)
    _agree(config, "gradient_clipping", recipe.train.gradient_clipping, "train", problems)
    _check_optimizer(config, recipe, problems)
    eight_bit = recipe.optimizer.name == "adamw8bit"
    if eight_bit:  # DeepSpeed's own tests do not cover it
        _agree(config, "zero_allow_untested_optimizer", True, "optimizer.name", problems)
    for key in _autos(config) if divides else ():  # else those of the batch are left
        problems.append(f'{key}: "auto" is not filled here; write a value or remove the key')
    if problems:
        raise _problems(name, problems)
    for other in PRECISIONS:
        config[other] = config.get(other, {}) if other == precision else {"enabled": False}
    if precision in PRECISIONS:
        config[precision]["enabled"] = True
    config.pop("optimizer", None)  # built by the engine, from the recipe
    if device == "cpu" or eight_bit or not offloads(config, "optimizer"):
        config["zero_force_ds_cpu_optimizer"] = False  # no compiled CPU Adam: start at once
    config.setdefault("steps_per_print", 10**9)
    if problems := combined_problems(config):
        raise _problems(name, problems)
    return config


def resolve_fsdp_config(recipe: Recipe, ranks: int, device: str) -> dict[str, Any]:
    """What `FsdpEngine` gets. Arguments and errors as for `resolve_ds_config`."""
    problems: list[str] = []
    replicas = recipe.engine.replicas
    if ranks % replicas:
        problems.append(
            f"engine.replicas: {replicas} copies of the model do not divide {ranks} rank(s); "
            "choose a divisor"
        )
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" and has_bf16() else "fp32"
    accumulation = _accumulation(recipe, ranks, None, "train.batch_size", problems)
    if problems:
        raise _problems("fsdp", problems)
    return {
        "fsdp": {
            "replicas": replicas,
            "reshard_after_forward": recipe.engine.reshard_after_forward,
        },
        "bf16": {"enabled": precision == "bf16"},
        "train_batch_size": recipe.train.batch_size,
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.train.gradient_clipping,
    }


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads(config: dict[str, Any], what: str) -> bool:
    """Whether "optimizer" or "param" is offloaded to the CPU."""
    block = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return block.get("device", "none") != "none"


def precision_of(config: dict[str, Any]) -> str:
    return next((p for p in PRECISIONS if config.get(p, {}).get("enabled")), "fp32")


def describe(config: dict[str, Any]) -> str:
    if "fsdp" in config:
        replicas = config["fsdp"]["replicas"]
        return "FSDP2" if replicas == 1 else f"FSDP2, {replicas} replicas (HSDP)"
    text = f"DeepSpeed ZeRO-{zero_stage(config)}"
    offloaded = [w for w in ("optimizer", "param") if offloads(config, w)]
    return text + (f" + {' and '.join(offloaded)} offload" if offloaded else "")


def memory_per_rank(
    parameters: int, config: dict[str, Any], ranks: int, optimizer: str = "adamw"
) -> dict[str, tuple[int, int]]:
    """Bytes of model state per rank, (device, host), without activations and buffers.

    Weights and gradients in the training precision; AdamW keeps two fp32 moments (two bytes with
    adamw8bit), and an fp32 master copy where the precision is lower. ZeRO-1 shards the optimizer,
    2 the gradients too, 3 the weights too (Rajbhandari et al. 2020).
    """
    if "fsdp" in config:
        return _fsdp_memory(parameters, config, ranks)
    stage = zero_stage(config)
    size = 4 if precision_of(config) == "fp32" else 2
    host_only = not torch.cuda.is_available()
    adam = (2 if optimizer == "adamw8bit" else 8) + (0 if size == 4 else 4)
    sizes = {}
    for part, total, sharded_from, offloaded in (
        ("weights", parameters * size, 3, "param"),
        ("gradients", parameters * size, 2, "optimizer"),
        ("optimizer", parameters * adam, 1, "optimizer"),
    ):
        local = -(-total // ranks) if stage >= sharded_from else total
        sizes[part] = (0, local) if host_only or offloads(config, offloaded) else (local, 0)
    return sizes


def _fsdp_memory(parameters: int, config: dict[str, Any], ranks: int) -> dict[str, tuple[int, int]]:
    """fp32 shards of the weights, the gradients and AdamW's two moments. Accumulated gradients
    stay whole until the last micro-batch; weights that are not resharded stay whole too."""
    local = -(-parameters // (ranks // config["fsdp"]["replicas"]))
    gathered = 0 if config["fsdp"]["reshard_after_forward"] else parameters
    whole = parameters if config["gradient_accumulation_steps"] > 1 else 0
    sizes = {
        "weights": 4 * local + (4 if precision_of(config) == "fp32" else 2) * gathered,
        "gradients": 4 * (local + whole),
        "optimizer": 8 * local,
    }
    on_device = torch.cuda.is_available()
    return {part: (size, 0) if on_device else (0, size) for part, size in sizes.items()}


def _problems(name: str, problems: list[str]) -> UserError:
    noun = "problem" if len(problems) == 1 else "problems"
    return UserError("\n".join([f"{name}: {len(problems)} {noun}", *(f"  {p}" for p in problems)]))


def _resolve_precision(
    config: dict[str, Any], recipe: Recipe, device: str, problems: list[str]
) -> str:
    wanted = recipe.train.precision
    state = {}
    for p in PRECISIONS:
        if not isinstance(config.get(p, {}), dict):
            problems.append(f'{p}: must be an object such as {{"enabled": true}}')
            config[p] = {}
        state[p] = config.get(p, {}).get("enabled", False if p not in config else None)
        if state[p] is not None and state[p] not in (True, False, "auto"):
            problems.append(f'{p}.enabled: write true, false or "auto", got {state[p]!r}')
        if state[p] is None and config[p]:
            problems.append(f"{p}: says nothing of `enabled`; add it, or remove the block")
        config.get(p, {}).pop("enabled", None)
    explicit = [p for p, enabled in state.items() if enabled is True]
    if len(explicit) > 1:
        problems.append("bf16 and fp16 are both enabled; choose one")
        return "fp32"
    for p in PRECISIONS:
        if wanted == p and state[p] is False and p in config:
            problems.append(f"{p}.enabled: false, but the recipe's train.precision is {p}")
    if explicit and wanted not in ("auto", explicit[0]):
        problems.append(
            f"{explicit[0]}.enabled: true, but the recipe's train.precision is {wanted}; "
            "change one of them"
        )
    if explicit:
        precision = explicit[0]
    elif wanted != "auto":
        precision = wanted
    elif state["bf16"] == "auto" and device == "cuda" and has_bf16():
        precision = "bf16"
    else:
        precision = "fp32"
    if precision == "fp16" and device == "cpu":
        problems.append("fp16: a CPU cannot train in fp16; use bf16 or fp32")
    return precision


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16 itself: older ones emulate it, slower than fp32
    and less exact."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def emulated_bf16(recipe: Recipe, config: dict[str, Any]) -> str | None:
    """What to know where bf16 was asked for and this processor has no arithmetic for it."""
    asked = {"train": precision_of(config), "evaluate": recipe.evaluate.precision}
    keys = [f"{part}.precision" for part, precision in asked.items() if precision == "bf16"]
    slow = slow_bf16("cuda" if torch.cuda.is_available() else "cpu")
    return f"{slow}; {' and '.join(keys)}: fp32 is faster" if slow and keys else None


def slow_bf16(device: str) -> str | None:
    """What is said where a device, "cpu" or "cuda", has no arithmetic for bf16."""
    if has_bf16() if device.startswith("cuda") else cpu_has_bf16():
        return None
    return "bf16 is emulated by this processor, much slower than fp32 (docs/engines.md)"


def cpu_has_bf16() -> bool:
    """Whether oneDNN multiplies matrices in bf16 on this CPU: by AVX-512 or ARM's instructions."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _resolve_batch(config: dict[str, Any], recipe: Recipe, ranks: int, problems: list[str]) -> bool:
    """The recipe's batch, and maybe its micro-batch; numbers in the JSON must agree. Whether the
    batch divides."""
    total, where = recipe.train.batch_size, "train.batch_size"
    micro = recipe.train.micro_batch_size
    given = {
        key: config.get(key, "auto")
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }
    for key, value in given.items():
        if value != "auto" and (type(value) is not int or value < 1):
            problems.append(f'{key}: write a number from 1 on, or "auto", got {value!r}')
            return False
    in_json = given["train_micro_batch_size_per_gpu"]
    if micro is None and in_json != "auto":
        micro, where = in_json, "train_micro_batch_size_per_gpu"
    if micro is None and given["gradient_accumulation_steps"] != "auto":
        micro = max(1, total // (ranks * given["gradient_accumulation_steps"]))
    accumulation = _accumulation(recipe, ranks, micro, where, problems)
    if accumulation is None:
        return False
    micro = recipe.train.micro_batch_size
    _agree(config, "train_batch_size", total, "train.batch_size", problems)
    _agree(config, "train_micro_batch_size_per_gpu", micro, "train.micro_batch_size", problems)
    _agree(
        config,
        "gradient_accumulation_steps",
        accumulation,
        f"train.batch_size / (ranks x micro-batch) = {total} / ({ranks} x {micro})",
        problems,
    )
    return True


def _accumulation(
    recipe: Recipe, ranks: int, micro: int | None, where: str, problems: list[str]
) -> int | None:
    """Micro-batches of a step and rank: batch_size = ranks x micro-batch x accumulation.

    micro: given by `where`; else the recipe's, else as large as the batch allows. The recipe gets
    the micro-batch that was chosen. None, and a problem, where the batch does not divide.
    """
    total = recipe.train.batch_size
    micro = micro or recipe.train.micro_batch_size or max(1, total // ranks)
    if total % (ranks * micro):
        problems.append(
            f"{where}: {total} sequences do not divide into {ranks} rank(s) x micro-batches of "
            f"{micro}; choose train.batch_size a multiple of {ranks * micro}"
        )
        return None
    recipe.train.micro_batch_size = micro
    return total // (ranks * micro)


def _agree(config: dict[str, Any], key: str, value: Any, source: str, problems: list[str]) -> None:
    if config.get(key, "auto") not in ("auto", value):
        problems.append(
            f"{key}: {config[key]}, but the recipe's {source} gives {value}; "
            'write "auto" here or change the recipe'
        )
    config[key] = value


def _check_data_types(config: dict[str, Any], precision: str, problems: list[str]) -> None:
    """What DeepSpeed would find once the model is loaded."""
    types = config.get("data_types")
    if not isinstance(types, dict):
        return
    weights, sums = types.get("param_dtype"), types.get("grad_accum_dtype")
    if weights not in (None, precision):
        problems.append(
            f"data_types.param_dtype: {weights}, but the run trains in {precision}; remove it"
        )
    if zero_stage(config) == 0 and sums not in (None, precision):
        problems.append(
            f"data_types.grad_accum_dtype: {sums}: without ZeRO gradients are summed in "
            f"{precision}; remove it, or set zero_optimization.stage"
        )


def _check_optimizer(config: dict[str, Any], recipe: Recipe, problems: list[str]) -> None:
    block = config.get("optimizer")
    if block is None:
        return
    if not isinstance(block, dict) or str(block.get("type", "AdamW")).lower() != "adamw":
        problems.append(
            'optimizer.type: only "AdamW"; its settings are the recipe\'s `optimizer` '
            "(optimizer.name=adamw8bit for 8-bit moments)"
        )
        return
    for key in sorted(set(block) - {"type", "params"}):
        problems.append(f"optimizer.{key}: unknown key (DeepSpeed would ignore it); remove it")
    o, params = recipe.optimizer, block.pop("params", {})
    if not isinstance(params, dict):
        problems.append('optimizer.params: must be an object such as {"lr": "auto"}')
        return
    values = {"lr": o.lr, "betas": list(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    for key, value in params.items():
        if key not in values:
            problems.append(f"optimizer.params.{key}: takes no effect here; remove it")
        elif value != "auto" and value != values[key]:
            problems.append(
                f"optimizer.params.{key}: {value}, but the recipe's optimizer.{key} is "
                f'{values[key]}; write "auto" here or change the recipe'
            )


def _autos(node: Any, path: str = "") -> list[str]:
    if node == "auto":
        return [path]
    if isinstance(node, dict):
        return [x for k, v in node.items() for x in _autos(v, f"{path}.{k}".lstrip("."))]
    return []


def check_quantized(lora: Lora | None, config: dict[str, Any]) -> None:
    """Raises UserError where the engine cannot shard or offload the quantized base weights."""
    if lora is None or lora.quantize == "none":
        return
    if "fsdp" in config:
        raise UserError(
            "model.lora.quantize: FSDP does not shard quantized weights. Use engine.kind=deepspeed."
        )
    if lora.quantize == "8bit" and zero_stage(config) == 3:
        raise UserError(
            "model.lora.quantize: 8bit does not work under ZeRO-3 (bitsandbytes holds the int8 "
            "weights beside the parameters that ZeRO shards). Use 4bit, or a ZeRO-2 configuration."
        )
    if offloads(config, "param"):
        raise UserError(
            "model.lora.quantize: quantized weights cannot be offloaded "
            "(zero_optimization.offload_param). Remove one of them."
        )


def check_compiled(wanted: bool, config: dict[str, Any]) -> None:
    """Raises UserError where `train.compile` cannot be had."""
    if not wanted:
        return
    if "fsdp" not in config and zero_stage(config) == 3:
        raise UserError(
            "train.compile: ZeRO-3 gathers the weights of every module in hooks, which cannot be "
            "compiled; set it to false, or take ZeRO 0 to 2 or FSDP2"
        )
    check_compiler()
