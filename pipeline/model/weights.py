"""Load all of a model's pretrained weights: what transformers fills with random numbers, after a
warning at most, is an error here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import UserError
from pipeline.hub_name import from_hub

POINTER = b"version https://git-lfs"
SHOWN = 6  # names in a message


def load_pretrained(
    auto: Any, source: str | Path, initialize: int | None = None, **options: Any
) -> nn.Module:
    """`auto.from_pretrained(source, **options)`, with every weight from the checkpoint.

    Args:
        auto: one of transformers' AutoModelFor... classes.
        source: a folder or hub id.
        initialize: the seed of the weights that the checkpoint lacks; None refuses them.

    Raises:
        UserError: the checkpoint lacks weights (names them), or with `initialize` lacks none; it
            has weights of another shape than its config.json says; a file is damaged or the
            pointer that Git LFS leaves in its place; no such model.
    """
    require_safetensors(source)

    def load() -> Any:
        if initialize is not None:
            torch.manual_seed(initialize)
        return auto.from_pretrained(
            str(source), output_loading_info=True, ignore_mismatched_sizes=True,
            use_safetensors=True, trust_remote_code=False, **options,
        )  # fmt: skip

    with reading(source), torch.random.fork_rng(devices=[]):
        net, info = from_hub("model", str(source), load)
    if initialize is None:
        require_whole(source, net, info["missing_keys"], info["mismatched_keys"])
        return net
    require_whole(source, net, set(), info["mismatched_keys"])
    if not info["missing_keys"]:
        raise UserError(
            f"model.initialize_missing: has no effect: {source} lacks no weight of "
            f"{type(net).__name__}; remove it"
        )
    return net


def require_whole(
    source: str | Path, net: nn.Module, missing: set[str], mismatched: set[tuple[str, Any, Any]]
) -> None:
    """Raises UserError for what transformers' loading info says of `net`'s weights.

    mismatched: (name, shape in the file, shape in the model).
    """
    kind = type(net).__name__
    if mismatched:
        shapes = [
            f"{name} is {tuple(there)}, should be {tuple(wanted)}"
            for name, there, wanted in sorted(mismatched)
        ]
        raise UserError(
            f"model: {source} has weights of another shape than its configuration says for "
            f"{kind}: {_some(shapes, '; ')}. Correct its configuration (or model.overrides), or "
            "take the weights that belong to it"
        )
    if missing:
        raise UserError(
            f"model: {source} lacks {len(missing)} weight(s) of {kind}: {_some(sorted(missing))}. "
            "Take a checkpoint that has them, or set model.initialize_missing=true to start them "
            "from random numbers"
        )


def check_weights(
    auto: Any, source: str | Path, config: PretrainedConfig, revision: str | None, initialize: bool
) -> None:
    """Whether `load_pretrained` will find every weight, without memory for one.

    Raises:
        UserError: as `load_pretrained`.
    """
    disable_progress_bar()
    if getattr(config, "quantization_config", None) is None:  # those need their own device
        load_pretrained(
            auto,
            source,
            initialize=0 if initialize else None,
            config=config,
            revision=revision,
            device_map="meta",
        )


def _damaged(source: str | Path, error: Exception) -> str:
    """What is wrong with the weights in a folder of which safetensors could not read one file."""
    for file in sorted(Path(source).glob("*.safetensors")):
        with file.open("rb") as content:
            if content.read(len(POINTER)) == POINTER:
                return (
                    f"{file} is a Git LFS pointer, not the weights themselves; run `git lfs pull` "
                    "where it was cloned"
                )
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as damage:
            return f"{file} is damaged, not a whole safetensors file ({damage}); copy it again"
    return f"cannot load {source}: its safetensors are damaged ({error}); download them again"


PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def require_safetensors(source: str | Path) -> None:
    """Raises UserError for a folder that has its weights as pickles only: reading one runs what
    its author put there."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"model: {source} has no safetensors, only pickles ({_some(pickles)}), which can "
                "run code as they are read. Take a checkpoint in safetensors, or convert this one "
                "where you trust it (save_pretrained writes safetensors)"
            )


def why(error: Exception) -> str:
    """transformers' message, with what to do instead of its advice where that is not followed."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it comes with Python code of its own, which is never run here; take a model that "
            "transformers knows by itself"
        )
    if "safetensors" in text and isinstance(error, OSError):
        return (
            "it has no safetensors, and pickles, which can run code, are not read; take a revision "
            "or a checkpoint that has them"
        )
    return text


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Around transformers' own loading: its errors as UserErrors, and without its table of what it
    did not find, which `require_whole` says."""
    loggers = [
        logging.getLogger(f"transformers.{x}") for x in ("modeling_utils", "integrations.peft")
    ]
    for (
        logger
    ) in loggers:  # not by their level: transformers looks at that to decide what it checks
        logger.disabled = True
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"model: {_damaged(source, error)}") from None
    except (OSError, ValueError, ImportError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"model: cannot load {source}: {why(error)}") from None
    finally:
        for logger in loggers:
            logger.disabled = False
