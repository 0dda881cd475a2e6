"""Reading, tokenizing and packing: nothing lost, nothing doubled, the same on every rank."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data import embedded
from pipeline.data.bad_lines import BadLines
from pipeline.data.reader import check_domain, read_documents
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.errors import UserError
from pipeline.recipe import Domain
from tests.corpora import packed

TEXTS = [f"Document {i} says " + " ".join(f"word{i * j % 97}" for j in range(i % 40 + 1))
         for i in range(200)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def rows(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(domain, split="train", bad=None):
    return [row["text"] for row in read_documents(domain, split, bad or BadLines())]


def everything(path, bad=None, **settings):
    """A whole file, through the settings that hold nothing out."""
    settings = {"text_field": "text", **settings}
    other = path.parent / "other.txt"
    other.write_text("held out")
    return read(Domain(files=[str(path)], heldout_files=[str(other)], **settings), bad=bad)


# embedded corpora


def test_embedded_corpora_are_code_without_comments_and_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIGU_CACHE", str(tmp_path))
    documents = embedded.embedded_documents("cpp")
    assert 1_000_000 < sum(len(d.encode()) for d in documents) <= embedded.MAX_BYTES
    assert not any("/*" in d.replace('"/*', "") for d in documents[:100])
    monkeypatch.setattr(embedded, "_extract", lambda name: pytest.fail("not from the cache"))
    assert embedded.embedded_documents("cpp") == documents

    (file,) = tmp_path.glob("*.jsonl.gz")
    file.write_bytes(file.read_bytes()[:1000])  # damaged: extracted again
    monkeypatch.setattr(embedded, "_extract", lambda name: ["fresh"])
    assert embedded.embedded_documents("cpp") == ["fresh"]


def test_python_without_comments_and_docstrings(tmp_path):
    source = (
        '"""Module."""\nx = "# no comment"  # comment\n# whole line\n\n\ndef f():\n'
        '    """Doc."""\n\n\nclass A:\n    """Doc\n    two."""\n\n    y = 1\n'
    )
    (tmp_path / "a.py").write_text(source)
    bare = embedded._bare_python(tmp_path / "a.py")
    assert " ".join(bare.split()) == 'x = "# no comment" def f(): pass class A: y = 1'
    compile(bare, "a.py", "exec")


def test_paragraphs_are_deduplicated_across_documents():
    long, other = "a paragraph " * 40, "another one " * 40
    found = list(
        embedded._without_repeats([f"{long}\n\n{other}", long, f"{other}\n\n" + "b " * 200])
    )
    assert found == [f"{long}\n\n{other}", "b " * 200]


def test_an_embedded_corpus_that_is_not_there_names_the_choices(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"'poems'.*prose, math"):
        embedded.embedded_documents("poems")
    monkeypatch.setenv("MIGU_CACHE", str(tmp_path))
    monkeypatch.setitem(embedded.PACKAGES, "math", ["not_installed_here"])
    with pytest.raises(UserError, match="pip install not_installed_here"):
        embedded.embedded_documents("math")


# reader


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".parquet"]
)
def test_every_file_type_gives_the_same_documents(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    data = rows(TEXTS) if ".jsonl" in suffix else "\n\n".join(TEXTS).encode()
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS, "other": range(200)}), path)
    elif suffix.endswith(".gz"):  # two members, as `cat a.gz b.gz` gives
        path.write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
    elif suffix.endswith(".zst"):
        path.write_bytes(zstandard.compress(data[:999]) + zstandard.compress(data[999:]))
    else:
        path.write_bytes(data)
    assert everything(path) == TEXTS


def test_broken_rows_are_skipped_counted_and_located(tmp_path):
    path, bad = tmp_path / "a.jsonl", BadLines()
    path.write_bytes(
        b'{"text": "one"}\n{"text": "two"\n\n[1]\n{"txt": "x"}\n{"text": 5}\n{"text": "  "}\n'
        b'{"text": "\\ud800"}\n\xff\xfe\n{"text": "three"}'
    )
    assert everything(path, bad) == ["one", "three"]
    assert bad.count == 6
    assert bad.blank == 1
    assert [line for _, line, _ in bad.examples] == [2, 4, 5, 6, 8, 9]
    assert bad.examples[2] == (str(path), 5, "no field 'text'")
    everything(path, bad)
    assert (bad.count, bad.blank) == (6, 1)  # a second epoch meets the same lines


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_a_truncated_archive_keeps_the_rows_before(tmp_path, compress):
    texts = [f"{i} {np.random.default_rng(i).bytes(50).hex()}" for i in range(3000)]
    path, bad = tmp_path / f"a.jsonl.{'gz' if compress is gzip.compress else 'zst'}", BadLines()
    whole = compress(rows(texts))
    path.write_bytes(whole[: len(whole) * 2 // 3])
    kept = everything(path, bad)
    assert len(kept) > 1000 if compress is gzip.compress else len(kept) > 500
    assert kept == texts[: len(kept)]
    assert bad.count == 1
    assert "truncated" in bad.examples[0][2]
    assert bad.damaged == bad.examples  # said apart: more than that row is lost
    path.write_bytes(whole[:20] + bytes(10_000) + whole[20:])
    with pytest.raises(UserError, match=r"only the first \d+% of it can be read \(damaged archive"):
        everything(path)


def test_too_many_broken_rows_stop_with_their_places(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"{broken\n" * 10)
    with pytest.raises(UserError, match=rf"more than 5 .*\n  {path}:2: not JSON"):
        everything(path, BadLines(budget=5))


@pytest.mark.parametrize("count", [3, 300])
def test_a_wrong_text_field_is_named_with_those_that_are_there(tmp_path, count):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "x", "id": 1}\n' * count)
    with pytest.raises(
        UserError, match=r"a\.jsonl: no row .* 'text'; fields seen: 'content', 'id'"
    ):
        everything(path)
    assert everything(path, text_field="content") == ["x"] * count
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="fields seen: 'content'"):
        everything(tmp_path / "a.parquet")


def test_a_corpus_without_documents_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match="no documents"):
        everything(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("one document")
    with pytest.raises(UserError, match=r"1 documents? .*heldout.*raise `heldout_fraction`"):
        read(Domain(files=[str(tmp_path / "b.txt")], heldout_fraction=1e-9), "heldout")
    with pytest.raises(UserError, match="no such file"):
        read(Domain(files=[str(tmp_path / "c.txt")]))


def test_the_split_by_hash_keeps_duplicates_together_and_loses_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(rows(TEXTS[::-1]))
    domain = Domain(files=[str(tmp_path / "*.jsonl")], heldout_fraction=0.2)
    train, heldout = read(domain), read(domain, "heldout")
    assert sorted(train + heldout) == sorted(TEXTS * 2)
    assert not set(train) & set(heldout)
    assert 40 < len(heldout) < 130
    domain.max_documents = 50
    assert len(read(domain)) + len(read(domain, "heldout")) == 50


@pytest.mark.parametrize("source", ["files", "hub"])
def test_reading_resumes_exactly(tmp_path, source):
    lines = rows(TEXTS).splitlines(keepends=True)
    lines[20:20] = [b'{"text": ""}\n'] * 3
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    path = str(tmp_path)
    domain = Domain(hub=path) if source == "hub" else Domain(files=[f"{path}/*.jsonl"])
    domain.heldout_fraction = 0.2
    bad = BadLines()
    documents = read_documents(domain, "train", bad)
    full = list(documents)
    assert (bad.count, bad.blank) == (0, 3)
    assert 130 < len(full) < 190
    iterator = iter(documents)
    head = list(itertools.islice(iterator, 77))
    state = json.loads(json.dumps(documents.state_dict()))
    again = read_documents(domain, "train", BadLines())
    again.load_state_dict(state)
    assert head + list(again) == full


def test_a_hub_folder_has_the_same_rules(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(rows(TEXTS))
    (tmp_path / "test.jsonl").write_bytes(rows(["held out"]))
    domain = Domain(hub=str(tmp_path), heldout_split="test")
    assert read(domain) == TEXTS
    assert read(domain, "heldout") == ["held out"]
    domain.max_documents = 7
    assert read(domain) == TEXTS[:7]
    domain.text_field = "content"
    with pytest.raises(UserError, match=r"'content'; fields seen: 'text'"):
        read(domain)
    with pytest.raises(UserError, match=r"split 'dev', cannot be opened"):
        read(Domain(hub=str(tmp_path), split="dev"))


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (Domain(), "give exactly one of"),
        (Domain(embedded="prose", hub="a/b"), "not embedded and hub"),
        (Domain(embedded="poems"), "x.embedded: no embedded corpus is called 'poems'"),
        (Domain(files=["nowhere/*.jsonl"]), "x.files: no file matches nowhere"),
        (Domain(files=[__file__]), "unknown file type"),
        (Domain(files=[str(Path(__file__).parent)]), "is a folder"),
        (Domain(embedded="prose", heldout_fraction=1.5), "x.heldout_fraction: 1.5 is outside"),
        (Domain(embedded="prose", heldout_split="test"), "x.heldout_split: has no effect"),
        (Domain(embedded="prose", max_documents=0), "x.max_documents"),
    ],
)
def test_wrong_settings_of_a_domain_name_their_key(domain, message):
    (problem,) = check_domain("x", domain)
    assert problem.startswith("data.domains.x")
    assert message in problem


def test_what_is_trained_on_is_not_held_out(tmp_path):
    (tmp_path / "held.jsonl").touch()
    files = Domain(
        files=[f"{tmp_path}/*.jsonl"], heldout_files=[f"{tmp_path}/../{tmp_path.name}/held.jsonl"]
    )
    (problem,) = check_domain("x", files)
    assert "x.heldout_files" in problem
    assert f"{tmp_path}/held.jsonl is in `files` too" in problem
    (problem,) = check_domain("x", Domain(hub="a/b", split="test", heldout_split="test"))
    assert "x.heldout_split: 'test' is the split that is trained on" in problem


def test_right_settings_of_a_domain_have_no_problem(tmp_path):
    (tmp_path / "a.jsonl.zst").touch()
    assert check_domain("x", Domain(files=[f"{tmp_path}/*.zst"])) == []
    assert check_domain("x", Domain(hub="a/b", hub_config="en", heldout_split="test")) == []


# tokenizer


def test_a_trained_tokenizer_is_deterministic_complete_and_loads_back(tmp_path, tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == list(
        range(5)
    )
    assert train_tokenizer(TEXTS, 400).get_vocab() == tokenizer.get_vocab()
    text = "Ünïcode 漢字\tword1 </x>"
    ids = tokenizer(text).input_ids
    assert ids[0] == 0
    assert ids[-1] == 2
    assert 3 not in ids
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(text).input_ids == ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded.mask_token_id == tokenizer.mask_token_id == 4


def test_bpe_files_alone_become_the_right_tokenizer(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    assert (
        load_tokenizer(str(tmp_path))("word1 <mask>").input_ids
        == tokenizer("word1 <mask>").input_ids
    )
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary = {k: v for k, v in vocabulary.items() if k != "<mask>"} | {"<|endoftext|>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    plain = load_tokenizer(str(tmp_path))
    assert plain.eos_token_id == 4
    assert plain("word1").input_ids == tokenizer("word1", add_special_tokens=False).input_ids


def test_a_tokenizer_that_cannot_be_used_is_explained(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer("./nowhere")
    with pytest.raises(UserError, match=r"needs tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="only 2 entries"):
        load_tokenizer(str(tmp_path))


# packing


def test_every_token_of_an_epoch_is_packed_once(tokenizer):
    """The pieces of a document, put together again, are the document; padding is rare."""
    sequences = packed(TEXTS, tokenizer, 32, "masked")
    content, padding = [], 0
    for s in sequences:
        assert s.ids.dtype == s.words.dtype == np.int32
        assert s.segments.dtype == np.int16
        for segment in range(s.segments.max() + 1):
            piece = s.ids[s.segments == segment]
            assert piece[0] == 0
            assert piece[-1] == 2
            content += piece[1:-1].tolist()
        assert ((s.words >= 0) == ((s.segments >= 0) & (s.ids != 0) & (s.ids != 2))).all()
        padding += int((s.segments < 0).sum())
    ids = tokenizer(TEXTS, add_special_tokens=False).input_ids
    assert content == list(itertools.chain.from_iterable(ids))
    assert padding < 0.1 * 32 * len(sequences)

    causal = packed(TEXTS, tokenizer, 32, "causal")
    joined = np.concatenate([s.ids[s.segments >= 0] for s in causal])
    assert joined.tolist() == list(itertools.chain.from_iterable([0, *i, 2] for i in ids))
    assert all((s.segments >= 0).all() for s in causal[:-1])


def test_words_are_whole_words(tokenizer):
    (sequence,) = packed(["zebra quagga okapi", "and more"], tokenizer, 64, "masked")
    words = [
        tokenizer.decode(sequence.ids[sequence.words == w]).strip()
        for w in range(sequence.words.max() + 1)
    ]
    assert words == ["zebra", "quagga", "okapi", "and", "more"]


def test_special_tokens_in_a_document_are_text(tokenizer):
    (sequence,) = packed(["a <mask> b </s> c"], tokenizer, 64, "masked")
    assert 4 not in sequence.ids
    assert (sequence.ids == 2).sum() == 1
    assert tokenizer("<mask>", add_special_tokens=False).input_ids == [
        4
    ]  # the caller's is as it was


def test_a_tokenizer_without_mask_cannot_feed_a_masked_model(tokenizer):
    from transformers import PreTrainedTokenizerFast

    causal = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>"
    )
    with pytest.raises(UserError, match="no mask_token and no pad_token"):
        packed(TEXTS, causal, 32, "masked")
