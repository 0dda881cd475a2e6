"""Instruction data: what is read, how it is tokenized and packed, and what the loss sees."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.data import embedded
from pipeline.data.bad_lines import BadLines
from pipeline.data.encode import Encoder
from pipeline.data.instruct import Example, prompt_text
from pipeline.data.mlm import collate
from pipeline.data.objective import OBJECTIVES
from pipeline.data.reader import document_of, read_documents
from pipeline.data.streaming import streamed_batches
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.model.attention import separate_documents
from pipeline.recipe import Data, Domain, Instruction, Model, Recipe, Stage
from tests.corpora import packed

TEXT = "write a function that adds two numbers and returns the sum of all of them"
WORDS = TEXT.split()
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 30)) for _ in range(200)]
    tokenizer = train_tokenizer([*texts, prompt_text("alpaca", None, "a", "b")], 400)
    tokenizer.chat_template = CHAT
    return tokenizer


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [Example(words(8), words(4) if i % 3 else "", words(20)) for i in range(count)]


def sequences_of(items, tokenizer, length=96, template="alpaca", pack=True):
    return packed(items, tokenizer, length, "causal", template, pack)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_only_the_response_is_learnt(tokenizer, template):
    one = Example("add two numbers", "1 and 2", "the sum")
    (sequence,) = sequences_of([one], tokenizer, template=template)
    used = sequence.segments >= 0
    learnt = tokenizer.decode(sequence.ids[sequence.predicted])
    given_ = tokenizer.decode(sequence.ids[used & ~sequence.predicted])
    assert learnt.startswith("the sum")
    assert "</s>" in learnt  # the model learns to stop
    assert given_.endswith(prompt_text(template, tokenizer, one.prompt, one.context))
    assert not sequence.predicted[~used].any()
    _, labels, _ = OBJECTIVES["causal"].row(sequence, tokenizer, None, 0.15, False)
    assert (labels[sequence.predicted] == sequence.ids[sequence.predicted]).all()
    assert (labels[~sequence.predicted] == -100).all()


def test_chat_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    try:
        with pytest.raises(UserError, match="no chat template"):
            sequences_of(examples(1), tokenizer, template="chat")
    finally:
        tokenizer.chat_template = CHAT


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(80, 200), st.booleans())
def test_examples_are_packed_whole(tokenizer, seed, length, pack):
    items = examples(40, seed)
    lengths = [len(t.ids) for t in Encoder.of(tokenizer, "causal", "alpaca").encode(items)]
    fitting = [n for n in lengths if n <= length]
    sequences = sequences_of(items, tokenizer, length, pack=pack)
    sizes = [int((s.segments == i).sum()) for s in sequences for i in range(s.segments.max() + 1)]
    assert sorted(sizes) == sorted(fitting)  # none cut, none lost
    assert pack or all(s.segments.max() == 0 for s in sequences)


def test_packed_examples_do_not_see_each_other(tokenizer):
    """The loss of a pack is the sum of the losses of its examples alone."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()

    def loss(pack: bool) -> float:
        rows = [
            OBJECTIVES["causal"].row(s, tokenizer, None, 0.15, False)
            for s in sequences_of(examples(9), tokenizer, 300, pack=pack)
        ]
        inputs, tokens = separate_documents(model, True, False, "auto", 300).arrange(
            collate(rows), torch.float32
        )
        targets = F.pad(tokens["labels"][:, 1:], (0, 1), value=-100)
        logits = model(**inputs).logits.flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum").item()

    with torch.no_grad():
        assert loss(True) == pytest.approx(loss(False), rel=1e-5)


