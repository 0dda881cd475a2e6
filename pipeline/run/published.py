"""What a run publishes of a model, and what it keeps beside it to continue exactly."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import is_published, publish, verify
from pipeline.errors import UserError
from pipeline.methods.method import Method
from pipeline.model.save import adapter_names, as_kept, has_adapter, save_model, save_tensors
from pipeline.model.split_linear import is_split, merge_weights
from pipeline.progress import now
from pipeline.ranks import on_rank0, rank


def publish_model(
    target: Path,
    engine: Any,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    info: dict[str, Any],
    methods: Sequence[Method] = (),
) -> None:
    """Publish the engine's model (or adapter) in Hugging Face format, with what the methods add.
    All ranks call it.

    Weights are gathered one by one and written by rank 0 as they come.
    """

    def write(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        save_model(engine.module, weights, folder, dtype)
        tokenizer.save_pretrained(folder)
        for method in methods:
            method.add_files(folder)

    adapter = adapter_names(engine.module) if has_adapter(engine.module) else None
    weights = merge_weights(engine.module, engine.full_weights(names=adapter))
    weights = as_kept(engine.module, weights)
    _publish(target, write, weights, {**info, "published": now()})


def publish_masters(target: Path, engine: Any, info: dict[str, Any]) -> None:
    """Keep the trained weights in fp32, by parameter name. All ranks call it."""
    weights = engine.full_weights(trained=not is_split(engine.module))
    _publish_in_fp32(target, merge_weights(engine.module, weights), info)


def publish_trained(target: Path, engine: Any, info: dict[str, Any]) -> None:
    """The same, of a split model its trained parts: what the engine takes back within a stage."""
    _publish_in_fp32(target, engine.full_weights(trained=True), info)


def _publish_in_fp32(
    target: Path, weights: Iterator[tuple[str, Tensor]], info: dict[str, Any]
) -> None:
    def write(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        save_tensors(((n, w.to("cpu", torch.float32)) for n, w in weights), folder, "masters")

    _publish(target, write, weights, info)


def check_masters(folder: Path) -> None:
    """Raises UserError, on every rank, where what `publish_masters` kept is gone or damaged."""
    if not on_rank0(partial(is_published, folder)):
        raise UserError(
            f"{folder} is gone: the fp32 weights from which the next stage continues (what is "
            "published has a lower precision). Put it back, or start again with --restart."
        )
    on_rank0(partial(verify, folder))


def read_masters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What `publish_masters` kept, by parameter name, mapped from the files."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                yield name, tensors.get_tensor(name)


def remove(folder: Path) -> None:
    """Delete a folder that may not be there. All ranks call it."""
    on_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))


def _publish(
    target: Path,
    write: Callable[[Path, Iterable[tuple[str, Tensor]]], None],
    weights: Iterator[tuple[str, Tensor]],
    info: dict[str, Any],
) -> None:
    """`weights` gathers over all ranks: each of them goes through to its end, whatever happens to
    rank 0 while it writes."""

    def write_and_drain() -> None:
        try:
            publish(target, lambda folder: write(folder, weights), info)
        finally:
            _drain(weights)

    if rank() != 0:
        _drain(weights)
    on_rank0(write_and_drain)


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass
