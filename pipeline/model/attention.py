"""How a model keeps the documents of a packed row apart, and the proof that it does.

Several documents share a row of tokens. Which way to tell a model so is right depends on how it is
written, so the loaded model is asked: the first way whose outputs for packed documents equal those
for each document alone is taken.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    masking_utils,
)
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from pipeline.errors import UserError
from pipeline.model.positions import first_position
from pipeline.model.prompt import prompt_of
from pipeline.recipe import Recipe

Way = Literal["together", "positions", "masks", "rows", "pairs"]
PROBE_LENGTH = 16  # tokens
# The largest difference, of the norm of a document's hidden states: rounding stays below.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
COARSE = 5e-2  # bfloat16, and quantized weights
FLASH_ON_CPU = "flash_attention_2_on_cpu"  # a name of transformers' interface
WORK = 2e10  # parameters times tokens of the probe: some seconds on a CPU
# The library's functions that make a layer's mask: of all layers, and of those with a window.
MAKERS = {
    True: ("create_causal_mask", "create_sliding_window_causal_mask"),
    False: ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask"),
}


@dataclass(frozen=True)
class Separation:
    """A way to give packed documents to a model.

    way: "positions": position_ids that begin anew with each document, from which the model makes
    its own masks (sliding windows included). "masks": the library's masks of the model's layers,
    cut at the documents, and the same position_ids. "rows": one document a row, padded.
    "together": the documents of a row see each other. "pairs", of an encoder-decoder: one document
    a row, its tokens without labels for the encoder, those with labels for the decoder.
    first: the position of a document's first token; None where the model takes no position_ids.
    flat: all rows as one long one, which is how flash attention takes position_ids.
    """

    way: Way
    config: PretrainedConfig
    causal: bool
    first: int | None = None
    windows: bool = False  # the model makes a mask for each kind of layer
    flat: bool = False
    takes_cache: bool = False

    def arrange(
        self, batch: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the model's forward takes, and what there is of each of its tokens.

        Args:
            batch: input_ids, segments (-1 is padding) and any other tensor [batch, length] of
                `collate`; on any device.
            dtype: of the model's activations.

        Returns:
            (inputs, tokens): the keyword arguments of the forward, and the batch's other tensors
            as the input's tokens now stand: `labels`, `real` (bool; absent where nothing is
            padding), ... [batch, length], or other sizes for "rows" and `flat`. For "pairs" they
            are of what the decoder writes, but for `real`, of what the encoder reads;
            `decoder_real` is the decoder's.
        """
        tokens = {k: t for k, t in batch.items() if k != "segments"}
        segments = batch["segments"]
        inputs: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        if self.way == "pairs":
            given, tokens = self._pairs(tokens, segments)
            return {**given, **inputs}, tokens
        if self.way == "rows":
            tokens = _one_a_row(tokens, segments, segments >= 0, self._padding())
            inputs["attention_mask"] = tokens.pop("attention_mask")
        elif self.way == "together":
            inputs["attention_mask"] = (segments >= 0).long()
        else:
            if self.first is not None:
                inputs["position_ids"] = _positions(segments) + self.first
            if self.way == "masks":
                inputs["attention_mask"] = self._masks(segments, dtype)
            if self.flat:
                tokens, inputs = (
                    {k: t.reshape(1, -1) if isinstance(t, Tensor) else t for k, t in x.items()}
                    for x in (tokens, inputs)
                )
        return {"input_ids": tokens.pop("input_ids"), **inputs}, tokens

    def _pairs(
        self, tokens: dict[str, Tensor], segments: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The decoder reads what it is to write, a token later, behind the model's start token."""
        real, learnt = segments >= 0, tokens["labels"] >= 0
        source = _one_a_row(tokens, segments, real & ~learnt, self._padding())
        target = _one_a_row(tokens, segments, real & learnt, self._padding())
        written = target.pop("input_ids")
        inputs = {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "decoder_input_ids": torch.cat(
                [torch.full_like(written[:, :1], start_token(self.config)), written[:, :-1]], dim=1
            ),
            "decoder_attention_mask": target.pop("attention_mask"),
        }
        return inputs, {**target, "real": source["real"], "decoder_real": target["real"]}

    def _masks(self, segments: Tensor, dtype: torch.dtype) -> Any:
        full, windowed = MAKERS[self.causal]
        make = {"full_attention": getattr(masking_utils, full)}
        if self.windows:
            make["sliding_attention"] = getattr(masking_utils, windowed)
        same = masking_utils.packed_sequence_mask_function(segments)
        like = segments[..., None].to(dtype)
        masks = {
            name: one(self.config, like, None, past_key_values=None, and_mask_function=same)
            for name, one in make.items()
        }
        return masks if self.windows else masks["full_attention"]

    def _padding(self) -> int:
        padding = getattr(self.config, "pad_token_id", None)
        return 0 if padding is None or padding < 0 else int(padding)


def start_token(config: PretrainedConfig) -> int:
    """What the decoder of an encoder-decoder reads first."""
    found = getattr(config, "decoder_start_token_id", None)
    return int(found if found is not None else config.pad_token_id or 0)


def arrange(
    batch: dict[str, Tensor], separation: Separation | None, net: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`Separation.arrange` for this model, sharded or not, behind its soft prompt where it has one;
    without a separation the batch's tensors are the forward's arguments, but for those of tokens,
    and a 2-D attention_mask says what is real."""
    if separation is not None:
        if (prompt := prompt_of(net)) is not None:
            batch = prompt.before(batch)
        return separation.arrange(batch, _inputs_of(net)[1])
    tokens: dict[str, Tensor] = {
        k: t for k, t in batch.items() if k in ("labels", "domains", "real")
    }
    inputs = {k: t for k, t in batch.items() if k not in tokens}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        tokens.setdefault("real", mask.bool())
    return inputs, tokens


def separate_documents(
    net: nn.Module, causal: bool, cross_document: bool, way: str, length: int
) -> Separation:
    """How to give packed documents to this model (docs/models.md).

    One small forward for each way that is tried, without gradients; the model is left as it was.

    Args:
        net: with its weights, before it is sharded.
        way: "auto", or one of `Way` that is taken without proof.
        length: tokens of a row at most.

    Raises:
        UserError: no way keeps documents apart.
    """
    if getattr(net.config, "is_encoder_decoder", False):
        return _describe(net, causal, "pairs", flash=False)
    flash = "flash" in net.config._attn_implementation  # type: ignore[union-attr,operator]
    if cross_document or way != "auto":
        return _describe(net, causal, "together" if cross_document else way, flash)
    failed = []
    with _as_it_was(net):
        for candidate in _candidates(net, causal, flash):
            found = _describe(net, causal, candidate, flash)
            try:
                difference = packed_differs(net, found, length)
            except Exception as error:  # whatever a model raises that cannot take this
                failed.append(f"{candidate}: {type(error).__name__}: {str(error)[:150]}")
                continue
            if difference <= _tolerance(net):
                return found
            failed.append(f"{candidate}: the hidden states differ by {difference:.1e}")
    raise UserError(
        f"data: {type(net).__name__} does not keep documents that share a row apart: packed is not "
        f"the same as alone ({'; '.join(failed)}). Set data.cross_document=true to let them see "
        "each other, or data.keep_apart to one of these ways to take it as it is."
    )


def separation_of(net: nn.Module, recipe: Recipe) -> Separation:
    """`separate_documents` as the recipe says."""
    d = recipe.data
    causal = recipe.model.objective == "causal"
    return separate_documents(net, causal, d.cross_document, d.keep_apart, d.sequence_length)


@torch.no_grad()
def packed_differs(net: nn.Module, separation: Separation, length: int) -> float:
    """How far the hidden states of packed documents are from those of each alone: the norm of the
    difference over the norm, the largest of all tokens (in half precision: of all documents).

    The packed batch is a row of two documents and padding, and one of a single document. Of large
    models it is shorter than `length`, but has at least PROBE_LENGTH tokens a row.
    """
    device, dtype = _inputs_of(net)
    parameters = sum(p.numel() for p in net.parameters())
    length = min(length, max(PROBE_LENGTH, int(WORK / parameters)))
    sizes = [max(1, length // 3), max(1, length // 2)]
    segments = torch.full((2, length), -1)
    segments[0, : sizes[0]] = 0
    segments[0, sizes[0] : sum(sizes)] = 1
    segments[1] = 0
    ids = _some_tokens(net, segments.numel()).view_as(segments)
    batch = {"input_ids": ids, "segments": segments}
    batch["place"] = torch.arange(segments.numel()).view_as(segments)
    batch = {k: t.to(device) for k, t in batch.items()}
    inputs, tokens = separation.arrange(batch, dtype)
    packed, place = _hidden(net, inputs), tokens["place"].flatten()
    worst = 0.0
    for row, segment in ((0, 0), (0, 1), (1, 0)):
        document = {k: t[row, batch["segments"][row] == segment] for k, t in batch.items()}
        found = (place == document["place"][:, None]).int().argmax(dim=1)
        ids = document["input_ids"][None]
        alone = _hidden(net, _plain(inputs, ids))
        error, norm = (x.norm(dim=-1) for x in (packed[found] - alone, alone))
        if dtype != torch.float32:
            error, norm = error.norm(), norm.norm()
        difference = (error / norm.clamp_min(1e-12)).max().nan_to_num(nan=torch.inf)
        worst = max(worst, float(difference))
    return worst


def _describe(net: nn.Module, causal: bool, way: Any, flash: bool) -> Separation:
    config: Any = net.config
    return Separation(
        way,
        config if way == "pairs" else config.get_text_config(),
        causal,
        first=first_position(net) if _takes(net, "position_ids") else None,
        windows=_makes(net, MAKERS[causal][1]) and _kinds(config),
        flat=way == "positions" and flash,
        takes_cache=(causal or way == "pairs") and _takes(net, "use_cache"),
    )


def _candidates(net: nn.Module, causal: bool, flash: bool) -> Iterator[Way]:
    """The ways that the model's code gives reason to try, the cheapest first."""
    config: Any = net.config
    if causal and _takes(net, "position_ids") and _makes(net, "create_causal_mask"):
        yield "positions"
    # A model that makes its masks with the library's functions takes them ready-made too: one, or
    # one for each kind of layer. Flash attention takes no mask but for padding.
    full, windowed = MAKERS[causal]
    takes_masks = _makes(net, full) and (_kinds(config) or not _makes(net, windowed))
    if takes_masks and not flash:
        yield "masks"
    yield "rows"


def _kinds(config: Any) -> bool:
    """Whether the layers are of several named kinds, each with a mask of its own."""
    return bool(getattr(config.get_text_config(), "layer_types", None))


def _takes(net: Any, name: str) -> bool:
    """Whether the model inside has this argument."""
    return name in signature(net.base_model.forward).parameters


def _makes(net: Any, function: str) -> bool:
    """Whether the model's code makes its masks with this function of the library."""
    return any(
        hasattr(sys.modules[kind.__module__], function)
        for kind in (type(net.base_model), type(net))
    )


def _tolerance(net: Any) -> float:
    if getattr(net, "is_quantized", False):
        return COARSE
    return TOLERANCE.get(_inputs_of(net)[1], COARSE)


def _inputs_of(net: Any) -> tuple[torch.device, torch.dtype]:
    """Where the model takes its input, and the dtype of its activations."""
    weight = net.get_input_embeddings().weight
    return weight.device, weight.dtype


def _hidden(net: Any, inputs: dict[str, Any]) -> Tensor:
    """fp32 [tokens, hidden]"""
    hidden = net.base_model(**inputs)[0]
    return hidden.reshape(-1, hidden.shape[-1]).float()


def _plain(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The other arguments for one document alone: those that every user of the model gives."""
    cache = {"use_cache": False} if "use_cache" in inputs else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **cache}


def _some_tokens(net: Any, count: int) -> Tensor:
    """Token ids without any that the configuration gives a meaning (padding, images)."""
    values = {**net.config.to_dict(), **net.config.get_text_config().to_dict()}
    special = {v for k, v in values.items() if k.endswith(("token_id", "token_index"))}
    vocabulary = net.config.get_text_config().vocab_size
    usual = [i for i in range(min(vocabulary, 1000)) if i not in special]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(usual)[torch.randint(len(usual), (count,), generator=generator)]


def _as_flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """What flash attention makes of [batch, heads, length, width], without its kernels. Of the
    documents in one long row it knows what is handed down to it: a model that keeps `position_ids`
    to itself mixes them, though the mask that it would make for sdpa keeps them apart."""
    rows, heads, length, width = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    places = torch.arange(length)
    apart = places[:, None] - places
    seen = torch.ones(rows, length, length, dtype=torch.bool)
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        seen &= apart >= 0
    if sliding_window:
        seen &= apart.abs() < sliding_window
    ids = told.get("position_ids")
    if ids is not None and rows == 1 and ids.shape[-1] == length:
        (ends, _), _ = prepare_fa_kwargs_from_position_ids(ids)
        document = torch.searchsorted(ends, places, right=True)
        seen &= document[:, None] == document
    if attention_mask is not None:
        seen &= attention_mask[:, None, :length].bool()
    scores = (query @ key.transpose(2, 3)).float() * (width**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    return (shares.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(FLASH_ON_CPU, _as_flash)
AttentionMaskInterface.register(FLASH_ON_CPU, masking_utils.flash_attention_mask)


@contextmanager
def _as_it_was(net: Any) -> Iterator[None]:
    """In eval mode. Flash attention has no CPU kernels: there `_as_flash` stands in for it."""
    training, attention = net.training, net.config._attn_implementation
    on_cpu = _inputs_of(net)[0].type == "cpu"
    stand_in = on_cpu and "flash" in attention
    net.eval()
    if stand_in:
        net.config._attn_implementation = FLASH_ON_CPU
    try:
        yield
    finally:
        net.train(training)
        if stand_in:
            net.config._attn_implementation = attention


def _starts(segments: Tensor) -> Tensor:
    """bool [batch, length]: the first token of each document, and of each run of padding."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts


def _positions(segments: Tensor) -> Tensor:
    """int64 [batch, length], from 0 in each document and in padding."""
    index = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    return index - index.where(_starts(segments), 0).cummax(dim=1).values


def _one_a_row(
    tokens: dict[str, Tensor], segments: Tensor, chosen: Tensor, padding: int
) -> dict[str, Tensor]:
    """The chosen tokens, those of each document in a row of their own; with `attention_mask` and
    `real`. chosen: bool, as the segments."""
    starts = _starts(segments) & (segments >= 0)
    row = starts.flatten().cumsum(0).view_as(segments)[chosen] - 1
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    shape = (max(1, int(starts.sum())), int(place.max()) + 1 if len(place) else 1)
    out = {}
    for name, tensor in {**tokens, "real": segments >= 0}.items():
        fill = {"input_ids": padding, "labels": -100, "real": 0}.get(name, -1)
        out[name] = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
        out[name][row, place] = tensor[chosen]
    out["attention_mask"] = out["real"].long()
    out["attention_mask"][:, 0] = 1  # also of a batch that is padding only
    return out
