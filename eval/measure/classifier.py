"""What is fine-tuned on an end task: a checkpoint with a new head, or a causal model as it is.

Both have the same three parts: `encode` a row, the `loss` of some rows, and what they `predict`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from eval.measure.end_task_data import Row, Task
from pipeline.data.tokenizer import load_tokenizer, text_frame, vocabulary_size
from pipeline.errors import UserError
from pipeline.hub_name import from_hub
from pipeline.model.generate import padded
from pipeline.model.gguf import local_weights
from pipeline.model.load import load_for_evaluation
from pipeline.model.lora import base_of, is_adapter
from pipeline.model.positions import longest_input
from pipeline.recipe import EndTasks


@dataclass(frozen=True)
class Source:
    """A checkpoint to fine-tune a copy of."""

    path: str  # folder, hub id or .gguf
    revision: str | None = None
    tokenizer: str | None = None  # default: the checkpoint's own
    attention: str = "sdpa"
    device: str = "cpu"
    overrides: dict[str, Any] | None = None  # of the recipe's model


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    label: int


def check_family(path: str, config: Any, settings: EndTasks) -> None:
    """Whether what is trained from a model can be fine-tuned, before it is: by its configuration.

    Raises:
        UserError: as `Classifier` does for each checkpoint.
    """
    _refuse_encoder_decoder(config)
    if settings.score == "likelihood":
        return
    pretraining = AutoModelForCausalLM if _is_causal(config) else AutoModelForMaskedLM
    with torch.device("meta"):
        body: Any = pretraining.from_config(config).base_model
        try:
            net: Any = AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise _no_head(config, error) from None
    lacking = [n for n in net.base_model.state_dict() if n not in body.state_dict()]
    if lacking and not settings.new_pooler:
        raise _no_pooler(path, config, lacking)


class Classifier:
    """The checkpoint's body with transformers' classification head of its family: on <s> of an
    encoder, on the last token of a decoder."""

    def __init__(self, source: Source, task: Task, settings: EndTasks, seed: int):
        """seed: of the head.

        Raises:
            UserError: the tokenizer does not fit; an encoder-decoder; a family without such a head;
                a pooler that the checkpoint lacks, without `new_pooler`.
        """
        whole, self.tokenizer, causal = _load(source)
        config = whole.config
        config.num_labels = len(task.labels)
        _set_padding(config, self.tokenizer)
        torch.manual_seed(seed)
        try:
            self.net = AutoModelForSequenceClassification.from_config(
                config, attn_implementation=source.attention, dtype=torch.float32
            )
        except ValueError as error:
            raise _no_head(config, error) from None
        lacking = _copy_body(whole, self.net)
        if lacking and not settings.new_pooler:
            raise _no_pooler(source.path, config, lacking)
        self.net.to(source.device)
        self.padding = config.get_text_config().pad_token_id
        self.device = source.device
        limit = min(settings.sequence_length, longest_input(self.net) or settings.sequence_length)
        self.frame, self.limit, self.causal = text_frame(self.tokenizer), limit, causal

    def encode(self, row: Row) -> Encoded:
        """<s> term </s> text </s>; of a decoder: the term, a new line, the text."""
        start, end = self.frame
        ids = start + _prompt(row, self.tokenizer, self.causal)
        return Encoded(ids[: self.limit - len(end)] + end, row.label)

    def loss(self, rows: Sequence[Encoded]) -> Tensor:
        """The mean cross-entropy, a scalar."""
        return F.cross_entropy(self._logits(rows), _labels(rows, self.device))

    def predict(self, rows: Sequence[Encoded]) -> list[int]:
        return self._logits(rows).argmax(-1).tolist()

    def _logits(self, rows: Sequence[Encoded]) -> Tensor:
        """[rows, labels]"""
        batch = padded([row.ids for row in rows], self.padding)
        ids, real = (t.to(self.device) for t in batch)
        return self.net(input_ids=ids, attention_mask=real).logits.float()


class Likelihood:
    """A causal model whose answer is the label that is likeliest behind the text."""

    def __init__(self, source: Source, task: Task, settings: EndTasks, seed: int):
        """seed: unused; nothing is new.

        Raises:
            UserError: the tokenizer does not fit; a model that is not causal; two labels that are
                the same tokens.
        """
        self.net, self.tokenizer, causal = _load(source)
        if not causal:
            raise UserError(
                "evaluate.end_tasks.score: likelihood needs a causal model; "
                f"{self.net.config.model_type} gives text no likelihood"
            )
        _merge_adapter(self.net)
        self.net.requires_grad_(True).to(source.device)
        words = [label.replace("_", " ").replace("-", " ").lower() for label in task.labels]
        self.answers = [_ids(self.tokenizer, f" {word}") for word in words]
        if len({tuple(answer) for answer in self.answers}) < len(self.answers):
            raise UserError(f"{task.key}: two labels are the same tokens for {source.path}")
        self.device = source.device
        limit = min(settings.sequence_length, longest_input(self.net) or settings.sequence_length)
        question = _ids(self.tokenizer, "\nAnswer:")
        self.question, self.start = question, text_frame(self.tokenizer)[0]
        self.limit = limit - len(question) - max(map(len, self.answers))
        if self.limit <= len(self.start):
            raise UserError(
                f"evaluate.end_tasks.sequence_length: {limit} tokens leave no room for a text "
                f"beside the question and {task.name}'s longest label"
            )

    def encode(self, row: Row) -> Encoded:
        """Term, new line, text, cut to the length; then the question."""
        ids = self.start + _prompt(row, self.tokenizer, True)
        return Encoded(ids[: self.limit] + self.question, row.label)

    def loss(self, rows: Sequence[Encoded]) -> Tensor:
        """The mean over the rows of the negative log-likelihood of the right label, a scalar."""
        return -self._likelihood(rows, [row.label for row in rows]).mean()

    def predict(self, rows: Sequence[Encoded]) -> list[int]:
        columns = [self._likelihood(rows, [i] * len(rows)) for i in range(len(self.answers))]
        return torch.stack(columns, 1).argmax(-1).tolist()

    def _likelihood(self, rows: Sequence[Encoded], labels: Sequence[int]) -> Tensor:
        """[rows]: log-likelihood of a label behind each row, the sum over its tokens."""
        answers = [self.answers[label] for label in labels]
        texts = [row.ids + answer for row, answer in zip(rows, answers, strict=True)]
        ids, real = (t.to(self.device) for t in padded(texts, 0))
        logits = self.net(input_ids=ids, attention_mask=real).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        asked = torch.zeros_like(each)
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            asked[i, len(text) - len(answer) - 1 : len(text) - 1] = 1.0
        return (each * asked).sum(-1)


HEADS: dict[str, Any] = {"head": Classifier, "likelihood": Likelihood}


def _load(source: Source) -> tuple[Any, Any, bool]:
    """(the model in fp32 on the CPU, its tokenizer, whether it is causal). An adapter's base is not
    quantized here: what is fine-tuned are weights."""
    disable_progress_bar()
    base = base_of(source.path)[0] if is_adapter(source.path) else source.path
    weights = local_weights(base)
    try:
        config: Any = from_hub(
            "evaluate.end_tasks",
            weights,
            lambda: AutoConfig.from_pretrained(
                weights, revision=source.revision, trust_remote_code=False
            ),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.end_tasks: cannot load {source.path}: {error}") from None
    _refuse_encoder_decoder(config)
    causal = _is_causal(config)
    objective = "causal" if causal else "masked"
    net: Any = load_for_evaluation(
        source.path, objective, source.attention, source.revision, overrides=source.overrides
    )
    tokenizer = load_tokenizer(local_weights(source.tokenizer or source.path), source.revision)
    size, known = vocabulary_size(tokenizer), net.get_input_embeddings().num_embeddings
    if size > known:
        raise UserError(
            f"evaluate.end_tasks: the tokenizer has {size} tokens, {source.path} only {known} "
            "embeddings; give the tokenizer that belongs to it"
        )
    return net, tokenizer, causal


def _is_causal(config: Any) -> bool:
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not masked or bool(getattr(config, "is_decoder", False))


def _refuse_encoder_decoder(config: Any) -> None:
    if config.is_encoder_decoder:
        raise UserError(
            f"evaluate.end_tasks: {config.model_type} is an encoder-decoder; end tasks need an "
            "encoder or a decoder"
        )


def _no_head(config: Any, error: ValueError) -> UserError:
    return UserError(
        f"evaluate.end_tasks: no classification head is known for {config.model_type}: "
        f"{str(error).splitlines()[0]}"
    )


def _no_pooler(path: str, config: Any, lacking: list[str]) -> UserError:
    return UserError(
        f"evaluate.end_tasks: {path} has no pooler, which a classifier of {config.model_type} "
        f"reads ({lacking[0]}, ...): masked-LM training leaves it out. Set "
        "evaluate.end_tasks.new_pooler=true to start one from random numbers"
    )


def _copy_body(whole: Any, net: Any) -> list[str]:
    """Copy the weights of `whole`'s body into that of `net`; names of those that it lacks."""
    _merge_adapter(whole)
    body = whole.base_model.state_dict()
    return net.base_model.load_state_dict(body, strict=False).missing_keys


def _merge_adapter(net: nn.Module) -> None:
    """Put an adapter into the weights that it adapts, where the model has one."""
    if not getattr(net, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            net.set_submodule(name, layer.get_base_layer())


def _set_padding(config: Any, tokenizer: Any) -> None:
    """A decoder's head is at the last token that is not padding: by the id that its configuration
    has for padding, which many lack."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, text.eos_token_id, 0)
        config.pad_token_id = text.pad_token_id = next(x for x in known if isinstance(x, int))


def _prompt(row: Row, tokenizer: Any, causal: bool) -> list[int]:
    text = _ids(tokenizer, row.text)
    if row.term is None:
        return text
    if causal or tokenizer.sep_token_id is None:
        return _ids(tokenizer, f"{row.term}\n{row.text}")
    return [*_ids(tokenizer, row.term), tokenizer.sep_token_id, *text]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _labels(rows: Sequence[Encoded], device: str) -> Tensor:
    return torch.tensor([row.label for row in rows], device=device)
