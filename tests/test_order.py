"""The order of the documents, and which source gives the next one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.mixture import Mixture, Part, Source
from pipeline.data.order import Permutation
from tests.corpora import MemoryCorpus


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_every_number_stands_at_one_place_and_any_place_is_known_alone(size, seed):
    order = Permutation(size, seed)(np.arange(size))
    assert sorted(order) == list(range(size))
    places = np.random.default_rng(0).integers(size, size=5)
    assert Permutation(size, seed)(places).tolist() == order[places].tolist()


def test_the_largest_corpora_have_an_order_too():
    for size in (2**40 - 1, 2**40 + 1, 2**62):
        places = np.arange(size - 1000, size)
        order = Permutation(size, (1,))(places)
        assert len(set(order.tolist())) == 1000
        assert order.min() >= 0
        assert order.max() < size


@pytest.mark.parametrize("size", [3, 4])
def test_small_orders_are_all_equally_likely(size):
    """Chi-square over all size! orders; the seeds are fixed, 5 sigma."""
    orders: dict[tuple, int] = {}
    draws = 2000
    for seed in range(draws):
        order = tuple(Permutation(size, (seed, 0))(np.arange(size)).tolist())
        orders[order] = orders.get(order, 0) + 1
    count = int(np.prod(range(1, size + 1)))
    expected = draws / count
    chi2 = sum((n - expected) ** 2 / expected for n in orders.values())
    chi2 += (count - len(orders)) * expected
    assert chi2 < count - 1 + 5 * np.sqrt(2 * (count - 1))


def test_the_first_examples_come_from_all_of_the_corpus_in_proportion():
    """Two files one after the other, as a run on two sets of examples has them."""
    sizes, first, seeds = np.array([359, 5659]), 200, 200
    firsts = [Permutation(sizes.sum(), (seed, 0))(np.arange(first)) for seed in range(seeds)]
    of_first_file = np.array([(f < sizes[0]).sum() for f in firsts])
    share = sizes[0] / sizes.sum()
    # hypergeometric
    variance = first * share * (1 - share) * (sizes.sum() - first) / (sizes.sum() - 1)
    chi2 = ((of_first_file - first * share) ** 2 / variance).sum()
    assert abs(chi2 - seeds) < 5 * np.sqrt(2 * seeds)
    assert abs(of_first_file.mean() - first * share) < 5 * np.sqrt(variance / seeds)


@pytest.mark.parametrize("members", [[0, 1], [1, 0, 2]])
def test_a_source_gives_every_document_of_its_parts_once_an_epoch(members):
    parts = [Part(str(i), MemoryCorpus(n)) for i, n in enumerate(([3] * 50, [5] * 7, [2]))]
    documents = {(m, p) for m in members for p in range(parts[m].corpus.documents)}
    source = Source(parts, members, (3,))
    epochs = []
    for epoch in range(3):
        draws = [source.get(epoch * len(documents) + i) for i in range(len(documents))]
        assert all(length == (3, 5, 2)[part] for part, _, length in draws)
        epochs.append([d[:2] for d in draws])
        assert len(draws) == len(documents)
        assert {d[:2] for d in draws} == documents
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.get(len(documents)) == Source(parts, members, (3,)).get(len(documents))
    assert source.tokens == sum(sum(parts[m].corpus.all_lengths) for m in members)


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    st.lists(st.integers(1, 400), min_size=4, max_size=4),
    st.integers(0, 100),
)
def test_a_mixture_keeps_its_shares_to_within_two_documents(weights, longest, seed):
    rng = np.random.default_rng(seed)
    parts = [Part(str(i), MemoryCorpus(rng.integers(1, n + 1, 30))) for i, n in enumerate(longest)]
    sources = [Source(parts, [i], (seed, i), weight=w) for i, w in enumerate(weights)]
    mixture = Mixture(sources, longest=10**6)
    for _ in range(500):
        mixture.draw()
        total, whole = sum(mixture.tokens), sum(weights)
        for weight, tokens in zip(weights, mixture.tokens, strict=True):
            assert abs(weight / whole * total - tokens) <= len(weights) * max(longest)


def test_documents_that_cannot_be_packed_are_left_out():
    parts = [Part("examples", MemoryCorpus([5, 0, 90, 7], whole=True))]
    mixture = Mixture([Source(parts, [0], (1,), limit=4)], longest=80)
    drawn = list(iter(mixture.draw, None))
    assert sorted(d.length for d in drawn) == [5, 7]
    assert mixture.tokens == [12]
