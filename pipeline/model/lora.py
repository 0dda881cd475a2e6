"""LoRA adapters (Hu et al. 2022) through PEFT, over plain or quantized base weights (docs/lora.md).

The adapter lives in the transformers model itself (`PreTrainedModel.add_adapter`), without PEFT's
wrapper around it: modules keep their names and the model keeps its class. PEFT is imported only
where an adapter is used: with bitsandbytes it takes seconds.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.model.blocks import block_linears
from pipeline.model.weights import reading, require_safetensors, require_whole
from pipeline.recipe import Lora
from pipeline.yaml_file import Loader, read_yaml

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # an adapter's files
EARLIER = "earlier"  # the name of the frozen adapters of the stages before, as one
# PEFT's names by objective; it has none for masked language models.
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def is_adapter(folder: str | Path | None) -> bool:
    """Whether `folder` holds an adapter in PEFT's format, not a whole model."""
    return folder is not None and (Path(folder) / ADAPTER).is_file()


def recorded(adapter: str | Path) -> dict[str, Any]:
    """What an adapter's configuration says, of whatever kind it is."""
    return json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8"))


def base_of(adapter: str | Path) -> tuple[str, str | None]:
    """The base model (folder or hub id) and its revision, as the adapter's configuration has them.

    In a run's folder, which may have been moved, the base is the run's: its own stage 0 where it
    built its model, else the folder that its recipe names now.

    Raises:
        UserError: no base is recorded, or its folder is gone.
    """
    settings = recorded(adapter)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise UserError(f"{adapter}: {ADAPTER} names no base model (base_model_name_or_path)")
    if Path(base).is_absolute():
        places = [*_bases_of_run(Path(adapter), Path(base)), Path(base)]
        there = next((place for place in places if place.exists()), None)
        if there is None:
            raise UserError(
                f"{adapter}: its base model {base} is gone; put it back, or correct "
                f"base_model_name_or_path in {ADAPTER}"
            )
        base = str(there)
    return base, revision


def _bases_of_run(adapter: Path, recorded_base: Path) -> list[Path]:
    """Where the base lies now, as the run says in whose folder the adapter lies."""
    stages = next((p for p in adapter.resolve().parents if p.name == "stages"), None)
    if stages is None:
        return []
    own = Path("00_base", "checkpoint")
    built = [stages / own] if recorded_base.parts[-2:] == own.parts else []
    recipe = stages.with_name("recipe.yaml")
    known = yaml.load(read_yaml(recipe), Loader) if recipe.is_file() else None
    model = (known or {}).get("model") or {}
    path = None if model.get("initialize_missing") else model.get("path")
    # A run goes on only where these are the files that it began with.
    return built + ([Path(path).resolve()] if path and Path(path).is_dir() else [])


def as_recorded(base: str | None) -> str | None:
    """How a configuration names a base model: a folder by its absolute path."""
    return str(Path(base).resolve()) if base is not None and Path(base).exists() else base


def adapted_linears(net: nn.Module, lora: Lora) -> list[str]:
    """Names of the modules that get an adapter: the block linears, or those that `targets` names.

    Raises:
        UserError: a target that is no linear layer of a block; experts in a 3-D parameter where
            `targets` does not say what to adapt.
    """
    linears = dict(block_linears(net, experts=lora.targets is not None))
    if lora.targets is None:
        return list(linears)
    for suffix in lora.targets:
        if not any(f".{name}".endswith(f".{suffix}") for name in linears):
            last = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"model.lora.targets: no linear layer in a block of {type(net).__name__} is named "
                f"{suffix!r}; there are {', '.join(last)}"
            )
    return [n for n in linears if any(f".{n}".endswith(f".{s}") for s in lora.targets)]


def add_adapter(
    net: nn.Module,
    lora: Lora,
    base: str | None,
    revision: str | None,
    task_type: str | None,
    seed: int,
    name: str = "default",
) -> None:
    """Freeze `net` and give it a new adapter: A random from `seed`, B zero (so it changes nothing).

    task_type: PEFT's, of TASK_TYPES.
    base: what the adapter's configuration records; a folder becomes an absolute path.
    """
    names = adapted_linears(net, lora)
    transposed = isinstance(net.get_submodule(names[0]), Conv1D)
    settings = _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        revision=revision,
        task_type=task_type,
    )
    with torch.random.fork_rng(devices=[]):  # the same A on every rank
        torch.manual_seed(seed)
        net.add_adapter(settings, name)  # type: ignore[operator]
    settings.base_model_name_or_path = as_recorded(base)
    # PEFT keeps a set; sorted, the published file is the same in every run.
    settings.target_modules = sorted(settings.target_modules)  # type: ignore[arg-type]


def add_beside(net: Any, adapter: str | Path, lora: Lora, task_type: str | None, seed: int) -> None:
    """Load what the stages before have published, frozen, and add a new adapter to be trained
    beside it: the layer's output is the sum of both (IncLoRA)."""
    load_adapter(net, adapter, EARLIER, torch.float32)
    train_beside(net, lora, task_type, seed)


