"""Load a model (hub, folder, or built from a config) and trim its head to the predicted tokens."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.data.objective import targets_of
from pipeline.errors import UserError
from pipeline.hub_name import from_hub
from pipeline.model.attention import Separation, arrange, start_token
from pipeline.model.composed_lora import add_composed, is_composed, load_composed
from pipeline.model.gguf import local_weights
from pipeline.model.lora import (
    TASK_TYPES,
    add_adapter,
    add_beside,
    base_of,
    is_adapter,
    load_adapter,
    prepare_4bit,
    quantized_loading,
)
from pipeline.model.moe_lora import add_moe_lora, is_moe_lora, load_moe_lora
from pipeline.model.positions import longest_input
from pipeline.model.prompt import add_prompt, is_prompt, load_prompt
from pipeline.model.weights import check_weights, load_pretrained, why
from pipeline.recipe import Lora, Model, Prompt, Recipe

FLASH = "flash_attention_2"  # needs a GPU to be built with
AUTO = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def load_config(
    model: Model, vocab_size: int | None = None, field: str = "model.path"
) -> PretrainedConfig:
    """The model's configuration.

    Args:
        vocab_size: of a model that is built from scratch.
        field: that says the model's path, for messages.

    Raises:
        UserError: unknown model type or attribute, no such model.
    """
    if model.config is not None:
        values = dict(model.config)
        model_type = values.pop("model_type", None)
        try:
            known = AutoConfig.for_model(model_type)
            if vocab_size is not None:
                _set_vocabulary(known, values, vocab_size)
            config = AutoConfig.for_model(model_type, **values)
        except (ValueError, TypeError) as error:
            raise UserError(f"model.config: {error}") from None
        for key in values:
            if not hasattr(known, key):  # transformers would keep it and ignore it
                raise UserError(f"model.config.{key}: {model_type} has no such attribute")
        if config.is_encoder_decoder:  # transformers computes no loss of a checkpoint without it
            config.decoder_start_token_id = start_token(config)
    else:
        if is_adapter(model.path):
            raise UserError(
                f"{field}: {model.path} is an adapter; give its base model, "
                f"{base_of(str(model.path))[0]}"
            )
        try:
            source = local_weights(str(model.path))
            config = from_hub(
                field,
                source,
                lambda: AutoConfig.from_pretrained(
                    source, revision=model.revision, trust_remote_code=False
                ),
            )
        except (OSError, ValueError) as error:
            here = "" if Path(str(model.path)).exists() else " (there is no such folder here)"
            raise UserError(f"{field}: cannot load {model.path!r}{here}: {why(error)}") from None
    for key, value in model.overrides.items():
        if not hasattr(config, key):
            raise UserError(f"model.overrides.{key}: {type(config).__name__} has no such attribute")
        setattr(config, key, value)
    return config


def check_objective(config: PretrainedConfig, objective: str) -> None:
    """Raises UserError where transformers has no model of this kind, or only one that would see
    what it predicts."""
    kinds: dict[str, Any] = {name: auto._model_mapping for name, auto in AUTO.items()}
    if type(config) not in kinds[objective]:
        known = [name for name, models in kinds.items() if type(config) in models]
        instead = f"; set model.objective={known[0]}" if known else ""
        raise UserError(
            f"model.objective: {objective}: {config.model_type} is no such model{instead}"
        )
    if objective == "causal" and reads_ahead(config):
        raise UserError(
            f"model.objective: causal: {config.model_type} reads the tokens that it would predict; "
            "set model.objective=masked"
        )


def reads_ahead(config: Any) -> bool:
    """Whether a model that transformers has as a causal one too is an encoder, as it is set up."""
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not decodes and not config.is_encoder_decoder


def _set_vocabulary(known: PretrainedConfig, values: dict[str, Any], vocab_size: int) -> None:
    """Size the embeddings where the values do not; a nested configuration has them in a part."""
    text = known.get_text_config()
    for name in known.sub_configs:
        if getattr(known, name, None) is text:
            values[name] = {"vocab_size": vocab_size, **(values.get(name) or {})}
            return
    values.setdefault("vocab_size", vocab_size)


def check_model(config: PretrainedConfig, recipe: Recipe, vocabulary: int) -> None:
    """Raises UserError where the objective, the sequences or the tokenizer do not fit the model."""
    check_objective(config, recipe.model.objective)
    length = recipe.data.sequence_length
    limit = longest_input(_without_weights(recipe.model, config))
    prompt = recipe.model.prompt
    if prompt is not None:
        stages = len(recipe.stages) if prompt.progressive else 1
        length += prompt.tokens * stages
    if limit is not None and length > limit:
        behind = " and model.prompt" if prompt is not None else ""
        raise UserError(
            f"data.sequence_length{behind}: {length} is over the {limit} tokens that "
            f"{config.model_type} can take; lower it"
        )
    known = config.get_text_config().vocab_size
    if vocabulary > known:
        raise UserError(
            f"model: the tokenizer has {vocabulary} tokens, the model only {known} embeddings; use "
            "the model's own tokenizer"
        )


def check_pretrained(model: Model, config: PretrainedConfig) -> None:
    """Raises UserError where a pretrained model lacks weights, has others than `config` says, or
    cannot be read: the file's headers are compared, no weight is kept."""
    if model.path is not None:
        source = local_weights(model.path)
        auto = AUTO[model.objective]
        check_weights(auto, source, deepcopy(config), model.revision, model.initialize_missing)


