"""Instruction examples: their text in a prompt template, and their tokens.

A document of a corpus is a text, an `Example` (a prompt and the response to learn), or a
`Conversation` (`conversations.py`). Only the responses' tokens are predicted.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# As Stanford Alpaca writes them (Taori et al. 2023).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n"
)

# Chat templates that print today's date (`strftime_now`) are given this one, which those of Llama 3
# print where they are given none, so that a prompt is the same every day.
TODAY = datetime(2024, 7, 26)
DATE_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(?P<q>['"])(?P<format>[^'"]*)(?P=q)\s*\)""")


class Example(NamedTuple):
    """One instruction; `context` may be empty."""

    prompt: str
    context: str
    response: str


class Conversation(NamedTuple):
    """Turns of a chat as (role, content); role: "system", "user" or "assistant", the last one."""

    messages: tuple[tuple[str, str], ...]


Document = str | Example | Conversation


def document_text(document: Document) -> str:
    """All text of a document; its parts are separated by NUL."""
    if isinstance(document, Conversation):
        return "\0".join(part for message in document.messages for part in message)
    return document if isinstance(document, str) else "\0".join(document)


def prompt_text(
    template: str, tokenizer: "PreTrainedTokenizerFast", prompt: str, context: str | None = None
) -> str:
    """What stands before the response. template: "alpaca", "chat" for the
    tokenizer's own, or "plain" for the prompt as it is.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if template == "chat":
        return _chat(tokenizer, [_user(prompt, context)], add_generation_prompt=True)
    if template == "plain":
        return f"{prompt}\n{context}" if context else prompt
    if context:
        return ALPACA_CONTEXT.format(prompt=prompt, context=context)
    return ALPACA.format(prompt=prompt)


def example_texts(
    template: str, tokenizer: "PreTrainedTokenizerFast", example: Example
) -> tuple[str, str]:
    """(prompt, response) as they are tokenized. A chat's response ends as its template ends it.

    Raises:
        UserError: the tokenizer's chat template does not continue its own prompt.
    """
    prompt = prompt_text(template, tokenizer, example.prompt, example.context)
    if template != "chat":
        return prompt, example.response
    answer = {"role": "assistant", "content": example.response}
    whole = _chat(tokenizer, [_user(example.prompt, example.context), answer])
    if not whole.startswith(prompt):
        raise UserError(
            "data.template: this tokenizer's chat template writes the prompt of a finished "
            "conversation differently from that of an open one; use data.template=alpaca"
        )
    return prompt, whole[len(prompt) :]


def _user(prompt: str, context: str | None) -> dict[str, str]:
    return {"role": "user", "content": f"{prompt}\n\n{context}" if context else prompt}


def _chat(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError("data.template: the tokenizer has no chat template; use `alpaca`")
    template = dated(tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )


@lru_cache
def dated(template: str) -> str:
    """The template with a date for each call of `strftime_now`: transformers lets none be given."""
    fixed = DATE_CALL.sub(lambda call: repr(TODAY.strftime(call["format"])), template)
    if re.search(r"\bstrftime_now\s*\(", fixed):
        raise UserError(
            "data.template: the tokenizer's chat template prints today's date in a format that it "
            "computes, so that runs would differ from day to day; write the format into the "
            "template, or use data.template=alpaca"
        )
    return fixed


@dataclass
class ExampleStatistics:
    """What the examples of a stage are, in tokens of the model's tokenizer."""

    examples: int = 0  # those that fit, of all domains of the stage
    too_long: int = 0  # left out: longer than a sequence
    longest: int = 0  # tokens, also of those left out
    tokens: int = 0
    response_tokens: int = 0  # the predicted ones

    def describe(self, length: int) -> str:
        """One line for people. length: tokens of a sequence."""
        left_out = (
            f", {self.too_long:,} longer than {length} tokens left out" if self.too_long else ""
        )
        return (
            f"{self.examples:,} examples ({self.tokens:,} tokens, {self.response_tokens:,} of them "
            f"in responses){left_out}"
        )
