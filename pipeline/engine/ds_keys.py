"""The keys of a DeepSpeed JSON: which take effect here, at which ZeRO stage, and why others do not.

DeepSpeed accepts misspelt top-level keys without a word, and ignores many known ones where the
stage has no use for them. Here both are errors. Read from DeepSpeed's engine; docs/engines.md says
which version.
"""

import difflib
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

USED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "fp16",
    "bf16",
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "timers",
}
# Those whose value is an object.
OBJECTS = (
    "data_types", "flops_profiler", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor",
    "timers",
)  # fmt: skip
DATA_TYPES = {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}
UNUSED = {
    "scheduler": "the schedule is the recipe's (optimizer.schedule, optimizer.warmup)",
    "activation_checkpointing": "set model.gradient_checkpointing in the recipe",
    "amp": "use bf16 or fp16",
    "torch_autocast": "use bf16 or fp16",
    "curriculum_learning": "the order of the data is the recipe's (stages)",
    "data_efficiency": "the order of the data is the recipe's (stages)",
    "elasticity": "the batch size is the recipe's (train.batch_size)",
    "autotuning": "it starts runs of its own",
    "checkpoint": "checkpoints are published in Hugging Face format",
    "compression_training": "compressed layers are not masked",
    "sparse_gradients": "sparse embedding gradients are not sharded by ZeRO",
    "pipeline": "pipeline parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "managed_gradient_accumulation": "the training loop relies on the default",
    "zero_allow_untested_optimizer": "it is set where optimizer.name needs it",
    "zero_force_ds_cpu_optimizer": "the optimizer is chosen by optimizer.name and the offload",
    "aio": "it is for offload to NVMe, which is not supported",
}
# Settings inside zero_optimization under which the gradient is not where the mask looks for it.
UNSUPPORTED_ZERO = {
    "round_robin_gradients": "DeepSpeed then maps parameters to the wrong master weights at export",
    "zero_quantized_gradients": "ZeRO++ gradients are not tested with the mask",
    "zero_quantized_weights": "ZeRO++ weights are not tested with the mask",
    "zenflow": "ZenFlow selects gradients by itself",
    "mics_shard_size": "MiCS is not tested with the mask",
    "zero_hpz_partition_size": "ZeRO++'s second partition of the weights is not tested with the "
    "mask",
    "legacy_stage1": "DeepSpeed has given it up",
}
# The other keys inside zero_optimization: the stages at which DeepSpeed reads them.
ZERO_STAGES = {
    "stage": (0, 1, 2, 3),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "allgather_bucket_size": (1, 2),
    "ignore_unused_parameters": (1, 2),
    "parameter_alignment": (1, 2),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "overlap_comm": (1, 2, 3),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_module_granularity_threshold": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "stage3_allgather_sequential": (3,),
    "zero_quantized_nontrainable_weights": (3,),
    "memory_efficient_linear": (3,),
    "log_trace_cache_warnings": (3,),
    "enable_sanity_checks": (3,),
    "leaf_module": (3,),
}
_PUBLISHED = "checkpoints are gathered and published in Hugging Face format anyway"
UNUSED_ZERO = {
    "stage3_gather_16bit_weights_on_model_save": _PUBLISHED,
    "stage3_gather_fp16_weights_on_model_save": _PUBLISHED,
    "load_from_fp32_weights": _PUBLISHED,
    "elastic_checkpoint": _PUBLISHED,
    "pipeline_loading_checkpoint": _PUBLISHED,
    "compute_grad_norm": "the run logs the norm, and stops where it is not finite",
    "allgather_partitions": "DeepSpeed no longer reads it",
    "override_module_apply": "weights are sharded block by block here",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "cpu_offload": 'write offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'write offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "write pin_memory inside offload_optimizer or offload_param",
}
OFF: tuple[Any, ...] = (None, False, 0, 1, -1, {})  # under these such a setting does nothing


def engine_problems(config: dict[str, Any]) -> list[str]:
    """Why the mask would not find a DeepSpeed engine's gradients and outputs where it looks.

    config: DeepSpeed's JSON, of an engine that anybody made.
    """
    found = []
    block = config.get("zero_optimization") or {}
    for key, why in UNSUPPORTED_ZERO.items():
        if block.get(key) is True or block.get(key) not in (*OFF, "auto"):
            found.append(f"zero_optimization.{key}: not supported: {why}")
    for what in ("optimizer", "param"):
        offload = block.get(f"offload_{what}") or {}
        if offload.get("device") == "nvme":
            found.append(f"zero_optimization.offload_{what}.device: nvme is not supported; use cpu")
        if offload.get("ratio", 1) != 1:
            found.append(f"zero_optimization.offload_{what}.ratio: only 1 is supported")
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) not in OFF:
        found.append("tensor_parallel: a rank would see a part of each layer's outputs only")
    if config.get("compression_training"):
        found.append(f"compression_training: {UNUSED['compression_training']}")
    kind = str((config.get("optimizer") or {}).get("type", "")).lower()
    if kind.startswith(("onebit", "zeroone")):
        found.append(f"optimizer.type: {kind} steps on gradients that are not reduced")
    return found