def build_model(
    model: Model,
    config: PretrainedConfig,
    checkpoint: str | Path | None,
    seed: int,
    keep_dtype: bool = False,
) -> nn.Module:
    """The model on the CPU, in train mode; with `model.lora` or `model.prompt` frozen but for that.

    Quantized base weights are on the rank's GPU, where there is one.

    Args:
        checkpoint: a published folder, of a model or an adapter; None takes `model.path`, or random
            weights from `seed` (without an adapter: it belongs to weights that can be loaded
            again).
        seed: of the random weights: all, the adapter's, or with `model.initialize_missing` those
            that `model.path` lacks.
        keep_dtype: a pretrained model keeps the dtype of its file, else all is fp32. Weights that
            are not converted are mapped from the file: the ranks of a machine share the memory.
            (Random weights, and those beside quantized ones, are fp32.)

    Raises:
        UserError: the weights are not all there, or are damaged (`load_pretrained`).
    """
    auto = AUTO[model.objective]
    source = checkpoint or (model.path and local_weights(model.path))
    kwargs: dict[str, Any] = {"attn_implementation": model.attention, "dtype": torch.float32}
    try:
        if source is None:
            torch.manual_seed(seed)
            net = auto.from_config(config, **kwargs)
            if model.initial_positions == "sinusoidal":
                _sinusoidal_positions(net, config)
        else:
            adapter = source if is_adapter(source) else None
            revision = model.revision if checkpoint is None else None
            if adapter is not None:
                source, revision = base_of(adapter)
            config = deepcopy(config)  # loading leaves marks in it
            if quantized := quantized_loading(model.lora):
                kwargs |= quantized
            elif keep_dtype:
                config.dtype = AutoConfig.from_pretrained(
                    source, revision=revision, trust_remote_code=False
                ).dtype
                kwargs["dtype"] = "auto"
            initialize = seed if checkpoint is None and model.initialize_missing else None
            kwargs |= {"config": config, "revision": revision}
            net = load_pretrained(auto, source, initialize, **kwargs)
            kind = TASK_TYPES.get(model.objective)
            if adapter is not None and is_composed(adapter):
                trained = model.lora if model.lora is not None and model.lora.incremental else None
                load_composed(net, adapter, trained, kind, seed, torch.float32)
            elif adapter is not None and model.lora is not None and model.lora.incremental:
                add_beside(net, adapter, model.lora, kind, seed)
            elif adapter is not None:
                # In fp32, of which the engine makes its masters, whatever dtype the base has.
                _load_published(net, adapter, kind, model.prompt, seed, torch.float32)
            elif model.lora is not None:
                _add_adapter(net, model.lora, str(source), revision, kind, seed)
            elif model.prompt is not None:
                add_prompt(net, model.prompt, str(source), revision, seed)
            prepare_4bit(net)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model: cannot build {source or config.model_type}: {error}") from None
    if model.gradient_checkpointing:
        if not net.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: {type(net).__name__} does not support it; "
                "set it to false"
            )
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return net.train()


