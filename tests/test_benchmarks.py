"""The benchmarks: the numbers of the `lm_eval` command, the same for every number of shares."""

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from lm_eval.api.model import TemplateLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval.measure.benchmarks
from eval.measure.benchmark_sources import check, write_tasks
from eval.measure.benchmarks import evaluate_share, merge_shares
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.recipe import Benchmark
from tests.reference import MODELS

TEXT = "the quick brown fox jumps over a lazy dog and runs into Dark green forest"
WORDS = TEXT.split()
TASKS = ("hellaswag", "arc_challenge", "winogrande")
COUNT = 9


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i * (seed + 3)) % len(WORDS)] for i in range(count))


def hub_rows(task: str) -> list[dict]:
    """Documents as the task's dataset has them, with what its preprocessing cares about."""
    rows = []
    for i in range(COUNT):
        options = [f"{words(i * 5 + j, 3 + (i + j) % 3)}." for j in range(4)]
        if task == "hellaswag":
            rows.append({
                "activity_label": f"Label {i}",
                "ctx_a": f"{words(i, 6)} [title] {words(i + 1, 2)} [step] end",
                "ctx_b": "" if i % 3 else "the Dog",
                "endings": [f" {o} [substeps] more" for o in options],
                "label": str(i % 4),
            })  # fmt: skip
        elif task == "arc_challenge":
            labels = list("1234" if i % 2 else "ABCD")
            rows.append({
                "id": f"id{i}",
                "question": f"{words(i, 7)} number {i}?",
                "choices": {"text": options, "label": labels},
                "answerKey": labels[i % 4],
            })  # fmt: skip
        else:
            rows.append({
                "sentence": f"Case {i}: {words(i, 4)} so _ {words(i + 2, 4)}.",
                "option1": "Ann",
                "option2": "the Dog",
                "answer": str(i % 2 + 1),
            })  # fmt: skip
    return rows


