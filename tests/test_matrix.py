"""The metrics of a stage x domain matrix: hand-computed, and properties that must hold."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.analysis import matrix as m
from eval.analysis.curves import on_the_curve

# prose is a base domain; a is trained first, then b, then c. Losses.
LOSSES = [
    # prose  a    b    c
    [3.0, 5.0, 6.0, 4.0],
    [3.2, 4.0, 5.8, 4.1],
    [3.1, 4.3, 4.5, 4.2],
    [3.5, 4.1, 4.9, 3.0],
]
EXAMPLE = m.Matrix(
    ["base", "a", "b", "c"], ["prose", "a", "b", "c"], {"a": 1, "b": 2, "c": 3}, LOSSES
)


def test_metrics_by_hand():
    assert m.acc(EXAMPLE) == pytest.approx((4.1 + 4.9 + 3.0) / 3)
    assert m.bwt(EXAMPLE) == pytest.approx(((4.0 - 4.1) + (4.5 - 4.9)) / 2)
    # a was best right after its own stage, not after stage 2
    assert m.forgetting(EXAMPLE) == pytest.approx(((4.1 - 4.0) + (4.9 - 4.5)) / 2)
    assert m.fwt(EXAMPLE) == pytest.approx(((6.0 - 5.8) + (4.0 - 4.2)) / 2)
    assert m.base_retention(EXAMPLE) == pytest.approx(3.0 - 3.5)


def test_forgetting_counts_from_the_best_of_all_later_stages():
    values = [[5.0, 5.0, 5.0], [4.0, 5.0, 5.0], [3.5, 4.0, 5.0], [4.2, 4.0, 4.0]]
    matrix = m.Matrix(["base", "a", "b", "c"], ["a", "b", "c"], {"a": 1, "b": 2, "c": 3}, values)
    assert m.forgetting(matrix) == pytest.approx((0.7 + 0.0) / 2)  # a: from 3.5, not from 4.0
    assert m.bwt(matrix) == pytest.approx(-0.2 / 2)


def test_learning_curve_by_hand():
    learned = [0, 1.0 / 3, (1.0 + 1.5) / 3, (1.0 + 1.5 + 1.0) / 3]
    # Divided by the 3 domains old at the end (prose, a, b); prose's best is its row 0.
    forgotten = [0, 0.2 / 3, (0.1 + 0.3) / 3, (0.5 + 0.1 + 0.4) / 3]
    expected = [pytest.approx(point) for point in zip(learned, forgotten, strict=True)]
    assert m.learning_curve(EXAMPLE) == expected


def test_undefined_is_none():
    one = m.Matrix(["base", "a"], ["a"], {"a": 1}, [[5.0], [4.0]])
    assert m.acc(one) == 4.0
    assert m.bwt(one) is m.forgetting(one) is m.fwt(one) is m.base_retention(one) is None
    assert m.learning_curve(one) == []  # nothing can be forgotten
    untrained = EXAMPLE.until(0)
    assert {function(untrained) for function in m.METRICS.values()} == {None}
    hole = [row.copy() for row in LOSSES]
    hole[3][1] = None
    broken = m.Matrix(EXAMPLE.stages, EXAMPLE.domains, EXAMPLE.trained, hole)
    assert m.acc(broken) is m.forgetting(broken) is None
    assert len(m.learning_curve(broken)) == 3  # ends before the hole


def test_unfinished_run_keeps_the_recipes_divisors():
    values = [*LOSSES[:2], [None] * 4, [None] * 4]
    half = m.Matrix(EXAMPLE.stages, EXAMPLE.domains, EXAMPLE.trained, values)
    assert m.learning_curve(half) == m.learning_curve(EXAMPLE)[:2]
    assert half.until(1).base == ["prose"]  # b and c are not base domains, only not yet trained
    assert m.base_retention(half.until(1)) == pytest.approx(-0.2)


def test_standard_errors_add_in_quadrature():
    stderr = [[0.1] * 4 for _ in LOSSES]
    learned, forgotten = m.curve_errors(EXAMPLE, stderr)
    assert learned == pytest.approx(0.1 * math.sqrt(6) / 3)
    assert forgotten == pytest.approx(0.1 * math.sqrt(6) / 3)
    stderr[0][0] = None  # prose was best in row 0
    assert m.curve_errors(EXAMPLE, stderr) is None


def test_reading_a_curve():
    curve = [(0.0, 0.0), (1.0, 0.2), (2.0, 1.2)]
    assert m.forgotten_at(curve, 1.5) == pytest.approx(0.7)
    assert m.forgotten_at(curve, 2.0) == 1.2
    assert (
        m.forgotten_at(curve, 2.1) is m.forgotten_at(curve, -0.1) is m.forgotten_at([], 0) is None
    )
    back_and_forth = [(0.0, 0.0), (1.0, 0.4), (0.2, 0.6), (1.0, 0.9)]
    assert m.forgotten_at(back_and_forth, 0.5) == pytest.approx(0.2)  # the first crossing


@pytest.mark.parametrize(
    ("base", "kept"), [([], ["1 end", "2", "2 end"]), (["c"], ["0", "1", "1 end", "2", "2 end"])]
)
def test_a_curve_begins_where_there_is_something_to_forget(base, kept):
    domains = ["a", "b", *base]
    values = [[1.0] * len(domains)] * 3
    matrix = m.Matrix(["base", "a", "b"], domains, {"a": 1, "b": 2}, values)
    points = [SimpleNamespace(stage=s, step=x) for s, x in
              ((0, None), (1, 5), (1, None), (2, 5), (2, None))]  # fmt: skip
    run = SimpleNamespace(matrix=matrix, points=points)
    assert on_the_curve(run, ["0", "1", "1 end", "2", "2 end"]) == kept
    assert on_the_curve(run, [None, None, "1 end", None, "2 end"]) == ["1 end", "2 end"]


def test_between_sorts_the_runs_of_a_method():
    assert m.between([(2.0, 1.0), (1.0, 0.2)], 1.25) == pytest.approx(0.4)
    assert m.between([(2.0, 1.0)], 2.0) == 1.0
    assert m.between([(2.0, 1.0), (1.0, 0.2)], 0.9) is None


def test_a_rate_that_learns_less_than_a_smaller_one_is_on_the_way_back():
    curve = [(0.1, 0.0), (0.4, 0.2), (0.3, 0.9), (0.4, 1.0), (0.5, 1.1)]
    assert m.on_the_way(curve) == [curve[0], curve[1], curve[4]]
    assert m.on_the_way([]) == []


def test_equal_learning_reads_at_what_all_reached():
    curves = {
        "fast": [(0.0, 0.0), (1.0, 0.5), (2.0, 2.5)],
        "slow": [(0.0, 0.0), (0.8, 0.1), (1.5, 0.3)],
        "unstarted": [],
    }
    equal = m.equal_learning(curves)
    assert equal["level"] == 1.5
    assert equal["range"] == [0.0, 1.5]
    assert equal["forgotten"] == {"fast": pytest.approx(1.5), "slow": 0.3, "unstarted": None}
    assert m.equal_learning({"unstarted": []})["level"] is None


@st.composite
def matrices(draw):
    trained = draw(st.integers(2, 4))
    base = draw(st.integers(1, 2))
    names = [f"d{i}" for i in range(base + trained)]
    row = st.lists(st.floats(0, 10), min_size=len(names), max_size=len(names))
    values = draw(st.lists(row, min_size=trained + 1, max_size=trained + 1))
    stages = ["base", *names[base:]]
    return m.Matrix(stages, names, {d: t for t, d in enumerate(stages) if t}, values)


CHANGES = [m.bwt, m.forgetting, m.fwt, m.base_retention]


@given(matrices())
def test_losses_and_negated_losses_as_scores_agree(matrix):
    negated = [[-value for value in row] for row in matrix.values]
    scores = m.Matrix(matrix.stages, matrix.domains, matrix.trained, negated, False)
    assert [f(scores) for f in CHANGES] == pytest.approx([f(matrix) for f in CHANGES])
    assert m.acc(scores) == pytest.approx(-m.acc(matrix))
    assert m.learning_curve(scores) == [pytest.approx(p) for p in m.learning_curve(matrix)]


@given(matrices())
def test_forgetting_is_at_least_what_backward_transfer_lost(matrix):
    assert m.forgetting(matrix) >= -m.bwt(matrix) - 1e-9


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(-2, 2)), min_size=1, max_size=6), st.floats(0, 5)
)
def test_a_reading_lies_among_the_points(points, level):
    read = m.between(points, level)
    inside = min(x for x, _ in points) <= level <= max(x for x, _ in points)
    assert (read is not None) == inside
    if inside:
        lost = [y for _, y in points]
        assert min(lost) - 1e-9 <= read <= max(lost) + 1e-9
