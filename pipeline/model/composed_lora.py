"""Adapters of all stages so far, of which every text takes its own shares (MoCL, Wang et al. 2024,
arXiv 2404.00790; there with prefixes).

Each stage trains an adapter beside the frozen earlier ones, and a key [hidden]. Where the encoder
reads a text, the softmax of the cosines between the text's mean input embedding and the keys, times
`SCALE`, says how much of each adapter counts in the text's row, in encoder and decoder. PEFT has no
such adapters: what is published names a kind that PEFT refuses, and is read here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.model.lora import (
    EARLIER,
    add_adapter,
    base_of,
    fill_adapter,
    one_adapter,
    read_adapter,
    recorded,
    train_beside,
    write_adapter,
)
from pipeline.recipe import Lora

KIND = "MIGU_COMPOSITION"  # where PEFT has its own names
KEYS = "keys"  # in the adapter's file: [stages, hidden]
SCALE = 8.0  # of the cosines; the authors' code has it
SPREAD = 0.02  # of a new key's numbers: small, so that few steps turn it toward its texts


class Composition(nn.Module):
    """The keys, and what they say of the texts that the encoder has read last.

    Attributes:
        new: [1, hidden], trained (None: what was published is only read).
        earlier: [stages, hidden], frozen (None: there are none).
        shares: fp32 [rows, stages]; a row's sum is one.
        distance: fp32 [rows], 1 - cosine to the last key.
    """

    def __init__(self, new: Tensor | None, earlier: Tensor | None):
        super().__init__()
        self.new = None if new is None else nn.Parameter(new)
        self.earlier = None if earlier is None else nn.Parameter(earlier, requires_grad=False)
        self.shares = self.distance = torch.empty(0)

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(shares, distance) of mean input embeddings, fp32 [rows, hidden]."""
        keys = torch.cat([k.float() for k in (self.earlier, self.new) if k is not None])
        cosines = F.cosine_similarity(texts[:, None], keys, dim=-1)
        return (SCALE * cosines).softmax(-1), 1 - cosines[:, -1]

    def look(self, texts: Tensor) -> None:
        """Keep what is found of them. ZeRO-3 gathers the keys again for a backward through what
        `forward` returns, and for no other one."""
        self.shares, self.distance = self(texts)


def composition_of(net: Any) -> Composition | None:
    """That of a model, sharded or not."""
    return getattr(net, "composition", None)


def composition_names(net: Any) -> list[str]:
    """Its parameters, also those that are frozen."""
    return [n for n, _ in net.named_parameters() if n.startswith("composition.")]


def is_composed(adapter: str | Path) -> bool:
    """Whether an adapter's folder (`lora.is_adapter`) holds several, and their keys."""
    return recorded(adapter).get("peft_type") == KIND


def add_composed(
    net: Any, lora: Lora, base: str | None, revision: str | None, task_type: str | None, seed: int
) -> None:
    """As `add_adapter`, of the first stage."""
    add_adapter(net, lora, base, revision, task_type, seed)
    _compose(net, _drawn_key(net, seed), None)


def load_composed(
    net: Any,
    adapter: str | Path,
    lora: Lora | None,
    task_type: str | None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Give the base what was published, and another stage's adapter to be trained beside it.

    lora: of the recipe; None: without another one.
    dtype: as of `load_adapter`.

    Raises:
        UserError: its base is gone; the file is damaged, or of another model.
    """
    base, revision = base_of(adapter)
    settings = recorded(adapter)
    whole = Lora(**{k: settings[k] for k in ("r", "alpha", "dropout", "targets")})
    name = "default" if lora is None else EARLIER
    add_adapter(net, whole, base, revision, task_type, 0, name)
    found = read_adapter(adapter)
    keys = found.pop(KEYS, torch.empty(0, 0)).float()
    if keys.shape != (settings["stages"], net.config.hidden_size):
        raise UserError(
            f"{adapter}: its keys are not those of {settings['stages']} stages of {base}"
        )
    fill_adapter(net, found, adapter, dtype, name)
    if lora is None:
        _compose(net, None, keys.to(net.device))
        return
    train_beside(net, lora, task_type, seed)
    _compose(net, _drawn_key(net, seed + len(keys)), keys.to(net.device))


def save_composed(
    net: Any, weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> None:
    """weights: of all adapters and keys, by the names of the model's parameters."""
    named = dict(weights)
    parts = [named.pop(f"composition.{n}", None) for n in ("earlier", "new")]
    keys = torch.cat([p for p in parts if p is not None])
    settings, joined = net.peft_config["default"], iter(named.items())
    if EARLIER in net.peft_config:
        settings, joined = one_adapter(net, named.items())
    content = {"peft_type": KIND, "stages": len(keys)}
    write_adapter(folder, settings, content, [*joined, (KEYS, keys)], dtype)


def _drawn_key(net: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = net.config.hidden_size
    drawn = SPREAD * torch.randn(1, width, generator=generator, device="cpu")
    return drawn.to(net.get_input_embeddings().weight.device)


def _compose(net: Any, new: Tensor | None, earlier: Tensor | None) -> None:
    encoder = net.get_encoder()
    table = encoder.get_input_embeddings()
    net.composition = composition = Composition(new, earlier)

    def look(_encoder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else given[0]
        real = named.get("attention_mask")
        counted = (torch.ones_like(ids) if real is None else real)[..., None]
        embedded = table(ids).float()
        composition.look((embedded * counted).sum(1) / counted.sum(1).clamp(min=1))

    def gate(stages: slice, a: nn.Linear) -> None:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            shares = composition.shares[:, stages]
            each = a.out_features // shares.shape[1]
            by_rank = shares.repeat_interleave(each, dim=1)[:, None]
            return output * by_rank.to(output.dtype)

        a.register_forward_hook(hook)

    encoder.register_forward_pre_hook(look, with_kwargs=True)
    before = len(earlier) if earlier is not None and new is not None else 0
    for module in list(net.modules()):
        if hasattr(module, "lora_A"):
            gate(slice(before, None), module.lora_A["default"])
            if before:
                gate(slice(before), module.lora_A[EARLIER])