def train_beside(net: Any, lora: Lora, task_type: str | None, seed: int) -> None:
    """Add a new adapter to be trained beside `EARLIER`, which is frozen."""
    earlier = net.peft_config[EARLIER]
    base, revision = earlier.base_model_name_or_path, earlier.revision
    with warnings.catch_warnings():  # that there is an adapter already
        warnings.simplefilter("ignore", UserWarning)
        add_adapter(net, lora, base, revision, task_type, seed * 1009 + earlier.r)
    net.set_adapter([EARLIER, "default"])
    for name, p in net.named_parameters():
        p.requires_grad_(".lora_" in name and ".default." in name)


def one_adapter(
    net: Any, weights: Iterable[tuple[str, Tensor]]
) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """(configuration, weights) of the adapter that changes the model as the earlier ones and the
    new one do together: their A below, their B beside each other.

    weights: of both, by the names of the model's parameters.
    """
    earlier, new = net.peft_config[EARLIER], net.peft_config["default"]
    settings = deepcopy(new)
    settings.r = earlier.r + new.r
    settings.lora_alpha = new.lora_alpha * settings.r // new.r  # r is a multiple of a stage's
    return settings, _joined(weights)


def _joined(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    waiting: dict[str, Tensor] = {}
    for name, weight in weights:
        earlier = f".{EARLIER}." in name
        key = name.replace(f".{EARLIER}.", ".default.")
        if key not in waiting:
            waiting[key] = weight.clone()
            continue
        other = waiting.pop(key)
        pair = (weight, other) if earlier else (other, weight)
        yield key, torch.cat(pair, dim=0 if ".lora_A." in key else 1)


def load_adapter(
    net: Any, adapter: str | Path, name: str = "default", dtype: torch.dtype | None = None
) -> None:
    """Load a published adapter into its base model, to be trained on.

    dtype: of its weights; None: the base's, which may hold less than the file does.

    Raises:
        UserError: its base is gone; it lacks weights, or they are damaged.
    """
    _peft()
    net.requires_grad_(False)
    base, revision = base_of(adapter)
    require_safetensors(adapter)
    with reading(adapter), warnings.catch_warnings():  # that there is an adapter already
        warnings.simplefilter("ignore", UserWarning)
        info = net.load_adapter(
            str(adapter),
            adapter_name=name,
            is_trainable=True,
            adapter_kwargs={"revision": None},
            ignore_mismatched_sizes=True,
            dtype_plan={} if dtype is None else {"lora_": dtype},
        )
    missing = {key for key in info.missing_keys if f".{name}." in key}  # not those of others
    require_whole(adapter, net, missing, info.mismatched_keys)
    settings = net.peft_config[name]
    settings.base_model_name_or_path, settings.revision = base, revision
    settings.target_modules = sorted(settings.target_modules)


def write_adapter(
    folder: Path,
    settings: Any,
    content: dict[str, Any],
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write an adapter that PEFT has not: `content`, with a `peft_type` that it refuses, and what
    PEFT's `settings` say; the weights by the names of the model's parameters."""
    content = {
        **content,
        "base_model_name_or_path": settings.base_model_name_or_path,
        "revision": settings.revision,
        "r": settings.r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "targets": sorted(settings.target_modules),
    }
    (folder / ADAPTER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    named = {n: w.to("cpu", dtype).contiguous() for n, w in weights}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(adapter: str | Path) -> dict[str, Tensor]:
    """The weights that `write_adapter` wrote.

    Raises:
        UserError: they are gone or damaged.
    """
    try:
        return load_file(Path(adapter) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{Path(adapter) / WEIGHTS}: cannot be read ({error})") from None


def fill_adapter(
    net: nn.Module,
    found: dict[str, Tensor],
    adapter: str | Path,
    dtype: torch.dtype | None,
    name: str = "default",
) -> None:
    """Put what `read_adapter` found into the adapter `name`. dtype: as of `load_adapter`.

    Raises:
        UserError: it is of another model.
    """
    own = {n: p for n, p in net.named_parameters() if ".lora_" in n and f".{name}." in n}
    found = {n.replace(".default.", f".{name}."): w for n, w in found.items()}
    if own.keys() != found.keys() or any(own[n].shape != w.shape for n, w in found.items()):
        raise UserError(
            f"{adapter}: its weights are not those of an adapter of {base_of(adapter)[0]}"
        )
    for key, weight in found.items():
        own[key].data = weight.to(own[key].device, dtype or own[key].dtype)


def quantized_loading(lora: Lora | None, device: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the base weights, on `device` (default: the
    rank's); {} where none are.

    4bit: bitsandbytes' nf4 (Dettmers et al. 2023); 8bit: LLM.int8() (Dettmers et al. 2022).
    """
    if lora is None or lora.quantize == "none":
        return {}
    _peft()
    if lora.quantize == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    if device is None:
        cuda = torch.cuda.is_available()
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def prepare_4bit(net: nn.Module) -> None:
    """Let 4-bit layers compute in the dtype of their inputs (transformers fixes fp32), and have
    gradients behind an evaluation too: on a CPU with AVX512-BF16 bitsandbytes would repack their
    weights there for a kernel that has none, and training would go on with it."""
    layers: list[Any] = [m for m in net.modules() if hasattr(m, "compute_type_is_set")]
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = None, False
        layer.support_avx512bf16_for_cpu = False


def _peft() -> Any:
    # On CPU bitsandbytes, which PEFT imports, says that an optional faster kernel is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import peft

    return peft
