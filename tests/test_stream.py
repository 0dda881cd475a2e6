"""Streaming: nothing depends on the ranks, who read their own shards, and a position is exact."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.encode import Frame, Tokens
from pipeline.data.packing import Shape
from pipeline.data.stream import Shard, ShardReader, StreamedRows, StreamedSource, merge_states
from pipeline.errors import UserError

LENGTH = 16
ROWS = 12


class NumberEncoder:
    """Documents are numbers with lengths, "7:3": three tokens 7."""

    masked = False

    def encode(self, documents):
        pairs = [map(int, d.split(":")) for d in documents]
        return [Tokens(np.full(length, n, np.int32)) for n, length in pairs]


def sources_of(sizes, shares=(1.0,), epochs=None, opened=None, longest=40):
    """One source a share; its shards hold sizes[i] documents with numbers of their own."""
    rng = np.random.default_rng(0)
    number, sources = 0, []
    for s, share in enumerate(shares):
        shards = []
        for i, size in enumerate(sizes):
            documents = [f"{number + j}:{rng.integers(1, longest)}" for j in range(size)]
            number += size

            def read(documents=documents, key=(s, i)):
                if opened is not None:
                    opened.append(key)
                return iter(documents)

            shards.append(Shard(s, read))
        sources.append(StreamedSource(f"d{s}", shards, share, epochs))
    return sources


def streams(sources, ranks=1, state=None, whole=False, **settings):
    parts = [(s.name, whole) for s in sources]
    settings = {"window": 5, "together": 3, **settings}
    found = [
        StreamedRows(
            sources, parts, NumberEncoder(), Frame([], [], 0), Shape(LENGTH), ROWS,
            rank=rank, ranks=ranks, **settings,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for rows in found if state else []:
        rows.load_state_dict(json.loads(json.dumps(state)))
    return found


def steps_of(ranks, count):
    """Per step the ids of all rows in order."""
    steps = islice(zip(*ranks, strict=True), count)
    return [[s.ids.tolist() for own in zip(*step, strict=True) for s in own] for step in steps]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=15),
    st.sampled_from([(1.0,), (0.7, 0.3)]),
    st.booleans(),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(0, 12),
)
def test_ranks_change_nothing_and_a_position_goes_on_exactly(sizes, shares, whole, a, b, at):
    sources = sources_of(sizes, shares, longest=LENGTH if whole else 40)
    (reference,) = streams(sources, whole=whole)
    expected = steps_of([reference], 20)
    before = streams(sources, a, whole=whole)
    found = steps_of(before, at)
    state = merge_states([rows.state_dict() for rows in before])
    (one,) = streams(sources, whole=whole)
    steps_of([one], at)
    assert sorted(one.unfinished(one.state_dict())) == sorted(one.unfinished(state))
    found += steps_of(streams(sources, b, state, whole=whole), 20 - at)
    assert found == expected


@pytest.mark.parametrize("shards", [1, 5, 12, 30])
def test_an_epoch_reads_every_document_once(shards):
    sizes = np.random.default_rng(1).integers(1, 20, shards)
    (source,) = sources_of(sizes)
    for groups in (1, min(shards, 4)):
        for epoch in range(2):
            read: list[int] = []
            for group in range(groups):
                reader = ShardReader(source, group, groups, (3,), together=3)
                while (place := reader.state_dict())["epoch"] <= epoch:
                    window = reader.window(4)
                    if reader.state_dict()["epoch"] == epoch:
                        read += [int(d.split(":")[0]) for _, d in window]
                    reader.load_state_dict(json.loads(json.dumps(place)))  # and again, exactly
                    assert reader.window(4) == window
            assert sorted(read) == list(range(sizes.sum()))


def test_more_epochs_than_allowed_are_refused():
    (rows,) = streams(sources_of([100] * 12, epochs=2))
    with pytest.raises(UserError, match="d0 is read 2 times, and the stage wants more"):
        steps_of([rows], 10_000)


def test_ranks_read_their_own_shards_where_there_are_enough():
    for shards, shared in ((24, False), (4, False), (3, True)):
        opened: list = [[] for _ in range(4)]
        for rank in range(4):
            sources = sources_of([300] * shards, opened=opened[rank])
            rows = streams(sources, 4)[rank]
            opened[rank].clear()
            next(iter(rows))
        sets = [set(o) for o in opened]
        assert all(sets)
        assert (sum(map(len, sets)) > len(set().union(*sets))) == shared


def test_documents_come_from_several_shards_and_shuffled():
    (rows,) = streams(sources_of([1000] * 8, longest=2), window=100, together=8)
    (first,) = steps_of([rows], 1)
    documents = [i for row in first for i in row]
    assert len({i // 1000 for i in documents}) == 8
    assert max(i % 1000 for i in documents) > 20
    (other,) = steps_of(streams(sources_of([1000] * 8, longest=2), window=100, seed=1), 1)
    assert first != other


def test_weights_are_kept_over_a_thousand_steps():
    sources = sources_of([50] * 12, (0.7, 0.25, 0.05))
    (rows,) = streams(sources)
    tokens = np.zeros(3)
    for sequences in islice(rows, 1000):
        tokens += np.bincount(np.concatenate([s.domains for s in sequences]), minlength=3)
    assert np.abs(tokens / tokens.sum() - [0.7, 0.25, 0.05]).max() < 0.005


def test_a_position_is_small_and_memory_does_not_grow():
    (rows,) = streams(sources_of([200] * 12), window=50)
    steps_of([rows], 300)
    assert len(json.dumps(rows.state_dict())) < 8192
    held = [len(p.corpus.held) for row in rows._rows.values() for p in row.parts]
    assert max(held) < 60


def test_shards_without_documents_are_passed_over():
    sizes = [0, 7, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0]  # a group has one of them in an epoch
    (source,) = sources_of(sizes)
    (rows,) = streams([source])
    found = steps_of([rows], 30)
    assert {i for step in found for row in step for i in row} >= set(range(sum(sizes)))


def test_a_corpus_without_documents_is_an_error():
    (rows,) = streams([StreamedSource("d0", [Shard(0, lambda: iter(["  "]))], 1.0)])
    with pytest.raises(UserError, match=r"data\.domains\.d0: no document"):
        next(iter(rows))
