"""Rows from documents: nothing lost, nothing twice, whatever the ranks, and resumable anywhere."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.encode import Frame
from pipeline.data.mixture import Mixture, Part, Source
from pipeline.data.packing import POOL, SMALLEST_PIECE, Packer, Shape
from pipeline.data.sequences import read_rows
from tests.corpora import MemoryCorpus

LENGTH = 32


@st.composite
def stages(draw):
    """(parts, epochs, rows, ends, seed): texts, or examples, or both."""
    ends = draw(st.sampled_from([0, 2]))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    parts = []
    for i in range(draw(st.integers(1, 3))):
        whole = not ends and draw(st.booleans())
        longest = LENGTH + 3 if whole else draw(st.sampled_from([5, 40, 300]))
        lengths = rng.integers(0, longest, draw(st.integers(1, 25)))
        parts.append(Part(f"d{i}", MemoryCorpus([*lengths, 4], 100 + 10_000 * i, whole)))
    epochs = draw(st.floats(0.3, 2.7))
    return parts, epochs, draw(st.sampled_from([1, 2, 4, 12])), ends, draw(st.integers(0, 9))


def packer(stage):
    parts, epochs, rows, ends, seed = stage
    documents = sum(p.corpus.documents for p in parts)
    limit = max(1, round(epochs * documents))
    source = Source(parts, range(len(parts)), (seed,), limit=limit)
    pool = POOL if any(p.corpus.whole for p in parts) else 0
    return Packer(Mixture([source], LENGTH), rows, Shape(LENGTH, ends), pool)


def expected(stage):
    """How often each (part, place) is drawn, by its definition."""
    parts, epochs, _, _, seed = stage
    documents = sum(p.corpus.documents for p in parts)
    source = Source(parts, range(len(parts)), (seed,))
    draws = [source.get(i) for i in range(max(1, round(epochs * documents)))]
    return Counter(
        (part, place)
        for part, place, length in draws
        if length and not (parts[part].corpus.whole and length > LENGTH)
    )


@settings(max_examples=60)
@given(stages())
def test_an_epoch_is_every_document_once_and_only_the_last_step_has_room(stage):
    parts, epochs, count, ends, _ = stage
    steps = list(packer(stage))
    read: Counter = Counter()
    for step in steps:
        for row in step:
            assert sum(p.stop - p.start + ends for p in row) <= LENGTH
            for part, place, start, stop in row:
                assert start < stop
                read.update((part, place, i) for i in range(start, stop))
                if parts[part].corpus.whole:
                    assert (start, stop) == (0, parts[part].corpus.all_lengths[place])
    want = expected(stage)
    for (part, place), times in want.items():
        for i in range(parts[part].corpus.all_lengths[place]):
            assert read.pop((part, place, i)) == times
    assert not read
    documents = sum(p.corpus.documents for p in parts)
    for part, place in want:  # an epoch ends before the next begins
        assert int(epochs) <= want[part, place] + (round(epochs * documents) == 0)
        assert want[part, place] <= int(epochs) + 1
    if not ends and not any(p.corpus.whole for p in parts):
        tokens = sum(parts[d].corpus.all_lengths[p] * n for (d, p), n in want.items())
        assert len(steps) == -(-tokens // (count * LENGTH))


@settings(max_examples=60)
@given(stages(), st.data())
def test_a_position_of_any_step_gives_the_same_rest(stage, data):
    steps = list(packer(stage))
    at = data.draw(st.integers(0, len(steps)))
    before = packer(stage)
    assert list(islice(before, at)) == steps[:at]
    state = json.loads(json.dumps(before.state_dict()))
    after = packer(stage)
    after.load_state_dict(state)
    assert after.state_dict() == state
    assert list(after) == steps[at:]
    assert not after.unfinished() if at == len(steps) else True


def test_a_long_document_is_spread_over_the_steps():
    parts = [Part("texts", MemoryCorpus([LENGTH * 6, *[10] * 200]))]
    steps = list(packer((parts, 1.0, 4, 0, 0)))
    places = [[i for i, row in enumerate(s) if any(p.place == 0 for p in row)] for s in steps]
    held = [p for p in places if p]
    assert all(p == held[0] and len(p) == 1 for p in held)
    assert len(held) in (6, 7)


def test_examples_waste_little_and_none_waits_for_ever():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 300, 3000)
    parts = [Part("examples", MemoryCorpus(lengths, whole=True))]
    source = Source(parts, [0], (1,), limit=3000)
    steps = list(Packer(Mixture([source], 512), 8, Shape(512), POOL))
    rows = [row for step in steps for row in step]
    assert 1 - lengths.sum() / (len(rows) * 512) < 0.02
    order = {source.get(i)[1]: i for i in range(3000)}
    taken = [order[p.place] for row in rows for p in row]
    late = max(i - draw for i, draw in enumerate(taken))
    assert late < 128 * 10  # at most as many rows as wait


def test_cut_documents_of_masked_models_leave_no_tiny_pieces():
    parts = [Part("texts", MemoryCorpus(np.random.default_rng(0).integers(20, 90, 200)))]
    pieces = [p for step in packer((parts, 1.0, 4, 2, 0)) for row in step for p in row]
    assert min(p.stop - p.start for p in pieces) >= SMALLEST_PIECE


@settings(max_examples=30)
@given(stages())
def test_rows_are_read_as_planned(stage):
    parts, _, count, ends, _ = stage
    frame = Frame([1] * (ends // 2), [2] * (ends // 2), 3)
    for step in packer(stage):
        sequences = read_rows(step, parts, LENGTH, frame)
        assert len(sequences) == count
        for row, s in zip(step, sequences, strict=True):
            ids: list[int] = []
            for piece in row:
                document = parts[piece.part].corpus.piece(piece.place, piece.start, piece.stop)
                body = document.ids.tolist()
                at = len(ids)
                ids += [*frame.before, *body, *frame.after]
                here = slice(at, len(ids))
                assert set(s.domains[here]) == {piece.part}
                assert len(set(s.segments[here])) == 1
                if parts[piece.part].corpus.whole:
                    assert (s.predicted[here] == document.predicted).all()
                elif not ends:
                    assert s.predicted[here].all()
                words = s.words[here][s.words[here] >= 0]
                assert len(words) == (len(body) if ends else 0)
                if ends:
                    starts = [j == 0 or document.word_starts[j] for j in range(len(body))]
                    assert (np.diff(words, prepend=words[0] - 1) == starts).all()
            assert s.ids.tolist() == ids + [3] * (LENGTH - len(ids))
            padding = slice(len(ids), None)
            assert (s.segments[padding] == -1).all()
            assert (s.domains[padding] == -1).all()
            assert not s.predicted[padding].any()
            assert (s.words[padding] == -1).all()
            order = s.words[s.words >= 0]
            assert (np.diff(order, prepend=-1) <= 1).all()
            assert (np.diff(order) >= 0).all()


def test_a_mixture_of_documents_has_the_shares_of_its_weights_over_the_steps():
    rng = np.random.default_rng(0)
    weights = [0.7, 0.25, 0.05]
    parts = [
        Part(str(i), MemoryCorpus(rng.integers(2, n, 300))) for i, n in enumerate([90, 400, 9])
    ]
    sources = [Source(parts, [i], (i,), weight=w) for i, w in enumerate(weights)]
    packed = Packer(Mixture(sources, 64), 8, Shape(64))
    tokens = np.zeros(3)
    for step in islice(packed, 1000):
        for row in step:
            for p in row:
                tokens[p.part] += p.stop - p.start
    assert np.abs(tokens / tokens.sum() - weights).max() < 0.005


@pytest.mark.parametrize("unfinished", [0, 3])
def test_what_the_end_of_a_stage_cuts_is_known(unfinished):
    parts = [Part("texts", MemoryCorpus([LENGTH + 1] * 40))]
    packed = Packer(Mixture([Source(parts, [0], (1,), limit=40)], LENGTH), 4, Shape(LENGTH))
    taken = list(islice(packed, 3 if unfinished else None))
    read = Counter(
        p.place for step in taken for row in step for p in row for _ in range(p.start, p.stop)
    )
    cut = [n for n in read.values() if n <= LENGTH]
    found = packed.unfinished()
    assert found == ([[0, len(cut), sum(LENGTH + 1 - n for n in cut)]] if unfinished else [])
