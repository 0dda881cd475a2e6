"""Classification tasks as text to text: a prompt with the options, and the label as the answer.

The rows are those of CL-benchmark (`{"label", "sentence"}`, the labels in a `labels.json`), or of
any data set with a field for the text and one for the label. A label may be a number: of the task's
labels, from 0.
"""

import json
import string
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.instruct import Example
from pipeline.errors import UserError
from pipeline.recipe import Domain, Task

if TYPE_CHECKING:
    from pipeline.data.encode import Encoder

ANSWER = "Answer:"


def options_of(task: Task) -> list[str]:
    """The task's labels, in their order.

    Raises:
        UserError: a file that cannot be read, or does not list labels, each once.
    """
    labels: Any = task.labels
    where = "labels"
    if isinstance(labels, str):
        where = labels
        try:
            labels = json.loads(Path(labels).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise UserError(
            f"{where}: not a list of labels; write a list of texts, none of them empty, in quotes "
            'where YAML reads something else ("yes", "no", "1")'
        )
    twice = [x for x, n in Counter(labels).items() if n > 1]
    if twice:
        raise UserError(f"{where}: the label {twice[0]!r} is there twice; remove one")
    if len(labels) < 2:
        raise UserError(f"{where}: a task needs at least two labels; it has {len(labels)}")
    by_answer: dict[str, str] = {"": ""}  # the label that an answer counts as
    for label in labels:
        other = by_answer.setdefault(normalized(label), label)
        if other != label:
            alike = f"as {other!r}" if other else "as an empty answer"
            raise UserError(
                f"{where}: {label!r} is counted {alike}: case, punctuation and blanks of an answer "
                "do not count; name it otherwise, in the rows too"
            )
    return labels


def normalized(text: str) -> str:
    """What counts of an answer: in lower case, without punctuation, with single blanks, as in the
    scorer of Super-NaturalInstructions."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def texts_of(task: Task) -> list[str]:
    """The fields of a row that are its text."""
    return [task.text] if isinstance(task.text, str) else task.text


def example_of(
    text: str, label: Any, task: Task, options: list[str], file: str, line: int
) -> Example | None:
    """A row as an example; None where its label is one that the task leaves out.

    Raises:
        UserError: a label that is none of the task's.
    """
    if isinstance(label, int) and not isinstance(label, bool):
        if label in task.leave_out:
            return None
        if 0 <= label < len(options):
            label = options[label]
    if str(label) in task.leave_out:
        return None
    if label not in options:
        raise UserError(
            f"{file}: row {line} has the label {label!r}, which is none of the task's: "
            f"{', '.join(options)}. Correct the row or `labels`, or name it in `leave_out`"
        )
    return Example(prompt_of(text, task, options), "", label)


def prompt_of(text: str, task: Task, options: list[str]) -> str:
    """What the model reads; of a text that is longer than `max_words` its beginning or end."""
    words = text.split()
    if task.max_words is not None and len(words) > task.max_words:
        kept = words[: task.max_words] if task.keep == "first" else words[-task.max_words :]
        text = " ".join(kept)
    listed = ["Option: " + ", ".join(options)] if task.list_options else []
    return "\n".join([task.instruction, *listed, text.strip(), ANSWER])


def check_answers_fit(name: str, options: list[str], encoder: "Encoder", limit: int) -> None:
    """Raises UserError where an answer of `limit` tokens is too short for one of a task's labels:
    every such row would count as wrong, whatever the model says."""
    tokens = encoder.encode([Example(ANSWER, "", option) for option in options])
    for option, row in zip(options, tokens, strict=True):
        needed = encoder.end_of(row)  # the end itself need not be said
        if needed > limit:
            raise UserError(
                f"evaluate.answers.max_new_tokens: the label {option!r} of {name} has {needed} "
                f"tokens, and an answer may have {limit}; raise it"
            )


def drawn(examples: Iterable[tuple[str, int, Example]], task: Task, where: str) -> list[Example]:
    """Of (side, hash, example): as many as the task takes, those with the smallest hashes.

    Raises:
        UserError: a label without a row on a side that has rows.
    """
    rows = sorted(examples, key=lambda row: row[1])
    options = options_of(task)
    kept: list[Example] = []
    counts: Counter[tuple[str, str]] = Counter()
    totals: Counter[str] = Counter()
    for side, _, example in rows:
        label = example.response
        counts[side, label] += 1
        limit = task.train_rows if side == "train" else task.test_rows
        seen = totals[side] if side == "train" else counts[side, label] - 1
        if limit is None or seen < limit:
            kept.append(example)
        totals[side] += 1
    for side in totals:
        empty = [label for label in options if not counts[side, label]]
        if empty:
            kind = "to train on" if side == "train" else "to test on"
            raise UserError(
                f"{where}: no row {kind} has the label {empty[0]!r}; add some, or remove it from "
                "`labels`"
            )
    return kept


def task_problems(name: str, domain: Domain) -> list[str]:
    """What is wrong with the settings of a task by themselves, as `key: problem; fix`."""
    task = domain.task
    if task is None:
        return []
    found: list[str] = []

    def need(condition: object, key: str, message: str) -> None:
        if not condition:
            found.append(f"data.domains.{name}{key}: {message}")

    try:
        options_of(task)
    except UserError as error:
        where = "labels: " if isinstance(task.labels, str) else ""  # the file is named
        found.append(f"data.domains.{name}.task.{where}{error}")
    need(texts_of(task), ".task.text", "names no field")
    need(task.instruction.strip(), ".task.instruction", "is empty; say what is to be done")
    for key in ("max_words", "train_rows", "test_rows"):
        value = getattr(task, key)
        need(
            value is None or value >= 1, f".task.{key}", "must be at least 1; leave it out for all"
        )
    need(
        task.max_words is not None or task.keep == "first",
        ".task.keep",
        "has no effect without `max_words`",
    )
    need(
        not (domain.instruction or domain.chat_field),
        ".task",
        "give at most one of `task`, `instruction` and `chat_field`",
    )
    need(domain.text_field == "text", ".text_field", "has no effect with `task`, which has `text`")
    need(
        domain.heldout_files or domain.heldout_split or domain.embedded,
        ".heldout_files",
        "a task needs rows to test on; give `heldout_files`, or `heldout_split` of a data set",
    )
    need(
        domain.max_documents is None,
        ".max_documents",
        "has no effect on a task; give `train_rows` and `test_rows`",
    )
    need(
        not domain.deduplicate and not domain.decontaminate,
        "",
        "deduplicate and decontaminate are for texts, not for tasks; remove them",
    )
    return found


def described(
    name: str, task: Task, examples: dict[str, list[Example]], prompts: int = 3
) -> list[str]:
    """Lines for people: rows and labels of each side, and the first rendered prompts."""
    lines = []
    for side, rows in examples.items():
        counts = Counter(e.response for e in rows)
        each = ", ".join(f"{label} {counts[label]:,}" for label in options_of(task))
        lines.append(f"{name}, {side}: {len(rows):,} rows ({each})")
    for example in examples["train"][:prompts]:
        prompt = "\n    | ".join(example.prompt.splitlines())
        lines.append(f"    | {prompt} -> {example.response}")
    return lines


Render = Callable[[str, Any, str, int], Example | None]


def renderer(task: Task) -> Render:
    """A function of (text, label, file, row): `example_of` for this task."""
    options = options_of(task)

    def render(text: str, label: Any, file: str, line: int) -> Example | None:
        return example_of(text, label, task, options, file, line)

    return render