def top_level_problems(config: dict[str, Any]) -> list[str]:
    """Keys of the JSON that DeepSpeed or this project would ignore, and blocks that are none."""
    found = []
    for key in OBJECTS:
        if not isinstance(config.get(key, {}), dict):
            found.append(f"{key}: must be an object, got {config[key]!r}")
        elif key == "data_types":
            for other in sorted({*config.get(key, {})} - DATA_TYPES):
                found.append(f"{key}.{other}: unknown key (DeepSpeed would ignore it); remove it")
            for other in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
                if (value := config.get(key, {}).get(other)) not in (None, "fp32", "bf16", "fp16"):
                    found.append(f"{key}.{other}: write fp32, bf16 or fp16, got {value!r}")
    steps = config.get("steps_per_print", "auto")
    if steps != "auto" and (type(steps) is not int or steps < 1):
        found.append(f"steps_per_print: write a number from 1 on, got {steps!r}")
    for key in config:
        if key in UNUSED:
            found.append(f"{key}: takes no effect here: {UNUSED[key]}. Remove it.")
        elif key not in USED:
            close = difflib.get_close_matches(key, USED, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; remove it"
            found.append(f"{key}: unknown key (DeepSpeed would ignore it){hint}")
    return found


def zero_problems(block: dict[str, Any]) -> list[str]:
    """What is wrong inside zero_optimization: unknown keys and values, and keys that would take no
    effect at its stage (where they differ from DeepSpeed's default)."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = [*ZERO_STAGES, *UNUSED_ZERO, *UNSUPPORTED_ZERO]
    found = []
    for key in block:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            found.append(f"zero_optimization.{key}: unknown key{hint}")
    offloads = [k for k in ("offload_optimizer", "offload_param") if k in block]
    if none := [k for k in offloads if not isinstance(block[k] or {}, dict)]:
        example = 'must be an object such as {"device": "cpu"}'
        return [*found, *(f"zero_optimization.{k}: {example}, got {block[k]!r}" for k in none)]
    found += engine_problems({"zero_optimization": block})
    read = {k: v for k, v in block.items() if k in known and k not in UNUSED_ZERO and v != "auto"}
    try:
        DeepSpeedZeroConfig(**read)
    except ValidationError as error:
        return found + _explained(error, "zero_optimization")
    except TypeError as error:  # of leaf_module
        return [*found, f"zero_optimization: {error}"]
    stage = block.get("stage", 0)
    defaults = {f.alias or n: f.default for n, f in DeepSpeedZeroConfig.model_fields.items()}
    for key, value in block.items():
        if value in (defaults.get(key), "auto") or _is_no_offload(key, value):
            continue
        if key in UNUSED_ZERO:
            found.append(
                f"zero_optimization.{key}: takes no effect here: {UNUSED_ZERO[key]}. Remove it."
            )
        elif key in ZERO_STAGES and stage not in ZERO_STAGES[key]:
            stages = ZERO_STAGES[key]
            needs = f"{stages[0]} or more" if stages[-1] == 3 else "1 or 2"
            found.append(f"zero_optimization.{key}: needs stage {needs}, got {stage}")
    return found


def combined_problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration whose keys are all known ones: values that DeepSpeed
    refuses, when the model is loaded or in an assertion, and masters that are not fp32.

    config: without "auto"; the batch of any number of ranks.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    zero, found = config["zero_optimization"], []
    for precision in ("bf16", "fp16"):
        for what in ("master_weights_and_grads", "optimizer_states"):
            if config[precision].get(key := f"{precision}_{what}"):
                found.append(
                    f"{precision}.{key}: checkpoints and later stages go on from weights and "
                    "moments in fp32; remove it"
                )
    if zero.get("stage", 0) >= 2 and zero.get("reduce_scatter", True):
        for key, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if config.get(key, off) != off:
                found.append(
                    f"{key}: DeepSpeed has it from stage 2 on only with "
                    "zero_optimization.reduce_scatter: false; set that, or remove it"
                )
    if found:
        return found
    try:
        DeepSpeedConfig({k: v for k, v in deepcopy(config).items() if k != "train_batch_size"})
    except ValidationError as error:
        return _explained(error, error.title)
    except Exception as error:  # it raises many kinds
        return [f"DeepSpeed refuses it: {error}"]
    return []


def _explained(error: ValidationError, where: str) -> list[str]:
    """where: the block, or DeepSpeed's name of it."""
    return [
        ".".join([where, *map(str, e["loc"])])
        + f": {e['msg']}"
        + (f", got {e['input']!r}" if e["loc"] else "")
        for e in error.errors()
    ]


def _is_no_offload(key: str, value: Any) -> bool:
    return key.startswith("offload_") and (value or {}).get("device", "none") == "none"
