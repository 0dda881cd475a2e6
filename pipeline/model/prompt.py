"""Soft prompts (Lester et al. 2021, arXiv 2104.08691) in PEFT's format, the model itself frozen.

The prompt is a table of vectors that the input embeddings look up for ids behind the vocabulary.
Every document begins with these ids (`SoftPrompt.before`, of one document a row), so that to the
rest of the code a prompt is a few tokens more. With earlier prompts (Razdaibiedina et al. 2023,
arXiv 2301.12314) the newest stands first.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.data.mlm import IGNORED
from pipeline.errors import UserError
from pipeline.model.lora import TASK_TYPES, WEIGHTS, as_recorded, base_of, recorded
from pipeline.recipe import Prompt

KIND = "PROMPT_TUNING"  # PEFT's name
KEY = "prompt_embeddings"  # in that file: [tokens, hidden]


class SoftPrompt(nn.Module):
    """The vectors in front of a text: `new` fp32 [tokens, hidden], trained; behind them `earlier`
    [tokens, hidden] (None: there are none), frozen.

    first: the id of the first one. base, revision: of the model that it belongs to.
    """

    def __init__(self, new: Tensor, earlier: Tensor | None, first: int):
        super().__init__()
        self.new = nn.Parameter(new)
        self.earlier = None if earlier is None else nn.Parameter(earlier, requires_grad=False)
        self.first, self.on = first, True
        self.tokens = len(new) + (0 if earlier is None else len(earlier))
        self.base: str | None = None
        self.revision: str | None = None

    def forward(self, places: Tensor) -> Tensor:
        """The vectors at some places of the prompt."""
        parts: list[Tensor] = [p for p in (self.new, self.earlier) if p is not None]
        return torch.cat(parts)[places]

    @property
    def ids(self) -> np.ndarray:
        """What a text begins with, int64 [tokens]; none while it is off."""
        return np.arange(self.first, self.first + self.tokens if self.on else self.first)

    def before(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `collate`, of one document a row, with the prompt in front of each."""
        ids = torch.from_numpy(self.ids).to(batch["labels"].device)
        out = {}
        for name, tensor in batch.items():
            front = tensor[:, :1].expand(-1, len(ids))
            if name == "input_ids":
                front = ids.expand_as(front)
            elif name == "labels":
                front = torch.full_like(front, IGNORED)
            out[name] = torch.cat([front, tensor], dim=1)
        return out


def prompt_of(net: Any) -> SoftPrompt | None:
    """The prompt of a model, sharded or not."""
    return getattr(net, "soft_prompt", None)


@contextmanager
def without_prompt(net: Any) -> Iterator[None]:
    """The base alone; where the model has no prompt, nothing changes."""
    prompt = prompt_of(net)
    if prompt is not None:
        prompt.on = False
    try:
        yield
    finally:
        if prompt is not None:
            prompt.on = True


def is_prompt(adapter: str | Path) -> bool:
    """Whether an adapter's folder (`lora.is_adapter`) holds a prompt."""
    return recorded(adapter).get("peft_type") == KIND


def add_prompt(
    net: Any, settings: Prompt, base: str | None, revision: str | None, seed: int,
    earlier: Tensor | None = None,
) -> None:  # fmt: skip
    """Freeze `net` and give it a new prompt, of vectors of its vocabulary drawn by `seed`."""
    table: Tensor = net.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(table), (settings.tokens,), generator=generator)
    new = table.detach()[rows.to(table.device)].float().clone()
    _attach(net, new, earlier, base, revision)


def load_prompt(net: Any, adapter: str | Path, settings: Prompt | None, seed: int) -> None:
    """Give `net` a published prompt, to be trained on; of progressive prompts a new one before it.

    settings: of the recipe; None reads it for evaluation.

    Raises:
        UserError: its base is gone; it is damaged, or of another model.
    """
    base, revision = base_of(adapter)
    try:
        found = load_file(Path(adapter) / WEIGHTS)[KEY].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{Path(adapter) / WEIGHTS}: no prompt can be read ({error})") from None
    width = net.get_input_embeddings().weight.shape[1]
    if found.shape[1] != width:
        raise UserError(f"{adapter}: its vectors have {found.shape[1]} numbers, the model {width}")
    if settings is not None and settings.progressive:
        add_prompt(net, settings, base, revision, seed * 1009 + len(found), earlier=found)
    else:
        _attach(net, found, None, base, revision)


def _attach(
    net: Any, new: Tensor, earlier: Tensor | None, base: str | None, revision: str | None
) -> None:
    reader = net.get_encoder() if net.config.is_encoder_decoder else net
    table = reader.get_input_embeddings()
    net.requires_grad_(False)
    prompt = SoftPrompt(new, earlier, first=table.num_embeddings)
    prompt.base, prompt.revision = as_recorded(base), revision
    net.soft_prompt = prompt
    look_up = table.forward

    def forward(ids: Tensor) -> Tensor:
        places = ids - prompt.first
        embedded = look_up(ids.where(places < 0, 0))
        ours = prompt(places.clamp(min=0)).to(embedded.dtype)
        return embedded.where(places[..., None] < 0, ours)

    table.forward = forward


def prompt_names(net: Any) -> list[str]:
    """Its parameters, also those that are frozen."""
    return [n for n, _ in net.named_parameters() if n.startswith("soft_prompt.")]


def save_prompt(
    net: Any, weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> None:
    """Write the prompt, new and earlier, as PEFT does. weights: those of `prompt_names`."""
    from peft import PromptTuningConfig

    prompt = net.soft_prompt
    PromptTuningConfig(
        task_type=TASK_TYPES["seq2seq" if net.config.is_encoder_decoder else "causal"],
        num_virtual_tokens=prompt.tokens,
        token_dim=prompt.new.shape[1],
        num_transformer_submodules=1,
        base_model_name_or_path=prompt.base,
        revision=prompt.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    named = {n.removeprefix("soft_prompt."): w.to("cpu", dtype) for n, w in weights}
    whole = torch.cat([named[n] for n in ("new", "earlier") if n in named])
    save_file({KEY: whole}, folder / WEIGHTS, metadata={"format": "pt"})
