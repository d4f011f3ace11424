"""Adaptive and tuned block lengths."""

import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding.block_length import (
    FIXED,
    BlockLength,
    efficiency_by_gamma,
    first_allowance,
    keeps_drafting,
    next_allowance,
    tune,
)
from distillspec_jax.errors import UserError

SHARP, FLAT = [0.9, 0.1, 0.0], [0.3, 0.3, 0.4]  # entropies 0.33 and 1.09 nats


def test_confidence_stops_after_an_unlikely_token():
    probs, tokens = jnp.array([SHARP, SHARP, FLAT]), jnp.array([0, 1, 2])
    rule = BlockLength(min_confidence=0.4)
    assert keeps_drafting(rule, probs, tokens).tolist() == [True, False, True]
    assert keeps_drafting(FIXED, probs, tokens).all()


def test_entropy_stops_where_the_draft_was_unsure():
    probs, tokens = jnp.array([SHARP, SHARP, FLAT]), jnp.array([0, 1, 2])
    rule = BlockLength(max_entropy=0.6)
    assert keeps_drafting(rule, probs, tokens).tolist() == [True, True, False]
    edge = BlockLength(max_entropy=float(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1))) + 1e-6)
    assert keeps_drafting(edge, probs, tokens).tolist() == [True, True, False]


def test_schedule_grows_by_two_and_shrinks_by_one_within_bounds():
    rule, gamma = BlockLength(schedule_start=3), 5
    allowance = first_allowance(rule, gamma, 2)
    assert allowance.tolist() == [3, 3]
    seen = []
    for whole in ([True, False], [True, False], [False, False], [True, True]):
        allowance = next_allowance(rule, gamma, allowance, jnp.array(whole))
        seen.append(allowance.tolist())
    assert seen == [[5, 2], [5, 1], [4, 1], [5, 3]]
    assert first_allowance(BlockLength(schedule_start=20), gamma, 1).tolist() == [5]
    assert first_allowance(FIXED, gamma, 1).tolist() == [5]


def test_tune_takes_the_fastest_gamma():
    efficiency = {1: 1.8, 3: 3.0, 5: 3.6, 7: 3.9}
    flat = dict.fromkeys(efficiency, 1.0)
    assert tune(efficiency, 0.01, flat).gamma == 7
    assert tune(efficiency, 0.5, flat).gamma == 1
    assert tune(efficiency, 0.2, flat).gamma == 3
    steep = {1: 1.0, 3: 1.1, 5: 2.0, 7: 3.0}
    tuning = tune(efficiency, 0.01, steep)
    assert tuning.gamma == 3
    assert tuning.speedups[5] == pytest.approx(3.6 / 2.05)
    assert tune(efficiency, 0.01, {3: 9.0, 4: 1.0}).gamma == 3
    with pytest.raises(UserError, match=r"block efficiency \(\[1\]\)"):
        tune({1: 1.8}, 0.1, {2: 1.0})


def test_efficiency_at_smaller_gammas_follows_from_emitted_lengths():
    efficiency = efficiency_by_gamma([4, 3, 2, 1])  # 1, 2, 3, 4 emitted
    assert efficiency == pytest.approx({1: 1.6, 2: 1.9, 3: 2.0})
    alpha = 0.7  # independent acceptance: the formula of arXiv 2211.17192
    histogram = [(1 - alpha) * alpha**n for n in range(5)] + [alpha**5]
    for gamma, tau in efficiency_by_gamma(histogram).items():
        assert tau == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
