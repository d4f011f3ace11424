"""Clocks: formulas by hand, interleaving, and ratios on calls of known duration."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.evaluation.latency import (
    Clock,
    StepCosts,
    predicted_speedup,
    race,
    side_by_side,
    step_costs,
)
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params


def test_predictions_by_hand():
    assert predicted_speedup(3.0, 5, 0.1) == pytest.approx(3 / 1.5)
    assert predicted_speedup(3.0, 5, 0.1, verification_cost=2.5) == pytest.approx(1.0)
    costs = StepCosts(draft_step=2e-3, target_step=8e-3, verification={5: 16e-3})
    assert costs.cost_ratio == 0.25
    assert costs.verification_cost(5) == 2


def test_calls_take_turns_in_changing_order():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    timings = side_by_side(calls, repeats=8)
    assert log[:3] == ["a", "b", "c"]  # the warm-up
    rounds = ["".join(log[3 + 3 * i : 6 + 3 * i]) for i in range(8)]
    assert len(log) == 27
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1
    assert all(timing.seconds.shape == (8,) for timing in timings.values())


def test_first_call_is_kept_apart():
    waits = iter([0.05, 0.0, 0.0, 0.0])
    timing = side_by_side({"x": lambda: time.sleep(next(waits))}, repeats=3)["x"]
    assert timing.first_call > 0.04
    assert timing.median < 0.02


def decoder(tokens, seconds):
    """Takes `seconds` a prompt, and says that it wrote `tokens`."""

    def decode(prompt):
        time.sleep(seconds)
        return jnp.zeros((1, 9)), jnp.array([tokens * prompt])

    return decode


def test_race_measures_the_ratio_of_rates():
    seen = []
    clock = race(
        {"plain": decoder(3, 0.012), "fast": decoder(4, 0.008)},
        [1, 2, 3, 4],
        repeats=3,
        on_prompt=seen.append,
    )
    assert seen == [1, 2, 3, 4]
    np.testing.assert_array_equal(clock.tokens["fast"], [4, 8, 12, 16])
    assert clock.seconds["plain"].shape == (4,)
    speedup = clock.speedup("fast", over="plain")
    assert speedup.value == pytest.approx(2.0, rel=0.2)
    assert speedup.low <= speedup.value <= speedup.high
    assert clock.tokens_per_second("plain").value == pytest.approx(30 / 0.048, rel=0.2)


def test_clock_pairs_prompts():
    seconds = np.array([1.0, 5.0, 20.0])
    clock = Clock(
        seconds={"plain": seconds, "fast": seconds / 2},
        tokens={"plain": seconds * 10, "fast": seconds * 10},
        spread={"plain": 0.0, "fast": 0.0},
        compile_seconds={"plain": 0.0, "fast": 0.0},
    )
    speedup = clock.speedup("fast", over="plain")
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx((2, 2, 2))


def test_step_costs_of_real_models_are_ordered():
    def model(name, d_ff, layers):
        config = ModelConfig(name, 17, 32, 2, 16, d_ff, 1, layers)
        transformer = Transformer(config)
        return transformer, jax.jit(init_params, static_argnums=0)(transformer, jax.random.key(0))

    costs = step_costs(
        *model("target", 4096, 5),
        *model("draft", 64, 1),
        jnp.array([[5, 6, 7]]),
        gammas=[3, 1, 3],
        steps=11,
        repeats=5,
    )
    assert sorted(costs.verification) == [1, 3]
    assert 0 < costs.cost_ratio < 0.5  # fifty times fewer weights
    assert costs.verification_cost(3) > 0.5
