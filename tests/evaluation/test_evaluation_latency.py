"""Clocks: formulas by hand, interleaving, and ratios on a clock that the test itself turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.evaluation import latency
from distillspec_jax.evaluation.latency import (
    Clock,
    StepCosts,
    predicted_speedup,
    race,
    side_by_side,
    step_costs,
)
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, extend, init_params, start


class FakeTime:
    """Stands in for the module `time`: passes only where a call says how long it takes."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(latency, "time", fake)
    return fake


def test_predictions_by_hand():
    assert predicted_speedup(3.0, 5, 0.1) == pytest.approx(3 / 1.5)
    assert predicted_speedup(3.0, 5, 0.1, verification_cost=2.5) == pytest.approx(1.0)
    costs = StepCosts(draft_step=2e-3, target_step=8e-3, verification={5: 16e-3})
    assert costs.cost_ratio == 0.25
    assert costs.verification_cost(5) == 2


def test_calls_take_turns_in_changing_order():
    log = []
    calls = {name: functools.partial(log.append, name) for name in "abc"}
    timings = side_by_side(calls, repeats=8)
    assert log[:3] == ["a", "b", "c"]  # the warm-up
    rounds = ["".join(log[3 + 3 * i : 6 + 3 * i]) for i in range(8)]
    assert len(log) == 27
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1
    assert all(timing.seconds.shape == (8,) for timing in timings.values())


def test_first_call_is_kept_apart_and_the_median_counts(clock):
    waits = iter([90.0, 3.0, 1.0, 50.0])

    def call():
        clock.now += next(waits)

    timing = side_by_side({"x": call}, repeats=3)["x"]
    assert timing.first_call == 90
    assert timing.median == 3


def test_race_measures_rates_of_the_same_prompts_after_a_warm_up(clock):
    compiled = set()

    def decoder(name, seconds, tokens):
        def decode(prompt):
            clock.now += 0 if name in compiled else 100
            compiled.add(name)
            clock.now += seconds * prompt
            return jnp.zeros((1, 9)), jnp.array([tokens * prompt])

        return decode

    seen = []
    decoders = {"plain": decoder("plain", 4.0, 3), "fast": decoder("fast", 2.0, 4)}
    measured = race(decoders, [1, 2, 3, 5], repeats=3, on_prompt=seen.append)
    assert seen == [0, 1, 2, 2, 3, 4]
    np.testing.assert_array_equal(measured.tokens["fast"], [4, 8, 12, 20])
    np.testing.assert_allclose(measured.seconds["plain"], [4, 8, 12, 20])
    assert measured.compile_seconds == {"plain": 100, "fast": 100}
    assert measured.spread == {"plain": 0, "fast": 0}
    assert measured.tokens_per_second(["plain"]).value == pytest.approx(3 / 4)
    speedup = measured.speedup(["fast"], over=["plain"])
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx([8 / 3] * 3)
    assert measured.keys(["fast"], "plain") == {
        "tokens_per_second_target": pytest.approx(3 / 4),
        "tokens_per_second_target_ci95": pytest.approx([3 / 4] * 2),
        "tokens_per_second_speculative": pytest.approx(2),
        "tokens_per_second_speculative_ci95": pytest.approx([2] * 2),
        "speedup_wall_clock": pytest.approx(8 / 3),
        "speedup_wall_clock_ci95": pytest.approx([8 / 3] * 2),
        "timed_prompts": 4,
        "timing_spread": 0,
        "compile_seconds": 100,
    }


def test_every_shape_is_compiled_before_the_clock_runs(clock):
    compiled = set()

    def decode(prompt):
        clock.now += 2 + (0 if prompt.shape in compiled else 50 * prompt.shape[1])
        compiled.add(prompt.shape)
        return prompt, np.ones(1)

    prompts = [np.zeros((1, width)) for width in (3, 3, 4, 3, 4)]
    measured = race({"x": decode}, prompts, repeats=1)
    np.testing.assert_array_equal(measured.seconds["x"], [2] * 5)
    assert measured.compile_seconds["x"] == 50 * (3 + 4)