def _sinusoidal_positions(net: nn.Module, config: PretrainedConfig) -> None:
    """Start the learned position embeddings from sines and cosines (Vaswani et al. 2017, 3.5) of
    the standard deviation that the other weights start with. A small masked LM learns to use the
    context much earlier from there than from random positions.
    """
    tables = [m for n, m in net.named_modules() if n.endswith("position_embeddings")]
    if len(tables) != 1 or not isinstance(tables[0], nn.Embedding):
        raise UserError(
            "model.initial_positions: sinusoidal needs a model with one table of learned position "
            f"embeddings; {type(net).__name__} has {len(tables)}"
        )
    table = tables[0].weight
    rows, width = table.shape
    rates = 1000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(rows)[:, None] * rates
    scale = 2**0.5 * config.initializer_range
    with torch.no_grad():
        table[:, 0::2] = angles.sin() * scale
        table[:, 1::2] = angles[:, : width // 2].cos() * scale


def load_for_evaluation(
    checkpoint: str | Path,
    objective: str,
    attention: str,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    lora: Lora | None = None,
    overrides: dict[str, Any] | None = None,
) -> nn.Module:
    """A model or an adapter with its base, on the device, in eval mode.

    dtype: "auto" is that of the checkpoint's file.
    lora: of the recipe that trains the adapter: its base is quantized as there, before training
        (without an adapter) as after.
    overrides: of the recipe's model, whose own files do not have them.

    Raises:
        UserError: the adapter's base model is gone; weights are missing or damaged.
    """
    adapter = checkpoint if is_adapter(checkpoint) else None
    if adapter is not None:
        checkpoint, revision = base_of(adapter)
    checkpoint = local_weights(str(checkpoint))
    options = quantized = quantized_loading(lora, device)
    if overrides:
        trained = Model(path=checkpoint, revision=revision, overrides=overrides)
        options = {**quantized, "config": load_config(trained)}
    net = load_pretrained(
        AUTO[objective],
        checkpoint,
        dtype=dtype,
        attn_implementation=attention,
        revision=revision,
        **options,
    )
    if adapter is not None:
        _load_published(net, adapter, TASK_TYPES.get(objective))
    prepare_4bit(net)
    return net.eval() if quantized else net.eval().to(device)


def _load_published(
    net: nn.Module,
    adapter: str | Path,
    task_type: str | None,
    prompt: Prompt | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Into its base, whatever kind of adapter was published. prompt, seed: of what trains it on.
    dtype: as of `load_adapter`."""
    if is_prompt(adapter):
        load_prompt(net, adapter, prompt, seed)
    elif is_composed(adapter):
        load_composed(net, adapter, None, task_type, dtype=dtype)
    elif is_moe_lora(adapter):
        load_moe_lora(net, adapter, task_type, dtype)
    else:
        load_adapter(net, adapter, dtype=dtype)


def _add_adapter(net: nn.Module, lora: Lora, *of: Any) -> None:
    """A new one, of the kind that the recipe's `lora` is. of: as of `add_adapter`."""
    add = add_composed if lora.composed else add_moe_lora if lora.experts > 1 else add_adapter
    add(net, lora, *of)


def empty_model(model: Model, config: PretrainedConfig) -> nn.Module:
    """The model, with its adapter, without memory for its weights: for a dry run."""
    net = _without_weights(model, config)
    if model.lora is not None:
        with torch.device("meta"):
            _add_adapter(net, model.lora, model.path, None, TASK_TYPES.get(model.objective), 0)
    if model.prompt is not None:
        with torch.device("meta"):
            add_prompt(net, model.prompt, model.path, None, 0)
    return net


def _without_weights(model: Model, config: PretrainedConfig) -> nn.Module:
    """
    Raises:
        UserError: there is no such model of this configuration.
    """
    kwargs = {"attn_implementation": model.attention} if model.attention != FLASH else {}
    try:
        with torch.device("meta"):
            return AUTO[model.objective].from_config(deepcopy(config), **kwargs)
    except (ValueError, ImportError, TypeError, KeyError) as error:
        raise UserError(f"model: cannot build {config.model_type}: {error}") from None


class PredictedPositions:
    """Makes the output head see only the positions that have a target.

    With 15% of the tokens masked, most of the head's work (hidden x vocabulary) is for logits that
    no loss reads. The hook replaces the head's input [batch, length, hidden] by the selected
    positions [n, hidden]; the model then returns logits [n, vocabulary].
    """

    def __init__(self, net: nn.Module):
        self.output = net.get_output_embeddings()  # type: ignore[operator]
        head = next(m for m in net.children() if self.output in m.modules())
        self._selected: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._select)

    def _select(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._selected is None:
            return inputs
        hidden, *rest = inputs
        return (_chosen(hidden, self._selected), *rest)

    def select(self, positions: Tensor | None) -> None:
        """positions: bool [batch, length], or `predicted_places`; None: all."""
        self._selected = positions

    def close(self) -> None:
        self._hook.remove()


def predicted_places(targets: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where in the flattened targets [batch, length] there is one that is
    not negative. The count is known, so that the host does not wait until a GPU has found it."""
    assert targets.is_cuda or int((targets >= 0).sum()) == count
    return (targets.reshape(-1) < 0).to(torch.uint8).argsort(stable=True)[:count]


def _chosen(values: Tensor, positions: Tensor) -> Tensor:
    """[n, width] of [batch, length, width]."""
    if positions.dtype == torch.bool:
        positions = positions.reshape(-1).nonzero().view(-1)
    return values.reshape(-1, values.shape[-1]).index_select(0, positions)


def predict(
    forward: Callable[..., Any],
    inputs: dict[str, Any],
    wanted: Tensor,
    head: PredictedPositions | None,
) -> Tensor:
    """A model's logits [n, vocabulary] at the n positions of `wanted` (bool [batch, length], or
    `predicted_places`).

    head: of that model, to compute no others.
    """
    if head is None:
        return _chosen(forward(**inputs).logits, wanted)
    head.select(wanted)
    logits = forward(**inputs).logits
    head.select(None)
    return logits.reshape(-1, logits.shape[-1])


def summed_loss(
    net: nn.Module, batch: dict[str, Tensor], separation: Separation | None, objective: str
) -> tuple[Tensor, int]:
    """(nats, predicted tokens) of a batch on the device of a whole model."""
    inputs, tokens = arrange(batch, separation, net)
    targets = targets_of(tokens["labels"], objective)
    logits = predict(net, inputs, targets >= 0, None).float()
    loss = F.cross_entropy(logits, targets[targets >= 0], reduction="sum")
    return loss, len(logits)
