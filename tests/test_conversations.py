"""Chat rows: what is read, and that the assistant's turns alone are learnt."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.bad_lines import BadLines
from pipeline.data.conversations import conversation_of
from pipeline.data.encode import Encoder
from pipeline.data.instruct import Conversation
from pipeline.data.prepare import prepare
from pipeline.data.reader import check_domain, read_file
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.recipe import Data, Domain, Model, Recipe, Stage

TEXT = "the model answers what a user asks and ends its turn with a full stop"
WORDS = TEXT.split()
PLAIN = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<s>assistant\n"
    "{%- generation %}{{ m['content'] }}</s>{% endgeneration %}\n"
    "{% else %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
)
FORGETFUL = (  # as templates that drop the thoughts of earlier turns
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] if loop.last or m['role'] == 'user'"
    " else '...' }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    return train_tokenizer([" ".join(rng.choice(WORDS, 30)) for _ in range(200)], 400)


def rows_of(turns, style="openai"):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    if style == "openai":
        return [{"role": r, "content": c} for r, c in turns]
    return [{"from": names[r], "value": c} for r, c in turns]


text = st.lists(st.sampled_from([*WORDS, "\n", "<x>"]), min_size=1, max_size=8).map(" ".join)
text = text.filter(lambda t: t.strip())
chats = st.tuples(
    st.none() | text, st.lists(st.tuples(text, text), min_size=1, max_size=4)
).map(lambda c: ([("system", c[0])] if c[0] else [])
      + [turn for q, a in c[1] for turn in (("user", q), ("assistant", a))])  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@settings(max_examples=30, deadline=None)
@given(chats, st.sampled_from(["openai", "sharegpt"]))
def test_the_turns_of_the_assistant_are_learnt_and_nothing_else(tokenizer, template, turns, style):
    tokenizer.chat_template = template
    conversation, reason = conversation_of(rows_of(turns, style))
    assert reason is None
    assert conversation == Conversation(tuple(turns))
    (tokens,) = Encoder.of(tokenizer, "causal", "alpaca").encode([conversation])
    assert tokens.whole
    messages = rows_of(turns)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokens.ids) == whole
    # each run of learnt tokens is an answer and what ends it, in their order
    flags = np.concatenate([[False], tokens.predicted, [False]])
    edges = np.flatnonzero(flags[1:] != flags[:-1]).reshape(-1, 2)
    ends = "</s>\n" if template == PLAIN else "</s>"
    learnt = [tokenizer.decode(tokens.ids[a:b]) for a, b in edges]
    assert learnt == [c + ends for r, c in turns if r == "assistant"]
    # what stands before the first answer is what the model is asked with
    if template == PLAIN:
        first = next(i for i, (r, _) in enumerate(turns) if r == "assistant")
        asked = tokenizer.apply_chat_template(
            messages[:first], add_generation_prompt=True
        ).input_ids
        assert tokens.ids[: edges[0, 0]].tolist() == asked


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hello", "not a list"),
        ([], "no message of an assistant"),
        ([{"role": "user", "content": "hi"}], "no message of an assistant"),
        ([{"role": "poet", "content": "hi"}], "message 1: unknown role 'poet'"),
        ([{"role": "user", "content": "hi"}, {"role": "tool", "content": "4"}], "message 2: calls"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "calls a tool"),
        ([{"from": "function_call", "value": "{}"}], "calls a tool"),
        ([{"role": "assistant", "content": None}], "not a string but NoneType"),
        ([{"role": "assistant", "content": " "}], "the answer is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts that are not text"),
        ([{"role": "assistant", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, reason):
    conversation, found = conversation_of(row)
    assert conversation is None
    assert reason in found


def test_what_follows_the_last_answer_is_left_out_and_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = [{"role": "user", "content": parts}, *rows_of([("assistant", "c"), ("user", "d")])]
    assert conversation_of(row)[0] == Conversation((("user", "ab"), ("assistant", "c")))


def test_a_template_that_hides_or_refuses_answers(tokenizer, tmp_path):
    two = Conversation((("user", "a"), ("assistant", "b")) * 2)
    tokenizer.chat_template = FORGETFUL
    encoder = Encoder.of(tokenizer, "causal", "alpaca")
    assert len(encoder.encode([Conversation(two.messages[:2])])[0].ids)
    with pytest.raises(UserError, match=r"writes an answer differently .* generation %}"):
        encoder.encode([two])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Encoder.of(tokenizer, "causal", "alpaca").encode([two])

    tokenizer.chat_template = STRICT + PLAIN  # refuses some rows: they are counted
    chats = [[("user", f"q{i}"), ("assistant", f"a{i}")] for i in range(40)]
    chats += [[("system", "s"), *chat] for chat in chats[:5]]
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "".join(json.dumps({"conversations": rows_of(c, "sharegpt")}) + "\n" for c in chats)
    )
    domain = Domain(files=[str(file)], chat_field="conversations", heldout_fraction=0.2)
    recipe = Recipe("r", Model(path="x", objective="causal"),
                    Data(domains={"a": domain}, prepared=str(tmp_path / "p")),
                    [Stage("a", steps=1)])  # fmt: skip
    prepared = prepare(recipe, "a", tokenizer)
    assert prepared.manifest["refused"] == 5
    assert "no system" in prepared.manifest["refusal"]
    assert prepared.train.documents + prepared.heldout.documents == 40
    assert prepared.train.whole
    assert 0 < prepared.train.predicted < prepared.train.tokens


def test_chats_are_read_from_jsonl_and_parquet_and_bad_rows_located(tmp_path):
    turns = [("system", "s"), ("user", "q"), ("assistant", "a")]
    rows = [rows_of(turns), [{"role": "tool", "content": "x"}], rows_of(turns[1:])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    pq.write_table(pa.table({"messages": rows, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        domain = Domain(files=[str(tmp_path / name)], chat_field="messages")
        bad = BadLines()
        found = list(read_file(str(tmp_path / name), domain, bad))
        assert found == [Conversation(tuple(turns)), Conversation(tuple(turns[1:]))]
        assert [(n, "tool" in reason) for _, n, reason in bad.examples] == [(2, True)]
    wrong = Domain(files=[str(tmp_path / "a.jsonl")], chat_field="conversations")
    with pytest.raises(UserError, match=r"'conversations'; fields seen: 'messages'.*`chat_field`"):
        list(read_file(str(tmp_path / "a.jsonl"), wrong, BadLines()))


def test_settings_that_do_not_go_together(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for domain, message in (
        (Domain(files=[str(tmp_path / "a.txt")], chat_field="m"), "no field for messages"),
        (Domain(embedded="prose", chat_field="m"), "has no conversations"),
        (Domain(files=[str(tmp_path / "a.txt")], chat_field=""), "chat_field: is empty"),
    ):
        assert any(message in problem for problem in check_domain("a", domain))