def test_decoders_take_turns_over_stretches_of_prompts(monkeypatch):
    monkeypatch.setattr(latency, "STRETCH", 2)
    log, seen = [], []

    def decoder(name):
        return lambda prompt: (log.append((name, prompt)), np.ones(1))

    race({"a": decoder("a"), "b": decoder("b")}, [5, 6, 7], repeats=9, on_prompt=seen.append)
    assert seen == [3 * done // 36 for done in range(1, 37)]
    turns = [log[2:38][i : i + 4] for i in range(0, 36, 4)]  # behind the warm-up
    assert {tuple(turn) for turn in turns} == {
        (("a", 5), ("a", 6), ("b", 5), ("b", 6)),
        (("b", 5), ("b", 6), ("a", 5), ("a", 6)),
    }
    assert sorted(log[38:]) == [("a", 7)] * 9 + [("b", 7)] * 9


def test_spread_is_that_of_the_repeats(clock):
    waits = iter([9.0, 4.0, 2.0, 5.0])

    def decode(prompt):
        clock.now += next(waits)
        return jnp.zeros((1, 2)), jnp.array([1])

    measured = race({"x": decode}, ["a prompt"], repeats=3)
    assert measured.seconds["x"] == [4]
    assert measured.spread["x"] == pytest.approx(3 / 4)
    assert measured.compile_seconds["x"] == 5


def test_clock_pairs_prompts():
    seconds = np.array([1.0, 5.0, 20.0])
    measured = Clock(
        seconds={"plain": seconds, "fast": seconds / 2},
        tokens={"plain": seconds * 10, "fast": seconds * 10},
        spread={"plain": 0.5, "fast": 0.25, "faster": 0.75},
        compile_seconds={"plain": 3.0, "fast": 1.0, "faster": 2.0},
        batch_size=4,
    )
    speedup = measured.speedup(["fast"], over=["plain"])
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx((2, 2, 2))
    keys = measured.keys(["fast"], "plain")  # the worst of those compared, and of no other
    assert (keys["timing_spread"], keys["compile_seconds"], keys["timed_prompts"]) == (0.5, 1.0, 12)


def tiny(name):
    model = Transformer(ModelConfig(name, 17, 6, 2, 3, 7, 1, 2))
    return model, init_params(model, jax.random.key(0))


def costs_of(clock, monkeypatch, per_call, gammas):
    """Step costs where a call of that width takes so many seconds; and how many rounds it took."""
    rounds = 0

    def steps(model, params, cache, pending, width, steps):
        nonlocal rounds
        rounds += model.config.name == "draft"
        clock.now += steps * (per_call[width] if model.config.name == "target" else 1.0)
        return pending

    monkeypatch.setattr(latency, "_steps", steps)
    models = (*tiny("target"), *tiny("draft"))
    costs = step_costs(*models, jnp.array([[5, 6]]), gammas=gammas, steps=5)
    return costs, rounds


def test_step_costs_are_those_of_one_step(clock, monkeypatch):
    costs, _ = costs_of(clock, monkeypatch, {1: 8.0, 2: 10.0, 4: 14.0}, [3, 1, 3])
    assert (costs.draft_step, costs.target_step) == (1, 8)
    assert costs.verification == {1: 10, 3: 14}


def test_more_positions_never_cost_less(clock, monkeypatch):
    """A lucky timing of one gamma is pooled with its neighbours', it does not choose that gamma."""
    per_call = {1: 9.0, 2: 8.0, 3: 12.0, 4: 10.0, 5: 11.0, 6: 20.0}
    costs, _ = costs_of(clock, monkeypatch, per_call, [1, 2, 3, 4, 5])
    assert costs.target_step == 8.5
    assert costs.verification == {1: 8.5, 2: 11, 3: 11, 4: 11, 5: 20}


@pytest.mark.parametrize(
    ("enough", "rounds"),
    [(0.0, 9), (1e9, 25), (15 * 5 * 24.0, 15)],  # a round is 5 steps of 1, 9 and 14 seconds
)
def test_short_steps_are_timed_more_often(clock, monkeypatch, enough, rounds):
    monkeypatch.setattr(latency, "ENOUGH", enough)
    _, calls = costs_of(clock, monkeypatch, {1: 9.0, 3: 14.0}, [2])
    assert calls == rounds + 3  # the warm-ups of both, and the round that tells how long one is


def test_a_timed_loop_feeds_what_decoding_would():
    model, params = tiny("target")
    cache, pending = start(model, params, jnp.array([[5, 6, 7]]), 11)
    expected, tokens = cache, jnp.full((1, 3), pending[0])
    for _ in range(4):
        logits, longer = extend(model, params, expected, tokens)
        tokens = jnp.argmax(logits, axis=-1)
        expected = longer.replace(lengths=expected.lengths + 1)
    np.testing.assert_array_equal(latency._steps(model, params, cache, pending, 3, 4), tokens)
