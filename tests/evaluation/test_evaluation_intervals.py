"""Intervals: closed forms, coverage, pairing, and the two-way bootstrap over seeds."""

import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.intervals import (
    Bootstrap,
    Estimate,
    estimate,
    exact_proportion,
    ratio,
    ratio_of_ratios,
)


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    measured = ratio(np.array([1, 30]), np.array([1, 10]))
    assert measured.value == pytest.approx(31 / 11)
    assert measured.n == 2
    # every resample lies between the two prompts' own ratios
    assert 1 <= measured.low <= measured.value <= measured.high <= 3


def test_interval_of_a_mean_has_the_width_that_theory_gives():
    values = np.random.default_rng(3).normal(5, 2, 701)
    measured = ratio(values, np.ones(701))
    half = 1.96 * values.std() / np.sqrt(701)
    assert measured.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert measured.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    tokens_per_call = 3.0
    covered = 0
    for _ in range(200):
        calls = rng.integers(3, 11, 61)
        tokens = rng.poisson(tokens_per_call * calls)
        measured = ratio(tokens, calls, Bootstrap(draws=400))
        covered += measured.low <= tokens_per_call <= measured.high
    assert 178 <= covered <= 199  # 95 % of 200, three standard errors to either side


def test_shared_noise_cancels_in_a_paired_ratio():
    rng = np.random.default_rng(1)
    calls = rng.integers(2, 40, 97).astype(float)  # long and short texts
    base = rng.uniform(1, 6, 97) * calls  # easy and hard texts
    paired = ratio_of_ratios(1.2 * base, calls, base, calls)
    assert paired.value == pytest.approx(1.2)
    assert paired.high - paired.low < 1e-9
    alone = ratio(base, calls)
    assert alone.high - alone.low > 0.3


def test_seeds_are_resampled_as_well_as_prompts():
    # prompts agree within a seed, seeds differ: prompts alone would give an empty interval
    tokens = np.repeat([[2.0], [3.0], [5.0]], 41, axis=1)
    measured = ratio(tokens, np.ones((3, 41)))
    assert measured.value == pytest.approx(10 / 3)
    assert measured.low == pytest.approx(2, abs=0.5)
    assert measured.high == pytest.approx(5, abs=0.5)
    assert measured.n == 41


def test_two_way_bootstrap_equals_its_definition():
    table = np.random.default_rng(5).uniform(size=(3, 7))
    draws = Bootstrap(draws=11, seed=2)
    rng = np.random.default_rng(2)
    prompts = rng.multinomial(7, np.full(7, 1 / 7), 11)
    seeds = rng.multinomial(3, np.full(3, 1 / 3), 11)
    expected = [
        sum(seeds[d, s] * prompts[d, p] * table[s, p] for s in range(3) for p in range(7))
        for d in range(11)
    ]
    np.testing.assert_allclose(draws.totals(table), expected, rtol=1e-12)


def test_one_seed_broadcasts_against_many():
    one, many = np.array([4.0, 6.0, 8.0]), np.array([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]])
    measured = ratio_of_ratios(one, np.ones(3), many, np.ones((2, 3)))
    assert (measured.value, measured.low, measured.high) == pytest.approx((2, 2, 2))


def test_resamples_without_any_test_are_left_out():
    measured = ratio(np.array([1.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0]))
    assert (measured.value, measured.low, measured.high) == pytest.approx((0.5, 0.5, 0.5))


# Clopper and Pearson's limits in closed form at the ends, tabulated values inside
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 13, 0.0, 1 - 0.025 ** (1 / 13)),
        (13, 13, 0.025 ** (1 / 13), 1.0),
        (7, 20, 0.1539092, 0.5921885),
        (1, 10, 0.0025286, 0.4450161),
    ],
)
def test_exact_interval(successes, trials, low, high):
    measured = exact_proportion(successes, trials)
    assert measured.value == successes / trials
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=1e-6)
    assert measured.n == trials


def test_summary_keys_and_overlap():
    measured = Estimate(2.0, 1.5, 2.5, 9)
    assert measured.keys("tau") == {"tau": 2.0, "tau_ci95": [1.5, 2.5]}
    assert measured.overlaps(Estimate(3.0, 2.5, 3.5, 9))
    assert not measured.overlaps(Estimate(3.0, 2.6, 3.5, 9))
    assert not Estimate(3.0, 2.6, 3.5, 9).overlaps(measured)


def test_one_prompt_has_no_interval():
    """However often it is resampled; a proportion's is exact for one trial, too."""
    measured = ratio(np.array([[6.0], [7.0]]), np.array([[2.0], [2.0]]))  # of two seeds
    assert measured.keys("tau") == {"tau": 3.25}
    assert measured.n == 1
    assert measured.overlaps(Estimate(9.0, 8.0, 10.0, 41))
    assert Estimate(9.0, 8.0, 10.0, 41).overlaps(measured)
    assert exact_proportion(1, 1).keys("share")["share_ci95"] == pytest.approx([0.025, 1])


def test_refusals():
    with pytest.raises(UserError, match=r"3 successes in 2 trials"):
        exact_proportion(3, 2)
    with pytest.raises(UserError, match=r"differ in their prompts: shapes \(2,\), \(3,\)"):
        ratio(np.ones(2), np.ones(3))
    with pytest.raises(UserError, match="at least one prompt"):
        estimate(np.divide, [np.ones(0), np.ones(0)])
