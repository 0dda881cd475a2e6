"""Methods over learning rates and seeds, read at equal learning."""

import numpy as np
import pytest

from eval.analysis.at_equal_learning import at_equal_learning, read_at


def ends(curve, seeds=3, noise=0.0):
    """By seed, runs at rates 1, 2, ...: noise shifts what each seed forgets."""
    return {
        seed: {float(i + 1): (x, y * (1 + noise * (seed - 1))) for i, (x, y) in enumerate(curve)}
        for seed in range(seeds)
    }


PLAIN = [(0.2, 0.1), (0.6, 0.5), (0.8, 1.0)]


def test_read_linearly_between_rates_and_on_beyond_them():
    curve = np.array(PLAIN)
    assert read_at(curve, 0.4) == pytest.approx(0.3)
    assert read_at(curve, 0.7) == pytest.approx(0.75)
    assert read_at(curve, 0.9) == pytest.approx(1.25)
    # A rate that learns less and forgets more is no part of the curve.
    assert read_at(np.array([*PLAIN, (0.7, 2.0)]), 0.75) == pytest.approx(0.875)
    assert read_at(np.array([*PLAIN, (0.1, 3.0)]), 0.15) == pytest.approx(0.05)


def test_ratios_at_the_level_that_all_reach():
    half = [(x, y / 2) for x, y in PLAIN]
    slow = [(0.1, 0.1), (0.6, 0.5)]
    found = at_equal_learning({"ft": ends(PLAIN), "half": ends(half), "slow": ends(slow)}, "ft")
    assert (found.level, found.lowest) == pytest.approx((0.6, 0.2))
    by_name = {m.method: m for m in found.methods}
    assert by_name["ft"].common is by_name["ft"].own is None
    assert by_name["half"].common.value == pytest.approx(0.5)
    assert by_name["half"].common.interval == pytest.approx((0.5, 0.5))
    bent = {**ends(PLAIN), 1: {**ends(PLAIN)[1], 3.0: (0.8, 1.6)}}
    alone = at_equal_learning({"ft": bent, "half": ends(half), "slow": ends(slow)}, "ft").methods
    assert [m.own.level for m in alone[1:]] == pytest.approx([0.8, 0.6])
    assert alone[1].own.value == pytest.approx(0.5 / 1.2)  # whatever the slow one learns
    assert alone[1].common.value == pytest.approx(0.5)
    assert by_name["half"].over_range == pytest.approx(0.5)
    assert by_name["slow"].common.value == pytest.approx(1.0)
    assert by_name["slow"].over_range > 1
    diverged = {"ft": ends(PLAIN), "half": ends([*half, (-0.5, 3.0)])}
    again = at_equal_learning(diverged, "ft").methods[1]
    assert (again.common.value, again.over_range) == pytest.approx((0.5, 0.5))
    assert (*by_name["half"].most, by_name["half"].rate) == pytest.approx((0.8, 0.5, 3.0))


def test_the_interval_is_of_the_seeds_and_pairs_them():
    half = [(x, y / 2) for x, y in PLAIN]
    alike = at_equal_learning({"ft": ends(PLAIN, noise=0.2), "half": ends(half, noise=0.2)}, "ft")
    assert alike.methods[1].common.interval == pytest.approx((0.5, 0.5))
    other = at_equal_learning({"ft": ends(PLAIN), "half": ends(half, noise=0.2)}, "ft")
    assert other.left_out == {}
    low, high = other.methods[1].common.interval
    assert 0.39 < low < 0.5 < high < 0.61


def test_what_cannot_be_read_is_none():
    apart, half = [(1.0, 0.1), (2.0, 0.2)], [(x, y / 2) for x, y in PLAIN]
    assert at_equal_learning({"ft": ends(PLAIN), "apart": ends(apart)}, "ft") is None
    assert at_equal_learning({"ft": ends(PLAIN[:1]), "other": ends(PLAIN)}, "ft") is None
    assert at_equal_learning({"ft": ends(PLAIN)}, "ft") is None
    one = at_equal_learning({"ft": ends(PLAIN, 1), "other": ends(PLAIN, 1)}, "ft")
    assert one.methods[1].common.interval is None
    spent = [(0.5, 0.4), (0.3, 0.9)]  # its smallest rate learns most
    two = at_equal_learning({"ft": ends(PLAIN), "half": ends(half), "spent": ends(spent)}, "ft")
    assert [m.method for m in two.methods] == ["ft", "half"]
    shared = {"ft": ends(PLAIN, 2), "other": {5: ends(PLAIN, 1)[0]}}
    assert at_equal_learning(shared, "ft") is None
