"""From a row of a file to a document."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pipeline.data.bad_lines import BadLines
from pipeline.data.conversations import conversation_of
from pipeline.data.instruct import Document, Example
from pipeline.data.tasks import Render, renderer, texts_of
from pipeline.errors import UserError
from pipeline.recipe import Domain


@dataclass(frozen=True)
class Fields:
    """Which fields of a row make a document, and what it is then."""

    needed: list[str]
    optional: list[str]
    instruction: bool
    chat: bool = False
    render: Render | None = None  # of a task: (text, label, file, row) to an example

    @classmethod
    def of(cls, domain: Domain) -> "Fields":
        if domain.task is not None:
            names = [*texts_of(domain.task), domain.task.label]
            return cls(names, [], True, render=renderer(domain.task))
        if domain.chat_field is not None:
            return cls([domain.chat_field], [], False, chat=True)
        if domain.instruction is None:
            return cls([domain.text_field], [], False)
        fields = domain.instruction
        more = [fields.input] if fields.input else []
        return cls([fields.prompt, fields.response], more, True)

    def take(self, row: dict[str, Any], file: str, line: int, bad: BadLines) -> Document | None:
        """The document of a row that has the needed fields, or None: counted in `bad`.

        A row whose needed field is null or blank has no text; it is not broken.
        """
        values = [row[name] for name in self.needed]
        more = ["" if row.get(name) is None else row[name] for name in self.optional]
        if any(is_blank(value) for value in values):
            bad.add_blank(file, line)
            return None
        if self.render is not None:
            *texts, label = values
            for name, text in zip(self.needed, texts, strict=False):
                if reason := problem(text):
                    bad.add(file, line, f"{name!r} {reason}")
                    return None
            if len(texts) > 1:
                texts = [f"{n}: {text}" for n, text in zip(self.needed, texts, strict=False)]
            return self.render("\n".join(texts), label, file, line)
        if self.chat and not isinstance(values[0], bytes):
            conversation, refused = conversation_of(values[0])
            if refused:
                bad.add(file, line, refused)
            return conversation
        for name, value in zip(self.needed + self.optional, values + more, strict=True):
            if reason := problem(value):
                what = f"{name!r}" if self.instruction else "the text"
                bad.add(file, line, f"{what} {reason}")
                return None
        if not self.instruction:
            return values[0]
        return Example(values[0], more[0] if more else "", values[1])

    def lacks(self, seen: Iterable[str]) -> bool:
        """Whether a file whose rows have these fields has not a needed one; or not an optional one,
        but one of nearly that name: a file whose rows have no context needs none."""
        seen = set(seen)
        others = sorted(seen - {*self.needed, *self.optional})
        absent = set(self.optional) - seen
        mistyped = any(get_close_matches(name, others, n=1) for name in absent)
        return mistyped or not set(self.needed) <= seen

    def missing(self, where: str, seen: Iterable[str]) -> UserError:
        """The error of a file of which no row has one of the fields."""
        seen = set(seen)
        names = ", ".join(sorted(map(repr, seen))) or "none"
        missing = " and ".join(repr(n) for n in self.needed + self.optional if n not in seen)
        fix = (
            "Set `text` and `label` of the domain's `task`."
            if self.render
            else "Set `prompt`, `input` and `response` of the domain's `instruction`."
            if self.instruction
            else "Set `chat_field` of the domain to the one that holds the messages."
            if self.chat
            else _how_to_read(seen)
        )
        return UserError(
            f"{where}: no row has the field {missing or self.needed}; fields seen: {names}. {fix}"
        )


def _how_to_read(seen: set[str]) -> str:
    """What to set for rows that have these fields, where one text a row was expected."""
    if chats := seen & {"messages", "conversations", "conversation"}:
        return f"If it holds chats, set `chat_field: {min(chats)}` in place of `text_field`."
    prompts = seen & {"instruction", "prompt", "question"}
    responses = seen & {"response", "output", "completion", "answer"}
    if prompts and responses:
        fields = f"{{prompt: {min(prompts)}, response: {min(responses)}}}"
        return f"If they are instructions, set `instruction: {fields}` in place of `text_field`."
    return "Set `text_field` of the domain to the one that holds the text."


def is_blank(value: object) -> bool:
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def problem(text: object) -> str | None:
    """Why a value is no text, or None."""
    if isinstance(text, bytes):
        return "is not UTF-8"
    if not isinstance(text, str):
        return f"is not a string but {type(text).__name__}"
    if "\0" in text:
        return "has NUL characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode (lone surrogate)"
    return None
