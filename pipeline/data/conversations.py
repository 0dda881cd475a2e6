"""Chat rows: several turns of a system, a user and an assistant, whose turns alone are learnt.

A row holds a list of messages, each with a role and a content (`role`, `content`, or `from`,
`value`). The tokenizer's chat template makes their text; which part of it the assistant wrote, the
template says itself (`{% generation %}`), or it is found by writing the conversation up to each
answer.
"""

import re
from typing import TYPE_CHECKING, Any

from pipeline.data.instruct import Conversation, dated
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
TOOLS = {
    "tool", "function", "observation", "function_call", "function_response", "tool_call",
    "tool_response",
}  # fmt: skip
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefused(Exception):
    """The chat template raises an error, e.g. for roles that do not alternate."""


def conversation_of(value: Any) -> tuple[Conversation | None, str | None]:
    """The conversation of a row's list of messages, or why it cannot be used.

    What comes behind the last answer is left out: it teaches nothing.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        return None, "the messages are not a list of objects"
    turns: list[tuple[str, str]] = []
    for message in value:
        role, content, reason = _turn(message)
        if reason:
            return None, f"message {len(turns) + 1}: {reason}"
        turns.append((role, content))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        return None, "no message of an assistant"
    return Conversation(tuple(turns)), None


def _turn(message: dict[str, Any]) -> tuple[str, str, str | None]:
    """(role, content, why it cannot be used)."""
    role = message.get("role", message.get("from"))
    if role in TOOLS or message.get("tool_calls") or message.get("function_call"):
        return "", "", "calls a tool, which is not supported; leave such rows out"
    if role not in ROLES:
        return "", "", f"unknown role {role!r}; known are {', '.join(ROLES)}"
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, as for models that see images too
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds != {"text"}:
            return "", "", "the content has parts that are not text"
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        return "", "", f"the content is not a string but {type(content).__name__}"
    if ROLES[role] == "assistant" and not content.strip():
        return "", "", "the answer is empty"
    try:
        content.encode()
    except UnicodeEncodeError:
        return "", "", "the content is not valid Unicode (lone surrogate)"
    return ROLES[role], content, None


def conversation_pieces(
    tokenizer: "PreTrainedTokenizerFast", conversation: Conversation
) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, and whether the assistant wrote each of them.

    Raises:
        UserError: the template is missing, or does not let the answers be told from the rest.
        TemplateRefused: the template raises an error for this conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which conversations (`chat_field`) need; choose "
            "the tokenizer of a chat model, or make prompts and responses of them (`instruction`)"
        )
    if MARKED.search(str(tokenizer.chat_template)):
        text, spans = _marked(tokenizer, conversation)
    else:
        text, spans = _by_prefixes(tokenizer, conversation)
    pieces: list[tuple[str, bool]] = []
    end = 0
    for start, stop in spans:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


def _by_prefixes(
    tokenizer: "PreTrainedTokenizerFast", conversation: Conversation
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and from where to where each answer and what ends it goes."""
    messages = _messages(conversation)
    whole = _render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:i], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: i + 1])
        if not (answered.startswith(asked) and whole.startswith(answered)):
            raise UserError(
                "the tokenizer's chat template writes an answer differently when more follows, so "
                "what the assistant wrote cannot be found; mark it in the template with "
                "{% generation %} ... {% endgeneration %}, or use rows of one prompt and response "
                "(`instruction`)"
            )
        spans.append((len(asked), len(answered)))
    return whole, spans


def _marked(
    tokenizer: "PreTrainedTokenizerFast", conversation: Conversation
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = dated(tokenizer.get_chat_template())
    try:
        special: dict[str, Any] = tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            conversations=[_messages(conversation)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **special,
        )
    except Exception as error:  # jinja2's, of the template's own raise_exception
        raise TemplateRefused(str(error)) from None
    (text,), (spans,) = rendered
    if not spans:
        raise UserError(
            "the tokenizer's chat template marks no answer ({% generation %}) in a conversation "
            "with one; mend the template, or remove its marks"
        )
    return text, [(start, stop) for start, stop in spans]


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation.messages]


def _render(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], **options: Any
) -> str:
    template = dated(tokenizer.get_chat_template())
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
        return str(text)
    except Exception as error:  # jinja2's, of the template's own raise_exception
        raise TemplateRefused(str(error)) from None
