"""What a rank needs memory for, estimated from the model without its weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.config import DTYPES, memory_per_rank, offloads, precision_of, zero_stage
from pipeline.engine.optimizer import zero_groups
from pipeline.migu.mask import kept_count
from pipeline.migu.targets import find_targets
from pipeline.model.blocks import block_linears, find_blocks, linears_and_experts
from pipeline.model.chunked_loss import CHUNK
from pipeline.model.split_linear import is_split, split_linears
from pipeline.model.stacked_experts import can_observe, look_away, observe
from pipeline.recipe import Lora, Recipe
from pipeline.run.methods import methods_of
from pipeline.run.stage_rows import split_stage

Sizes = dict[str, tuple[int, int]]  # part -> bytes on (device, host)
BUCKET = 500_000_000  # elements: DeepSpeed's default


def split_as_in_training(model: nn.Module, recipe: Recipe) -> None:
    """With `mask.refresh: stage`: as in a stage that is masked. The rows are any; their number is
    that of the training."""
    k = recipe.mask
    if split_stage(recipe, len(recipe.stages)) is None:
        return
    rows = {}
    for target in find_targets(model, k.components, k.split_fused):
        parts = [torch.arange(p) < kept_count(p, k.threshold, k.rule) for p in target.parts]
        rows[target.name] = torch.cat(parts)
    split_linears(model, rows)


def estimate(model: nn.Module, recipe: Recipe, engine_config: dict[str, Any], ranks: int) -> Sizes:
    """
    Args:
        model: `empty_model`, split where training splits it.
    """
    size = 4 if precision_of(engine_config) == "fp32" else 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes: Sizes = memory_per_rank(trained, engine_config, ranks, recipe.optimizer.name)
    if frozen := _frozen_bytes(model, recipe.model.lora, size):
        like_weights = memory_per_rank(round(frozen / size), engine_config, ranks)["weights"]
        sizes = {"frozen": like_weights, **sizes}
    if methods := _methods(model, recipe, engine_config, ranks, trained, size):
        sizes["methods"] = methods
    accumulation = engine_config["gradient_accumulation_steps"]
    k = recipe.mask
    deferred = accumulation if k.enabled and k.backward == "row_sparse" else 1
    on_device = torch.cuda.is_available()
    count = activations(model, recipe, precision_of(engine_config), deferred)
    if count is not None:
        sizes["activations"] = (count, 0) if on_device else (0, count)
    # The weights are updated when the activations are gone.
    count = _update(model, engine_config, size, ranks) - (count or 0)
    if count > 0:
        sizes["update"] = (count, 0) if on_device else (0, count)
    count = _buffers(model, engine_config, size)
    sizes["buffers"] = (count, 0) if on_device else (0, count)
    return sizes


def _methods(
    model: nn.Module, recipe: Recipe, config: dict[str, Any], ranks: int, trained: int, size: int
) -> tuple[int, int] | None:
    """What methods keep for each trained weight, and their frozen copies of the model."""
    methods = methods_of(recipe)
    kept, copies = sum(m.kept_weights for m in methods), sum(m.live_teacher for m in methods)
    # As the moments of AdamW, of which there are two, and as the weights.
    device, host = (kept * part // 2 for part in _moments(trained, config, ranks))
    if copies:
        weights = sum(p.numel() for p in model.parameters())
        sharded = "fsdp" in config or zero_stage(config) == 3
        copy = copies * size * (-(-weights // ranks) if sharded else weights)
        on_device = torch.cuda.is_available() and not offloads(config, "param")
        device, host = (device + copy, host) if on_device else (device, host + copy)
    return (device, host) if device or host else None


def _moments(trained: int, config: dict[str, Any], ranks: int) -> tuple[int, int]:
    """Bytes of AdamW's two moments in fp32."""
    if "fsdp" in config:
        return memory_per_rank(trained, config, ranks)["optimizer"]
    master = 0 if precision_of(config) == "fp32" else 4
    device, host = memory_per_rank(trained, config, ranks)["optimizer"]
    return device * 8 // (8 + master), host * 8 // (8 + master)