def flat_rows(task: str) -> list[dict]:
    """The same documents in the flat form."""
    rows = []
    for i, row in enumerate(hub_rows(task)):
        if task == "hellaswag":
            start = row["ctx_a"].replace(" [title]", ". ").replace("[step]", "").replace("  ", " ")
            rows.append({
                "query": f"Label {i}: {start} {row['ctx_b'].capitalize()}".strip(),
                "choices": [e.replace("[substeps] ", " ").strip().replace("  ", " ")
                            for e in row["endings"]],
                "gold": i % 4,
            })  # fmt: skip
        elif task == "arc_challenge":
            # Files differ in whether they have the end of the prompt.
            end = ("", "\n", "\nAnswer:")[i % 3]
            query = f"Question: {row['question']}{end}"
            rows.append({"query": query, "choices": row["choices"]["text"], "gold": i % 4})
        else:
            before, after = row["sentence"].split("_")
            options = [before + row["option1"], before + row["option2"]]
            rows.append({"context_options": options, "continuation": after.strip(), "gold": i % 2})
    return rows


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and the documents in both forms: hub/<task>/, flat/<task>/."""
    folder = tmp_path_factory.mktemp("benchmarks")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=80,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    for task in TASKS:
        split = "test.jsonl" if task == "arc_challenge" else "validation.jsonl.gz"
        write(folder / "hub" / task / split, hub_rows(task))
        write(folder / "flat" / task / split, flat_rows(task))
    return folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run(folder, benchmarks, files="hub", shares=1, unreachable="fail", model=None):
    checkpoint = folder / "checkpoint"
    model = model or AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts = [folder / f"part-{i}.json" for i in range(shares)]
    for i, part in enumerate(parts):
        local = files and str(folder / files)
        evaluate_share(model, tokenizer, benchmarks, local, unreachable, part, (i, shares), 8)
    merge_shares(parts, folder / "benchmarks.json", {"stage": 2})
    assert not any(part.exists() for part in parts)
    return json.loads((folder / "benchmarks.json").read_text())


# `lm_eval`, without parsing the 14,000 files of its own tasks and describing the machine: 20 s.
COMMAND = """
import functools, lm_eval.evaluator, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.evaluator.add_env_info = lambda results: None
cli_evaluate()
"""


def test_the_numbers_are_those_of_the_lm_eval_command(folder, tmp_path):
    benchmarks = {task: Benchmark(limit=7) for task in TASKS}
    benchmarks |= {f"{task}_2": Benchmark(task=task, shots=2, limit=7) for task in TASKS}
    for task in TASKS:  # with examples of their own
        train = write(tmp_path / task / "train.jsonl", hub_rows(task)[::-1])
        files = [train, str(folder / "hub" / task / "*")]
        benchmarks[f"{task}_train"] = Benchmark(task=task, shots=2, limit=7, files=files)
    write_tasks(benchmarks, str(folder / "hub"), tmp_path)
    command = [
        *(sys.executable, "-c", COMMAND, "run", "--model", "hf", "--device", "cpu", "--limit", "7"),
        *("--model_args", f"pretrained={folder / 'checkpoint'},dtype=float32"),
        *("--tasks", ",".join(benchmarks), "--include_path", str(tmp_path), "--batch_size", "8"),
        *("--output_path", str(tmp_path / "results.json")),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    (path,) = tmp_path.glob("results_*.json")
    theirs = json.loads(path.read_text())["results"]

    ours = run(folder, benchmarks)["benchmarks"]
    assert len({entry["value"] for entry in ours.values()}) > 3
    for name, entry in ours.items():
        assert set(entry["metrics"]) == {k[:-5] for k in theirs[name] if k.endswith(",none")
                                         and "_stderr" not in k}  # fmt: skip
        for metric, numbers in entry["metrics"].items():
            assert numbers["value"] == theirs[name][f"{metric},none"], name
            assert numbers["stderr"] == theirs[name][f"{metric}_stderr,none"], name


def test_three_shares_are_one_share(folder, monkeypatch):
    benchmarks = {task: Benchmark(shots=2) for task in TASKS}
    benchmarks["arc_acc"] = Benchmark(task="arc_challenge", metric="acc")
    answers: list[dict] = []
    original = TemplateLM.loglikelihood

    def recorded(self, requests, **kwargs):
        found = original(self, requests, **kwargs)
        answers[-1] |= {(r.task_name, *r.args): a for r, a in zip(requests, found, strict=True)}
        return found

    monkeypatch.setattr(TemplateLM, "loglikelihood", recorded)
    results = []
    for shares in (1, 3):
        answers.append({})
        text = json.dumps(run(folder, benchmarks, shares=shares))
        results.append((text, dict(np.load(folder / "benchmarks.npz"))))
    (one, arrays), (three, again) = results
    assert answers[0] == answers[1]  # to the bit
    assert one == three
    assert list(arrays) == list(again)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, again[name])

    result = json.loads(one)
    entry = result["benchmarks"]["hellaswag"]
    assert entry["metric"] == "acc_norm"
    assert entry["value"] == pytest.approx(arrays["hellaswag"].mean())
    assert arrays["hellaswag"].dtype == np.float32
    assert len(arrays["hellaswag"]) == entry["documents"] == COUNT
    assert entry["source"] == "files hellaswag/validation.jsonl.gz"
    assert entry["truncated"] > 0  # two examples do not fit into 80 tokens
    assert result["benchmarks"]["arc_acc"]["truncated"] == 0
    assert result["benchmarks"]["winogrande"]["metric"] == "acc"
    values = [e["value"] for e in result["benchmarks"].values()]
    errors = [e["stderr"] for e in result["benchmarks"].values()]
    assert result["average"] == pytest.approx(np.mean(values))
    assert result["average_stderr"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 4)
    assert result["stage"] == 2


class Recorder:
    """Answers at once, with a number that depends on the request; notes the requests."""

    truncated = 0

    def __init__(self):
        self.requests = []

    def loglikelihood(self, requests, disable_tqdm):
        self.requests += [(r.doc_id, r.idx, *r.args) for r in requests]
        return [(-float(zlib.crc32(repr(r.args).encode()) % 1000), False) for r in requests]


@pytest.fixture
def recorders(monkeypatch):
    made: list[Recorder] = []

    def make(*_):
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(eval.measure.benchmarks, "_language_model", make)
    return made


@pytest.mark.parametrize("task", TASKS)
def test_the_flat_form_asks_what_the_hub_form_asks(folder, recorders, task):
    for shots in (0, 2):
        hub = run(folder, {task: Benchmark(shots=shots)}, "hub")
        flat = run(folder, {task: Benchmark(shots=shots)}, "flat")
        *_, first, second = recorders
        assert sorted(first.requests) == sorted(second.requests)
        source = hub["benchmarks"][task].pop("source")
        assert flat["benchmarks"][task].pop("source") == f"{source} (flat form)"
        assert hub == flat
    row = hub_rows(task)[0]
    asked = [request[1:] for request in recorders[0].requests if request[0] == 0]
    if task == "arc_challenge":
        context = f"Question: {row['question']}\nAnswer:"
        assert sorted(asked) == [
            (i, context, f" {t}") for i, t in enumerate(row["choices"]["text"])
        ]
    elif task == "winogrande":
        before, after = row["sentence"].split("_")
        options = (row["option1"], row["option2"])
        assert sorted(asked) == [(i, before + o, after) for i, o in enumerate(options)]
    else:
        assert not any("[" in context + continuation for _, context, continuation in asked)


def test_a_document_is_no_example_of_itself(folder, recorders):
    for task, mark in zip(TASKS, ("Label {}:", "number {}?", "Case {}:"), strict=True):
        run(folder, {task: Benchmark(shots=COUNT - 1)})
        for doc_id, _, context, _ in recorders[-1].requests:
            assert [context.count(mark.format(i)) for i in range(COUNT)] == [1] * COUNT, doc_id


@pytest.mark.parametrize(
    ("name", "benchmark", "parts"),
    [
        ("helaswag", Benchmark(), ["helaswag", "did you mean 'hellaswag'"]),
        ("mmlu", Benchmark(), ["groups", "'mmlu_"]),
        ("gsm8k", Benchmark(), ["multiple_choice and loglikelihood"]),
        ("truthfulqa_mc1", Benchmark(shots=3), ["truthfulqa_mc1.shots", "set it to 0"]),
        ("hellaswag", Benchmark(files=["nowhere/*.jsonl"]), [".files", "nowhere/*.jsonl"]),
    ],
)
def test_wrong_settings(name, benchmark, parts):
    with pytest.raises(UserError) as error:
        check({name: benchmark, "piqa": Benchmark(files=["nothing"])}, None)
    for part in [f"evaluate.benchmarks.{name}", *parts, "evaluate.benchmarks.piqa.files"]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("task", "file", "row", "parts"),
    [
        ("hellaswag", "validation.jsonl", {"text": "x", "label": 1}, ["text, label", "ctx_a"]),
        ("boolq", "validation.jsonl", {"query": "x", "choices": ["a"], "gold": 0}, ["not known"]),
        ("hellaswag", "train.jsonl", hub_rows("hellaswag")[0], ["no validation split"]),
        (
            "piqa",
            "a.jsonl",
            {"query": "x", "choices": ["a", "b"], "gold": -1},
            ["answer '-1' is none"],
        ),
        ("piqa", "a.json", {}, ["neither .jsonl nor"]),
        ("piqa", "a.jsonl", [], ["no JSON object"]),
    ],
)
def test_wrong_files(folder, recorders, tmp_path, task, file, row, parts):
    path = write(tmp_path / file, [row, row])
    with pytest.raises(UserError) as error:
        run(folder, {task: Benchmark(files=[path])})
    for part in [f"evaluate.benchmarks.{task}", path.rpartition("/")[2], *parts]:
        assert part in str(error.value)


def test_an_answer_that_is_a_numeral_is_read_as_lm_eval_reads_it(folder, capsys):
    """As the number of a choice, though it is the text of one; the score is lm-eval's."""
    task = "evalita-mp_faq_prompt-1"  # whose target is the text of a choice
    rest = {"B": "x", "C": "y", "D": "z", "correct_answer": "A"}
    rows = [{"question": f"{i} + 1?", "A": f"{i + 1}", **rest} for i in range(6)]
    write(folder / "numerals" / task / "test_1.jsonl", rows)
    scored = run(folder, {task: Benchmark()}, "numerals")
    assert scored["benchmarks"][task]["documents"] == 6
    assert "document 3: lm-eval takes its answer '4' for the number" in capsys.readouterr().out


