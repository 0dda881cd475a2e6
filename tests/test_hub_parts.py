"""The files of a data set of the hub are parts of their own: prepared in units, and shared out over
ranks where they are streamed."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import sources, work
from pipeline.data.prepare import describe, prepare
from pipeline.data.streaming import _documents, _read, _units, streamed_batches
from pipeline.data.tokenizer import train_tokenizer
from pipeline.recipe import Data, Domain, Model, Recipe, Stage, Train

TEXTS = [f"Document {i} says " + " ".join(f"word{i * j % 97}" for j in range(i % 20 + 1))
         for i in range(160)]  # fmt: skip
PARTS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(params=["jsonl", "parquet", "csv"])
def recipe(request, tmp_path):
    """Of a folder in the hub's layout; csv is what `datasets` reads, not this project."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(PARTS):
        path, texts = folder / f"train-{i:05d}.{request.param}", TEXTS[i::PARTS]
        if request.param == "jsonl":
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        elif request.param == "parquet":
            pq.write_table(pa.table({"text": texts}), path)
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["text"], *([t] for t in texts)])
    return Recipe(
        name="r",
        model=Model(config={"model_type": "llama"}, objective="causal"),
        data=Data(
            domains={"a": Domain(hub=str(folder), heldout_fraction=0.2)},
            prepared=str(tmp_path / "prepared"),
            sequence_length=32,
            shuffle_window=4,
            prefetch=0,
        ),
        stages=[Stage("a", steps=10)],
        train=Train(batch_size=PARTS),
    )


def test_a_data_set_is_prepared_in_units(recipe, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1)
    monkeypatch.setattr("pipeline.data.prepare._cores", lambda: 1)
    made, make = [], work._make
    monkeypatch.setattr(
        work, "_make", lambda job, u, report: made.append(u) or make(job, u, report)
    )
    assert "to be" in describe(recipe, "a", tokenizer)
    prepared = prepare(recipe, "a", tokenizer)
    assert len(made) == len(prepared.manifest["units"]) == PARTS
    assert len(prepared.manifest["sources"]) == 1
    read = [
        tokenizer.decode(side.piece(i, 0, None).ids, skip_special_tokens=True)
        for side in (prepared.train, prepared.heldout)
        for i in range(side.documents)
    ]
    assert sorted(read) == sorted(TEXTS)
    assert prepare(recipe, "a", tokenizer).folder == prepared.folder
    assert len(made) == PARTS
    recipe.data.domains["a"].max_documents = 50  # counted over the parts in their order
    few = prepare(recipe, "a", tokenizer)
    assert few.train.documents + few.heldout.documents == 50


def test_a_rank_streams_the_parts_of_its_rows_alone(recipe, tokenizer, monkeypatch):
    both = [list(_documents(recipe, "a", side, {})) for side in ("train", "heldout")]
    assert sorted(both[0] + both[1]) == sorted(TEXTS)
    units = _units(recipe, "a", "train")
    parts = [set(_read(recipe, "a", "train", unit, {})) for unit in units]
    assert [len(p) > 0 for p in parts] == [True] * PARTS
    assert set().union(*parts) == set(both[0])

    opened, read = [], sources.read_unit
    monkeypatch.setattr(
        "pipeline.data.streaming.read_unit",
        lambda unit, *rest: opened[-1].add(unit.place + str(unit.hub_part)) or read(unit, *rest),
    )
    steps = []
    for ranks in (1, 2, PARTS):
        per_rank = []
        for rank in range(ranks):
            opened.append(set())
            batches = streamed_batches(recipe, 1, tokenizer, rank, ranks, {})
            taken = [next(batches)[0]["input_ids"].tolist() for _ in range(3)]
            per_rank.append(taken)
        mine = opened[-ranks:]
        assert [len(o) for o in mine] == [PARTS // ranks] * ranks
        assert len(set().union(*mine)) == PARTS
        steps.append([[r for rows in zip(*step, strict=True) for r in rows]
                      for step in zip(*per_rank, strict=True)])  # fmt: skip
    assert steps[0] == steps[1] == steps[2]
