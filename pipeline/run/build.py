"""The engine of a run, with the weights of a checkpoint."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.checkpoint import is_published
from pipeline.engine.config import precision_of
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine
from pipeline.model.attention import Separation, separation_of
from pipeline.model.load import build_model
from pipeline.model.save import keep_earlier
from pipeline.model.split_linear import set_weights
from pipeline.nodes import send_folder
from pipeline.ranks import on_rank0
from pipeline.recipe import Model, Recipe
from pipeline.run.folder import MASTERS
from pipeline.run.published import read_masters

Engine = ZeroEngine | FsdpEngine


def build_engine(
    recipe: Recipe,
    engine_config: dict[str, Any],
    config: PretrainedConfig,
    checkpoint: str | None,
    split: Callable[..., None] | None = None,
) -> tuple[Engine, Separation]:
    """All ranks call it.

    Args:
        checkpoint: a stage's, or what stage 1 starts from; None: the model as the recipe has it.
        split: `split_for_stage`, but for the model and its separation.

    Returns:
        The engine, and how the model keeps documents apart: known before it is sharded.
    """
    model = recipe.model
    source = checkpoint
    if checkpoint == model.path and starts_elsewhere(model):
        source = None
    if source is not None:
        send_folder(Path(source))
    # In half precision the engine converts weights itself, as it shards them.
    half = precision_of(engine_config) != "fp32"
    net = build_model(model, config, source, recipe.seed, keep_dtype=half)
    keep_earlier(net)
    separation = on_rank0(partial(separation_of, net, recipe))
    exact: Iterable[tuple[str, Tensor]] = ()
    masters = Path(source or "").absolute().with_name(MASTERS)  # of this run, not of another's
    kept = source is not None and on_rank0(partial(is_published, masters))
    if kept:
        send_folder(masters)
        exact = read_masters(masters)
    if split is not None:
        set_weights(net, exact)
        split(net, separation=separation)
        exact, kept = (), False
    if half and not kept:
        exact = _in_fp32(net)  # the engine would make masters of them that are rounded
    kind = FsdpEngine if recipe.engine.kind == "fsdp" else ZeroEngine
    engine = kind(net, engine_config, recipe.optimizer)
    engine.load_weights(exact)
    return engine, separation


def _in_fp32(net: nn.Module) -> list[tuple[str, Tensor]]:
    """The trained weights that are fp32, mapped from their file mostly."""
    trained = [(n, p.detach()) for n, p in net.named_parameters() if p.requires_grad]
    return [(n, w) for n, w in trained if w.dtype == torch.float32]


def starts_elsewhere(model: Model) -> bool:
    """Whether all weights before stage 1 are those of `model.path`."""
    return model.path is not None and not model.initialize_missing