def test_wrong_metric_and_too_many_shots(folder, recorders):
    with pytest.raises(UserError, match=r"winogrande\.metric: .*'acc_norm'.*it has: acc"):
        run(folder, {"winogrande": Benchmark(metric="acc_norm")})
    with pytest.raises(UserError, match=r"winogrande\.shots: 9 .* from 9 documents"):
        run(folder, {"winogrande": Benchmark(shots=COUNT)})


@pytest.mark.parametrize(("kind", "word"), [("roberta", "masked LM"), ("t5", "encoder-decoder")])
def test_models_without_a_likelihood_are_refused(folder, kind, word):
    with pytest.raises(UserError, match=word):
        run(folder, {"winogrande": Benchmark()}, model=MODELS[kind]())


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub(folder, recorders, monkeypatch, offline):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    benchmarks = {"winogrande": Benchmark(), "piqa": Benchmark()}
    with pytest.raises(UserError, match=r"benchmarks\.piqa: hub baber/piqa .*unreachable=skip"):
        run(folder, benchmarks)
    result = run(folder, benchmarks, unreachable="skip")
    assert list(result["benchmarks"]) == ["winogrande"]
    assert "baber/piqa" in result["skipped"]["piqa"]
    assert result["average"] is None  # an average of other tasks is no average of these
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is offline
