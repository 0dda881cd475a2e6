"""Write a model's weights in Hugging Face format as they come, one after another.

Neither the model nor its state_dict need to be anywhere as a whole: an engine gathers a weight, it
is converted and written, and the next one follows.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from pipeline.model.blocks import find_blocks
from pipeline.model.composed_lora import composition_names, composition_of, save_composed
from pipeline.model.lora import EARLIER, WEIGHTS, one_adapter
from pipeline.model.moe_lora import has_routers, save_moe_lora
from pipeline.model.prompt import prompt_names, prompt_of, save_prompt

SHARD_BYTES = 2_000_000_000


def save_model(
    module: Any,
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what `module.save_pretrained` writes, with these weights instead of the module's.

    Args:
        module: a transformers model, whose own weights may be sharded; with an adapter or a
            prompt, that alone is written, as PEFT does.
        weights: every parameter whole, in the order of `module.named_parameters()`, tied ones once;
            of an adapted model the adapter's.
        dtype: of the written weights.

    Memory: the weights of one block and one file of at most `shard_bytes`, or one larger weight.
    """
    if prompt_of(module) is not None:
        save_prompt(module, weights, folder, dtype)
        return
    if has_routers(module):
        save_moe_lora(module, weights, folder, dtype)
        return
    if composition_of(module) is not None:
        save_composed(module, weights, folder, dtype)
        return
    if has_adapter(module) and EARLIER in module.peft_config:
        settings, joined = one_adapter(module, weights)
        settings.inference_mode = True
        settings.save_pretrained(folder)
        named = {
            f"base_model.model.{n.replace('.default.', '.')}": w.to("cpu", dtype).contiguous()
            for n, w in joined
        }
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
        return
    if has_adapter(module):
        module.save_pretrained(folder, state_dict={n: w.to("cpu", dtype) for n, w in weights})
        return
    module.save_pretrained(folder, state_dict={})  # all but the weights
    module.config.dtype = dtype  # of the file; transformers names the module's
    module.config.save_pretrained(folder)
    save_tensors(_as_in_files(module, weights, dtype), folder, "model", shard_bytes)


def adapter_names(module: Any) -> list[str]:
    """The parameters of a model's adapters or prompt, also of those that are frozen."""
    adapters = [n for n, _ in module.named_parameters() if ".lora_" in n]
    return prompt_names(module) or [*adapters, *composition_names(module)]


def keep_earlier(module: Any) -> None:
    """Keep what earlier stages have published of a model that trains an adapter or a prompt of its
    own in each stage, as it is before an engine takes the model in half precision."""
    module.earlier_exact = {
        n: p.detach().to("cpu", copy=True)
        for n, p in module.named_parameters()
        if f".{EARLIER}." in n or n in ("composition.earlier", "soft_prompt.earlier")
    }


def as_kept(module: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the engine's, but what `keep_earlier` has kept as it was."""
    kept = getattr(module, "earlier_exact", {})
    return ((n, kept[n].to(w.device) if n in kept else w) for n, w in weights)


def has_adapter(module: Any) -> bool:
    """Or a prompt: what is published is not the whole model."""
    return getattr(module, "_hf_peft_config_loaded", False) or prompt_of(module) is not None


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `<stem>.safetensors`; or several such files and their index, as transformers names
    them, where one would have more than `shard_bytes`."""
    written: list[list[str]] = []
    total = size = 0
    held: dict[str, Tensor] = {}

    def write() -> None:
        save_file(held, folder / f"{stem}-{len(written)}.part", metadata={"format": "pt"})
        written.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if held or not written:
        write()
    places: dict[str, str] = {}
    for i, names in enumerate(written):
        part = f"-{i + 1:05d}-of-{len(written):05d}" if len(written) > 1 else ""
        (folder / f"{stem}-{i}.part").rename(folder / f"{stem}{part}.safetensors")
        places |= dict.fromkeys(names, f"{stem}{part}.safetensors")
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _as_in_files(
    module: Any, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """On the CPU, under the names and in the shapes of the model's files: what transformers merged
    or renamed at loading is undone, a block at a time."""
    blocks = tuple(f"{name}." for name in find_blocks(module))
    ignored = set(module._keys_to_ignore_on_save or ())

    def block(item: tuple[str, Tensor]) -> str:
        return next((b for b in blocks if item[0].startswith(b)), "")

    for _, group in groupby(weights, key=block):
        part = {n: w.to("cpu", dtype) for n, w in group if n not in ignored}
        yield from revert_weight_conversion(module, part).items()
    persistent = module.state_dict().keys() - ignored
    buffers = {n: b.detach().cpu() for n, b in module.named_buffers() if n in persistent}
    yield from revert_weight_conversion(module, buffers).items()
