"""Tokenizers encode as the library that they come from, and are asked for what they do."""

import json
import shutil

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.data.encode import Encoder
from pipeline.data.tokenizer import (
    load_tokenizer,
    never_drawn,
    text_frame,
    train_tokenizer,
    vocabulary_size,
)
from pipeline.errors import UserError

CODE = ["def f(x):\n    return x + 1\n", "for i in range(3):\n        print(i)\n"]
CORPUS = [
    *CODE, "  two  blanks", "tokens stream into packing windows", "é漢\t", "a<sep>b<sep> c",
    "<sep>", "x <sep>y\n<sep>", "<s> is text </s>", "\n\n", "    if x:\n        y",
    "re<sep>return ret",
]  # fmt: skip
PLAIN = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = " ".join(f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nprst")
    lines = [words, *(line for text in CORPUS for line in text.splitlines())]
    file.write_text("\n".join(lines * 40), encoding="utf-8")
    return file


def train(corpus, folder, name="tokenizer.model", **options):
    """A folder with a SentencePiece model, and the library's own processor for it."""
    folder.mkdir()
    size = 400 if options.get("byte_fallback") else 130
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "m"), vocab_size=size, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    (folder / "m.model").rename(folder / name)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<sep>", "▁▁▁▁", "ret"]},
        {"user_defined_symbols": ["<sep>"], "add_dummy_prefix": False},
        {"byte_fallback": False},
    ],
)
def test_a_sentencepiece_bpe_encodes_as_the_library_does(tmp_path, corpus, options):
    original = train(corpus, tmp_path / "model", **{**PLAIN, **options})
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert vocabulary_size(loaded) == original.vocab_size()
    loaded.save_pretrained(tmp_path / "saved")
    for tokenizer in (loaded, load_tokenizer(str(tmp_path / "saved"))):
        encoder = Encoder.of(tokenizer, "causal", "alpaca")  # what a corpus goes through
        for text in CORPUS:
            ids = [original.bos_id(), *original.encode(text), original.eos_id()]
            assert encoder.encode([text])[0].ids.tolist() == ids
            if original.unk_id() not in ids:
                assert tokenizer.decode(original.encode(text)) == text


def test_what_the_fast_tokenizer_does_otherwise_is_refused(tmp_path, corpus):
    """A unigram model that transformers converts is right; blanks behind the words are not."""
    options = {"unk_id": 2, "pad_id": 0, "eos_id": 1, "bos_id": -1}  # T5's
    for name, more in (("right", {}), ("wrong", {"treat_whitespace_as_suffix": True})):
        original = train(corpus, tmp_path / name, "spiece.model", **options, **more)
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 40}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        if name == "wrong":
            with pytest.raises(UserError, match=r"SentencePiece as .* tokenizer\.json"):
                load_tokenizer(str(tmp_path / name))
            continue
        tokenizer = load_tokenizer(str(tmp_path / name))
        for text in CORPUS[:5]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == original.encode(text)


def test_added_tokens_and_special_tokens_written_as_objects(tmp_path, corpus):
    original = train(corpus, tmp_path / "a", **PLAIN)
    size = original.vocab_size()
    added = {"<tool>": size + 3, "<user>": size}  # a hole between them
    (tmp_path / "a/added_tokens.json").write_text(json.dumps(added))
    config = {"pad_token": {"content": "<user>", "lstrip": False}, "eos_token": {"content": "</s>"}}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/added_tokens.json").unlink()
    config["added_tokens_decoder"] = {str(i): {"content": t} for t, i in added.items()}
    (tmp_path / "b/tokenizer_config.json").write_text(json.dumps(config))
    for folder in "ab":
        tokenizer = load_tokenizer(str(tmp_path / folder))
        ids = tokenizer("x<tool>y", add_special_tokens=False)["input_ids"]
        assert size + 3 in ids
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (size, original.eos_id())
        assert vocabulary_size(tokenizer) == size + 4 > len(tokenizer)
        assert {size + 1, size + 2} <= set(never_drawn(tokenizer))  # no mask puts them into a text


def test_a_damaged_model_is_said(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xffnot a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [("$A", [], []), ("[g] [s] $A", ["[g]", "[s]"], []), ("[s] $A [e]", ["[s]"], ["[e]"])],
)
def test_a_tokenizer_says_how_it_frames_a_text(single, before, after):
    words = {w: i for i, w in enumerate(["a", "[g]", "[s]", "[e]", "[u]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[u]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(w, special=True) for w in words if w != "a"])
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=list(words.items())[1:]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[e]", unk_token="[u]")
    frame = [words[w] for w in before], [words[w] for w in after]
    assert text_frame(tokenizer) == frame
    encoder = Encoder.of(tokenizer, "causal", "alpaca")
    assert encoder.encode(["a a"])[0].ids.tolist() == [*frame[0], 0, 0, words["[e]"]]


def test_specials_are_never_drawn():
    tokenizer = train_tokenizer(CORPUS, 300)
    assert never_drawn(tokenizer) == (0, 1, 2, 3, 4)
    assert vocabulary_size(tokenizer) == len(tokenizer)