def _frozen_bytes(model: Any, lora: Lora | None, size: int) -> float:
    """Of the weights that are not trained; `size`: bytes of one that is not quantized."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if lora is None:
        return frozen * size
    bytes_of = {"none": size, "8bit": 1, "4bit": 0.5 + 4 / 64}  # nf4: an fp32 scale per 64
    linears: list[Any] = [m for _, m in block_linears(model, experts=True)]
    quantized = sum(getattr(m, "base_layer", m).weight.numel() for m in linears)
    return (frozen - quantized) * size + quantized * bytes_of[lora.quantize]


def _buffers(model: nn.Module, config: dict[str, Any], size: int) -> int:
    """What the engine reduces and gathers in: ZeRO's buckets; the weights of two blocks where
    weights are sharded, and of FSDP their gradients too."""
    blocks = [model.get_submodule(n) for n in find_blocks(model)]
    largest = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    if "fsdp" in config:
        return largest * (2 * size + 4)
    zero = config.get("zero_optimization", {})
    stage = zero_stage(config)
    bucket = int(zero.get("reduce_bucket_size", BUCKET)) if stage else 0
    if not torch.cuda.is_available():  # of the host's memory only what is written to is taken
        bucket = min(bucket, sum(p.numel() for p in model.parameters() if p.requires_grad))
    twice = 2 if zero.get("overlap_comm", stage == 3) else 1
    return bucket * size * twice + (2 * largest * size if stage == 3 else 0)


def _update(model: nn.Module, config: dict[str, Any], size: int, ranks: int) -> int:
    """Under ZeRO-1 and 2: the gradient of a group of weights in one piece, and in fp32 beside half
    precision."""
    if "fsdp" in config or zero_stage(config) not in (1, 2) or offloads(config, "optimizer"):
        return 0
    groups = zero_groups(model, 0.0, zero_stage(config))
    largest = max((sum(p.numel() for p in g["params"]) for g in groups), default=0)
    return -(-largest // ranks) * (size if size == 4 else size + 4)


def activations(model: nn.Module, recipe: Recipe, precision: str, deferred: int = 1) -> int | None:
    """Bytes at the peak of a micro-batch: what its forward keeps for the backward, or the inputs of
    the blocks and what one of them keeps where they are checkpointed; and the logits with their
    gradients.

    Args:
        model: on the meta device: its forward is run there, which takes neither time nor memory.
        deferred: micro-batches whose forwards come before the first backward.

    Returns:
        None where the model does not run on the meta device.
    """
    dtype = DTYPES[precision]
    sequences = recipe.train.micro_batch_size or recipe.train.batch_size
    shape = (sequences, recipe.data.sequence_length)
    blocks = {n: model.get_submodule(n) for n in find_blocks(model)}
    try:
        kept, inputs, vocabulary = _kept_by(model, blocks, shape, dtype)
    except Exception:  # of the model's own code, which asks a tensor for its values, say
        return None
    outside = kept.pop("", 0)
    if recipe.model.gradient_checkpointing:
        held, once = outside + sum(inputs.values()), max(kept.values(), default=0)
    else:
        held, once = outside + sum(kept.values()), 0
    predicted = _predicted(recipe)
    if recipe.train.chunked_loss:
        predicted = min(predicted, max(1, CHUNK // max(1, vocabulary)))
    # In the training dtype and in fp32, each with its gradient; log-softmax is fp32 too.
    logits = predicted * vocabulary * (2 * dtype.itemsize * (dtype.itemsize < 4) + 3 * 4)
    return round(held * deferred + once + logits)


def _predicted(recipe: Recipe) -> float:
    """Tokens of a micro-batch that are predicted."""
    sequences = recipe.train.micro_batch_size or recipe.train.batch_size
    share = recipe.data.masking if recipe.model.objective == "masked" else 1.0
    return sequences * recipe.data.sequence_length * share


def _width(model: Any) -> int:
    """Of the logits; 0 without a head."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else 0


