import math

import numpy as np
import pytest

from sgt_titan.metrics.interval import Estimate, ratio, wilson


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        share_B = random.beta(2, 3, 40)  # prompts differ: tokens of one are not independent
        hits = random.binomial(30, share_B)
        found = ratio(hits, np.full(40, 30), share=True, seed=trial)
        covered += found.low <= 0.4 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_nothing_is_certain_at_zero_of_n():
    found = ratio([0, 0, 0], [10, 10, 10], share=True)
    assert found.value == found.low == 0 and 0.1 < found.high < 0.13 and found.n == 30


def test_value_is_the_pooled_ratio_and_repeats_with_a_seed():
    found = ratio([1, 9], [10, 90])
    assert found.value == 0.1 and found.low <= 0.1 <= found.high
    assert ratio([1, 5], [10, 10], seed=3) == ratio([1, 5], [10, 10], seed=3)


def test_a_single_row_says_nothing_of_others():
    found = ratio([5], [10])
    assert found.value == 0.5 and found.as_dict() == {"value": 0.5, "low": None, "high": None, "n": 10}
    assert (ratio([5], [10], share=True).low, ratio([5], [10], share=True).high) == wilson(5, 10)


def test_what_has_no_value_has_no_interval():
    nothing = ratio([0, 0], [0, 0])
    assert math.isnan(nothing.value) and nothing.n == 0
    assert nothing.as_dict() == {"value": None, "low": None, "high": None, "n": 0}
    unbounded = ratio([math.inf, 1], [1, 1])
    assert unbounded.as_dict()["value"] == "inf" and unbounded.as_dict()["low"] is None
    assert Estimate(0.5, 0.25, 0.75, 4).as_dict() == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
