"""The answers of a model to the tasks of a run: exact match, ROUGE-L, and every answer kept.

A row's prompt is tokenized as in training (`data/encode.py`) and answered greedily, in batches of
prompts of like length. Each process answers its share of the rows.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from eval.measure.results import replace_file, write_json
from pipeline.data.encode import Encoder
from pipeline.data.heldout import load_tasks
from pipeline.data.instruct import Example
from pipeline.data.tasks import check_answers_fit, normalized
from pipeline.errors import UserError
from pipeline.model.generate import written
from pipeline.model.positions import longest_input
from pipeline.model.prompt import prompt_of
from pipeline.model.task_adapters import TaskAdapters
from pipeline.recipe import Answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWERS = "answers.jsonl"  # beside the result: what was said to every row


@torch.inference_mode()
def evaluate_share(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    heldout: Path,
    settings: Answers,
    output: Path,
    share: tuple[int, int] = (0, 1),
    adapters: TaskAdapters | None = None,
    names: list[str] | None = None,
) -> None:
    """Answer the rows i of each task with i % share[1] == share[0]; one line a row in `output`.

    adapters: of the model's checkpoint; each row is answered by the one that it finds.
    names: of the folder's tasks; default: all.
    """
    manifest = json.loads((heldout / "manifest.json").read_text(encoding="utf-8"))
    encoder = Encoder.of(tokenizer, manifest["objective"], manifest["template"])
    tasks = {name: t for name, t in load_tasks(heldout).items() if names is None or name in names}
    for name, (options, _) in tasks.items():
        check_answers_fit(name, options, encoder, settings.max_new_tokens)
    lines = []
    bar = tqdm(total=len(tasks), desc="tasks", disable=None if share[0] == 0 else True, leave=False)
    for name, (options, examples) in tasks.items():
        own = list(enumerate(examples[: settings.limit]))[share[0] :: share[1]]
        asked = [e for _, e in own]
        chosen = adapters.choose(encoder.prompts(asked)) if adapters and asked else [0] * len(own)
        said = [""] * len(own)
        for expert in sorted(set(chosen)):
            mine = [i for i, c in enumerate(chosen) if c == expert]
            if adapters is not None:
                adapters.use(expert)
            texts = answers(model, encoder, [asked[i] for i in mine], options, settings)
            for i, text in zip(mine, texts, strict=True):
                said[i] = text
        lines += [
            {"task": name, "row": row, "answer": example.response, "said": text}
            | (adapters.described(expert, name) if adapters is not None else {})
            for (row, example), text, expert in zip(own, said, chosen, strict=True)
        ]
        bar.update()
    bar.close()
    if adapters is not None:
        adapters.use(len(adapters.domains))  # the checkpoint's own
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    output.write_text(text, encoding="utf-8")


def answers(
    model: Any, encoder: Encoder, examples: list[Example], options: list[str], settings: Answers
) -> list[str]:
    """What the model says to each prompt, greedily, at most `max_new_tokens`."""
    prompts = encoder.prompts(examples)
    limit, soft = longest_input(model), prompt_of(model)
    longest = max(map(len, prompts), default=0) + (soft.tokens if soft is not None else 0)
    labels = [Example(e.prompt, "", option) for e in examples[:1] for option in options]
    each, ends = encoder.encode(labels), encoder.ends_of(labels)
    said_behind = max(map(encoder.end_of, each), default=1) if encoder.objective == "causal" else 0
    if limit is not None and longest + said_behind > limit:
        answer = f" and its answer up to {said_behind}" if said_behind else ""
        raise UserError(
            f"a prompt has {longest} tokens{answer}, the model takes {limit}: lower the task's "
            "max_words"
        )
    allowed = None
    if settings.constrained and examples:
        allowed = Trie([t.ids[t.predicted].tolist() for t in each if t.predicted is not None])
    said = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), settings.batch_size):
        block = order[start : start + settings.batch_size]
        texts = written(
            model, [prompts[i] for i in block], ends, encoder.pad, settings.max_new_tokens,
            allowed.after if allowed else None,
        )  # fmt: skip
        for i, ids in zip(block, texts, strict=True):
            said[i] = encoder.backend.decode(ids, skip_special_tokens=True).strip()
    return said


class Trie:
    """The answers that may be given, token by token."""

    def __init__(self, answers: list[list[int]]):
        self.root: dict[int, dict] = {}
        for answer in answers:
            node = self.root
            for token in answer:
                node = node.setdefault(token, {})
        self._last = answers[0][-1]

    def after(self, before: int) -> Callable[[int, torch.Tensor], list[int]]:
        """For `generate`: what may follow the ids behind the first `before` of a row."""

        def allowed(_row: int, ids: torch.Tensor) -> list[int]:
            node = self.root
            for token in ids[before:].tolist():
                node = node.get(token, {})
            return list(node) or [self._last]  # behind the end: padding, which nobody reads

        return allowed


def merge_shares(parts: list[Path], output: Path, info: dict[str, Any]) -> None:
    """Write tasks.json, and every answer beside it."""
    rows = [json.loads(line) for part in parts for line in _lines(part)]
    rows.sort(key=lambda row: (row["task"], row["row"]))
    for row in rows:
        row["correct"] = matches(row["said"], row["answer"])
        row["rouge_l"] = round(rouge_l(row["said"], row["answer"]), 4)
    tasks = dict.fromkeys(row["task"] for row in rows)
    result = {**info, "tasks": {t: _scores([r for r in rows if r["task"] == t]) for t in tasks}}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(output.with_name(ANSWERS), text.encode())
    write_json(output, result)
    for part in parts:
        part.unlink()


def _lines(part: Path) -> Iterator[str]:
    with part.open(encoding="utf-8") as file:  # not splitlines: an answer may have other breaks
        yield from file


def _scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """value: share of exact matches, with its standard error; majority: what the label that most
    rows have would reach; found: of experts, the share of rows that took the task's own."""
    correct = np.array([row["correct"] for row in rows], float)
    labels = Counter(row["answer"] for row in rows)
    n = len(rows)
    found = [row["found"] for row in rows if "found" in row]
    return {
        "value": correct.mean(),
        "stderr": float(np.sqrt(correct.var() / max(1, n - 1))),
        "rouge_l": float(np.mean([row["rouge_l"] for row in rows])),
        "majority": max(labels.values()) / n,
        "rows": n,
        **({"found": float(np.mean(found))} if found else {}),
    }


def matches(said: str, answer: str) -> bool:
    return normalized(said) == normalized(answer)


def rouge_l(said: str, answer: str) -> float:
    """The F1 of the longest common subsequence of words (Lin 2004), of normalized texts."""
    a, b = normalized(said).split(), normalized(answer).split()
    lengths = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, start=1):
            diagonal, before = before, lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    common = lengths[-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0