def rows_file(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fields_are_configurable_and_bad_rows_counted(tmp_path):
    rows = [{"q": f"question {i}", "more": "", "a": f"answer {i}"} for i in range(50)]
    rows[3]["a"] = ""
    rows[4]["q"] = None
    rows[5]["more"] = "context"
    rows[7]["a"] = 5
    file = rows_file(tmp_path, rows)
    fields = Instruction(prompt="q", input="more", response="a")
    domain = Domain(files=[file], instruction=fields, heldout_fraction=0.01)
    bad = BadLines()
    found = [document_of(row) for row in read_documents(domain, "train", bad)]
    assert (bad.count, bad.blank) == (1, 2)
    assert "'a'" in bad.listing()
    assert Example("question 5", "context", "answer 5") in found
    assert Example("question 6", "", "answer 6") in found
    with pytest.raises(UserError, match=r"'instruction' and 'response'.*fields seen: 'a', 'more'"):
        list(read_documents(Domain(files=[file], instruction=Instruction()), "train", BadLines(0)))
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([r | {"a": "x"} for r in rows]), table)
    for path in (file, str(table)):  # every example would be without its context
        wrong = Domain(files=[path], instruction=replace(fields, input="mroe"))
        with pytest.raises(UserError, match=r"the field 'mroe'; fields seen: 'a', 'more', 'q'"):
            list(read_documents(wrong, "train", BadLines()))
        without = Domain(files=[path], instruction=replace(fields, input="background"))
        assert list(read_documents(without, "train", BadLines()))  # its rows have no context


def test_a_stream_of_examples_that_are_all_too_long_is_an_error(tmp_path):
    """It would be read for ever."""
    file = rows_file(tmp_path, [{"instruction": f"q {i}", "response": "a"} for i in range(50)])
    recipe = Recipe(
        name="r",
        model=Model(path="unused", objective="causal"),
        data=Data(
            domains={"x": Domain(files=[file], instruction=Instruction())},
            prepare=False,
            sequence_length=16,
        ),
        stages=[Stage("x", steps=1)],
    )
    tokenizer = train_tokenizer(["question answer"] * 20, 300)
    with pytest.raises(UserError, match=r"none of the first \d+ examples of x fits into 16 tokens"):
        next(streamed_batches(recipe, 1, tokenizer, 0, 1, {}))
    recipe.data.sequence_length = 512
    assert next(streamed_batches(recipe, 1, tokenizer, 0, 1, {}))


def test_a_sample_is_seeded_and_leaves_the_heldout_side_whole(tmp_path):
    rows = [{"instruction": f"question {i}", "response": f"answer {i}"} for i in range(2000)]
    file = rows_file(tmp_path, rows)

    def read(split="train", **options):
        domain = Domain(files=[file], instruction=Instruction(), **options)
        return {row["prompt"] for row in read_documents(domain, split, BadLines())}

    fifth = read(sample=0.2)
    assert 300 < len(fifth) < 460
    assert fifth == read(sample=0.2)
    assert fifth != read(sample=0.2, sample_seed=1)
    assert read("heldout", sample=0.2) == read("heldout")
    assert not fifth & read("heldout")


def test_embedded_functions_are_programs_with_a_description(tmp_path, monkeypatch):
    monkeypatch.setenv("MIGU_CACHE", str(tmp_path))
    monkeypatch.setitem(embedded.PACKAGES, "functions", [])  # the standard library alone: fast
    found = embedded.embedded_documents("functions")
    assert len(found) > 200
    assert found == embedded.embedded_documents("functions")  # from the cache
    for one in found[:50]:
        (function,) = ast.parse(one.response).body
        assert function.name in one.prompt
        assert ast.get_docstring(function) is None


def test_a_hub_dataset_of_instructions(tmp_path):
    rows = [
        {"instruction": f"question {i}", "input": None if i % 2 else "context", "response": f"{i}"}
        for i in range(300)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = Domain(
        hub=str(tmp_path), instruction=Instruction(input="input"), sample=0.5, heldout_fraction=0.1
    )
    train = [document_of(row) for row in read_documents(domain, "train", BadLines())]
    heldout = [document_of(row) for row in read_documents(domain, "heldout", BadLines())]
    assert 90 < len(train) < 180
    assert 15 < len(heldout) < 50
    assert not set(train) & set(heldout)
    assert all(e.context == ("" if int(e.response) % 2 else "context") for e in train)
    domain.instruction = Instruction(response="answer")
    with pytest.raises(UserError, match="no row has the field 'answer'"):
        list(read_documents(domain, "train", BadLines()))
