"""A response's tokens are those that continue the prompt's, whatever the kind of tokenizer."""

import datetime

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.encode import Encoder
from pipeline.data.instruct import Conversation, Example, prompt_text
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n", "the sum of two numbers", "Response:\nwrite it"] * 20
TEXTS.append(prompt_text("alpaca", None, "add two numbers", "one and two"))
RESPONSES = ["the sum", "  return x", "\n\nthe sum\n", "def f(x):\n    return x + 1", "é, 1"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHAT_MARKED = (  # the response stands directly behind a special token
    "{% for m in messages %}{{ bos_token }}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)

TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS_MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(folder):
    return train_tokenizer(TEXTS, 400)


def sentencepiece_bpe(folder):
    """Like Llama-2's: a blank in front of every text, bytes for unknown characters."""
    (folder / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    return load_tokenizer(str(folder))


def unigram(folder):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import decoders

    backend.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False,
        initial_alphabet=sorted(set("".join(RESPONSES))),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def word_piece(folder):
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    from tokenizers import decoders

    backend.decoder = decoders.WordPiece(cleanup=False)
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(set("".join([*TEXTS, *RESPONSES]))),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram, word_piece])
@pytest.mark.parametrize("template", ["alpaca", CHAT, CHAT_MARKED], ids=["alpaca", "chat", "mark"])
def test_a_response_continues_its_prompt(tmp_path, make, template):
    tokenizer = make(tmp_path)
    kind = "alpaca" if template == "alpaca" else "chat"
    tokenizer.chat_template = None if kind == "alpaca" else template
    encoder = Encoder.of(tokenizer, "causal", kind)
    for response in RESPONSES:
        example = Example("add two numbers", "one and two", response)
        (tokens,) = encoder.encode([example])
        learnt = tokens.predicted
        prompt = prompt_text(kind, tokenizer, example.prompt, example.context)
        # what evaluation and generation give the model
        given = (
            encoder.before * (kind == "alpaca")
            + (tokenizer(prompt, add_special_tokens=False)["input_ids"])
        )
        assert tokens.ids[~learnt].tolist() == given
        assert not learnt[: len(given)].any()

        def read(ids):
            return tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)

        whole, head = read(tokens.ids), read(tokens.ids[~learnt])
        assert whole.startswith(head)
        answer = whole[len(head) :].replace("</s>", "")
        if make is word_piece:  # writes blanks of its own between words
            assert "".join(answer.split()) == "".join(response.split())
        else:
            assert answer == (" " if template == CHAT else "") + response


words = st.lists(
    st.sampled_from(["the", "sum", "def f(x):", "  return", "é", "\n", "\n\n", "Response:", "1"]),
    min_size=1,
    max_size=6,
).map(" ".join)  # fmt: skip
asked = words.map(str.strip).filter(bool)
chats = st.lists(st.tuples(asked, st.tuples(st.sampled_from(["", "\n", " "]), asked)), min_size=1,
                 max_size=4)  # fmt: skip


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
@pytest.mark.parametrize("template", [CHAT, TURNS, TURNS_MARKED], ids=["inst", "turns", "mark"])
def test_every_answer_of_a_conversation_continues_its_prompt(tmp_path, make, template):
    tokenizer = make(tmp_path)
    tokenizer.chat_template = template
    encoder = Encoder.of(tokenizer, "causal", "chat")

    def given_to_the_model(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def read(ids):
        return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    @settings(max_examples=40, deadline=None)
    @given(chats)
    def check(chat):
        messages = []
        for question, (before, answer) in chat:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": before + answer})
        conversation = Conversation(tuple((m["role"], m["content"]) for m in messages))
        (tokens,) = encoder.encode([conversation])
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert read(tokens.ids.tolist()) == read(
            tokenizer(whole, add_special_tokens=False)["input_ids"]
        )
        edges = np.flatnonzero(np.diff(tokens.predicted.astype(int), prepend=0, append=0))
        assert len(edges) == 2 * len(chat)
        end = 0
        for turn, (begin, next_end) in enumerate(edges.reshape(-1, 2).tolist()):
            given = given_to_the_model(messages[: 2 * turn + 1])
            asked = tokens.ids[:begin].tolist()
            if not any(before for _, (before, _) in chat[:turn]):
                assert asked == given
            # a blank that an answer begins with may be part of a longer token where the text is
            # read again; what is asked after it is the same
            assert asked[end:] == given[end - begin :]
            end = next_end

    check()


def test_a_template_with_a_date_prints_the_same_one_every_day(monkeypatch):
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 2, 3)

    tokenizer = byte_level(None)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} {{ messages[0]['content'] }}"
    first = prompt_text("chat", tokenizer, "hello", None)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    ).startswith("03 February 2031")
    assert prompt_text("chat", tokenizer, "hello", None) == first == "26 July 2024 hello"
    tokenizer.chat_template = "{% set f = '%d' %}{{ strftime_now(f) }}"
    with pytest.raises(UserError, match="prints today's date"):
        prompt_text("chat", tokenizer, "hello", None)
