"""Intervals: closed forms, coverage over prompts and seeds, pairing."""

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


def test_interval_of_seeds_that_prompts_say_nothing_of():
    """Prompts agree within a seed: Student's interval of three values, 10 / 3 and sd 1.5275."""
    tokens = np.repeat([[2.0], [3.0], [5.0]], 41, axis=1)
    measured = ratio(tokens, np.ones((3, 41)))
    half = 4.302653 * 1.527525 / np.sqrt(3)
    assert measured.value == pytest.approx(10 / 3)
    assert (measured.low, measured.high) == pytest.approx((10 / 3 - half, 10 / 3 + half))
    assert measured.n == 41


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
def test_interval_over_seeds_covers_the_truth_about_95_times_in_100(num_seeds, between):
    """Whether the seeds differ by nothing, about as much as the prompts do, or by far more."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        calls = np.tile(rng.integers(3, 11, 61), (num_seeds, 1))
        hardness = rng.normal(0, 0.1, 61)
        truth = 3.0 + rng.normal(0, between, (num_seeds, 1))
        tokens = (truth + hardness) * calls + rng.normal(0, 0.1, calls.shape)
        measured = ratio(tokens, calls, Bootstrap(draws=300))
        covered += measured.low <= 3.0 <= measured.high
    assert 0.92 * 400 <= covered <= 0.99 * 400


def test_seeds_that_agree_widen_nothing():
    tokens, calls = np.array([4.0, 9.0, 8.0, 1.0]), np.array([2.0, 3.0, 4.0, 1.0])
    once, thrice = ratio(tokens, calls), ratio(np.tile(tokens, (3, 1)), np.tile(calls, (3, 1)))
    assert (once.value, once.low, once.high) == pytest.approx(
        (thrice.value, thrice.low, thrice.high)
    )


def test_an_interval_over_seeds_is_as_skewed_as_that_over_prompts():
    tokens = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 30.0])
    once = ratio(tokens, np.ones(6))
    several = ratio(np.stack([tokens, 1.1 * tokens, 0.9 * tokens]), np.ones((3, 6)))
    skew = (once.high - once.value) / (once.value - once.low)
    assert skew > 1.3
    assert (several.high - several.value) / (several.value - several.low) == pytest.approx(skew)
    assert several.high - several.low > once.high - once.low


def test_bootstrap_equals_its_definition():
    table = np.random.default_rng(5).uniform(size=(3, 7))
    prompts = np.random.default_rng(2).multinomial(7, np.full(7, 1 / 7), 11)
    expected = [sum(prompts[d, p] * table[:, p].sum() for p in range(7)) for d in range(11)]
    np.testing.assert_allclose(Bootstrap(draws=11, seed=2).totals(table), expected, rtol=1e-12)


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