def _kept_by(
    model: nn.Module, blocks: dict[str, nn.Module], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int], int]:
    """(bytes kept for the backward by block, "" outside of them; bytes of each block's input; the
    width of the logits) of a forward of [sequences, length] without checkpointing."""
    own: set[int] = set()
    kept: dict[str, int] = {}
    inputs: dict[str, int] = {}
    seen: set[int] = set()
    tensors: list[Tensor] = []  # a storage that is gone might lend its address to another
    where = [""]

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own and address not in seen:
            seen.add(address)
            tensors.append(tensor)
            kept[where[-1]] = kept.get(where[-1], 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            where.append(name)
            hidden = next(t for t in [*args, *kwargs.values()] if isinstance(t, Tensor))
            inputs[name] = hidden.numel() * hidden.element_size()

        return hook

    def leave(*_: Any) -> None:
        where.pop()

    hooks: list[Any] = []
    for name, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(enter(name), with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:  # the logits are counted apart
        hooks.append(head.register_forward_pre_hook(lambda _m, x: (x[0][:, :1], *x[1:])))
    width = _width(model)
    mixtures = [m for _, m in linears_and_experts(model) if can_observe(m)]
    before = {p: p.data for p in model.parameters()}
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    two_sides = getattr(model.config, "is_encoder_decoder", False)
    also = {"decoder_input_ids": ids} if two_sides else {}
    try:
        for p in before:
            if p.is_floating_point():
                p.data = p.data.to(dtype)
        for experts in mixtures:  # the library's do not run there
            observe(experts, lambda *_: None)
        own |= {t.untyped_storage()._cdata for t in (*before, *model.buffers())}
        with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(input_ids=ids, **also)  # kept until all is counted
        del output
    finally:
        for p, data in before.items():
            p.data = data
        for experts in mixtures:
            look_away(experts)
        for hook in hooks:
            hook.remove()
    return kept, inputs, width


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values, outputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch takes attention apart into products, and would keep the weights of
    all pairs of tokens."""
    library = F.scaled_dot_product_attention

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = library


def memory_lines(
    model: nn.Module, recipe: Recipe, engine_config: dict[str, Any], ranks: int
) -> list[str]:
    """The estimate as text, and what to change where it does not fit the GPU that is here."""
    sizes = estimate(model, recipe, engine_config, ranks)
    device, host = (sum(s[i] for s in sizes.values()) for i in (0, 1))
    without = "" if "activations" in sizes else ", without activations (this model does not tell)"
    lines = [f"memory per rank, estimated{without}"]
    for name, (on_device, on_host) in sizes.items():
        where = "on the GPU" if on_device else "on the host"
        lines.append(f"  {name:<12}{(on_device or on_host) / 1e9:9.3f} GB {where}")
    lines.append(
        f"  {'total':<12}{device / 1e9:9.3f} GB on the GPU, {host / 1e9:.3f} GB on the host"
    )
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        needed, what = device, "a GPU"
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed, what = (device + host) * ranks, f"{ranks} rank(s) in the memory of this machine,"
    if needed > 0.95 * there:
        lines.append(
            f"  does not fit {what} of {there / 1e9:.0f} GB: "
            + "; ".join(advice_on_memory(model, recipe, engine_config, ranks))
        )
    return lines


def advice_on_memory(
    model: nn.Module, recipe: Recipe, engine_config: dict[str, Any], ranks: int
) -> list[str]:
    """What would take less memory and is not done yet, in the order in which to try it."""
    found = []
    if not recipe.model.gradient_checkpointing:
        found.append("set model.gradient_checkpointing=true")
    if (recipe.train.micro_batch_size or 2) > 1:
        found.append("lower train.micro_batch_size")
    if not recipe.train.chunked_loss and _predicted(recipe) * _width(model) > CHUNK:
        found.append("set train.chunked_loss=true")
    if recipe.model.lora is None and not is_split(model):
        found.append("set mask.refresh=stage (trains the kept rows alone) or model.lora={}")
    if ranks > 1 and "fsdp" not in engine_config and zero_stage(engine_config) < 3:
        found.append("take ds_configs/zero3.json")
    found.append("use more GPUs, or a configuration with offload")
    return found
