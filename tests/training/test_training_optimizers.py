"""Learning rates at their corners, update rules against plain numpy, and what does not decay."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.training.optimizers import (
    OptimizerConfig,
    decayed,
    make_optimizer,
    make_schedule,
)

PEAK, STEPS = 0.3, 101


def rate(step, **fields):
    config = OptimizerConfig(learning_rate=PEAK, **fields)
    return float(make_schedule(config, STEPS)(step))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "rsqrt"])
def test_warm_up_is_linear_never_zero_and_reaches_the_peak(schedule):
    for step in range(13):
        expected = PEAK * (step + 1) / 13
        assert rate(step, schedule=schedule, warmup_steps=13) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falls_from_the_start_of_the_decay_to_the_floor(schedule):
    fields = {"schedule": schedule, "warmup_steps": 3, "decay_start": 21, "floor": 0.1}
    assert rate(20, **fields) == pytest.approx(PEAK)
    assert rate(21, **fields) == pytest.approx(PEAK)
    assert rate(61, **fields) == pytest.approx(PEAK * 0.55)  # half way, both shapes
    assert rate(101, **fields) == pytest.approx(PEAK * 0.1)
    assert rate(500, **fields) == pytest.approx(PEAK * 0.1)
    quarter = 0.75 if schedule == "linear" else (1 + math.cos(math.pi / 4)) / 2
    assert rate(41, **fields) == pytest.approx(PEAK * (0.1 + 0.9 * quarter))


def test_rsqrt_halves_at_four_times_the_warm_up_and_stops_at_the_floor():
    assert rate(20, schedule="rsqrt", warmup_steps=5) == pytest.approx(PEAK / 2)
    assert rate(80, schedule="rsqrt", warmup_steps=5) == pytest.approx(PEAK / 4)
    assert rate(80, schedule="rsqrt", warmup_steps=5, floor=0.7) == pytest.approx(PEAK * 0.7)


def test_rsqrt_stays_at_the_peak_until_the_decay_starts():
    fields = {"schedule": "rsqrt", "warmup_steps": 5, "decay_start": 20}
    assert rate(20, **fields) == pytest.approx(PEAK)
    assert rate(80, **fields) == pytest.approx(PEAK / 2)


def test_constant_stays():
    assert rate(10_000, schedule="constant") == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_run_has_other_rates_only_if_it_says_so(schedule):
    config = OptimizerConfig(schedule=schedule)
    assert config.depends_on_steps
    assert make_schedule(config, 50)(30) != make_schedule(config, 100)(30)
    config = dataclasses.replace(config, schedule="rsqrt", warmup_steps=5)
    assert not config.depends_on_steps
    assert make_schedule(config, 50)(30) == make_schedule(config, 100)(30)


def test_adamw_against_numpy():
    config = OptimizerConfig(
        learning_rate=PEAK, schedule="linear", weight_decay=0.2, clip_norm=0.5, warmup_steps=2
    )
    optimizer = make_optimizer(config, STEPS)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 3)).astype(np.float32)
    params = {"w": jnp.asarray(weight)}
    state = optimizer.init(params)
    w, m, v = weight.astype(np.float64), 0.0, 0.0
    for step in range(5):
        grad = rng.normal(size=(5, 3)).astype(np.float32)
        updates, state = optimizer.update({"w": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        g = grad * min(1.0, 0.5 / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.98 ** (step + 1))
        update = m_hat / (np.sqrt(v_hat) + 1e-8) + 0.2 * w
        w = w - float(make_schedule(config, STEPS)(step)) * update
    np.testing.assert_allclose(params["w"], w, rtol=2e-5)


def test_adafactor_scales_with_the_weights_or_does_not():
    def update_norm(factor, **fields):
        config = OptimizerConfig(name="adafactor", schedule="constant", clip_norm=0.0, **fields)
        optimizer = make_optimizer(config, STEPS)
        params = {"w": factor * jnp.ones((5, 3))}
        grads = {"w": jnp.arange(15.0).reshape(5, 3)}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return float(jnp.linalg.norm(updates["w"]))

    assert update_norm(7.0) == pytest.approx(7 * update_norm(1.0), rel=1e-5)
    fixed = {"scale_by_parameter": False}
    assert update_norm(7.0, **fixed) == pytest.approx(update_norm(1.0, **fixed), rel=1e-5)


def test_adafactor_follows_the_schedule_and_clips():
    settings = {"name": "adafactor", "learning_rate": PEAK}
    params, rng = {"w": jnp.ones((5, 3))}, np.random.default_rng(1)
    gradients = rng.normal(size=(6, 5, 3)).astype(np.float32)
    longer = gradients * np.float32([1, 30, 1, 200, 7, 1])[:, None, None]

    def updates(gradients, **fields):
        optimizer = make_optimizer(OptimizerConfig(**settings | fields), STEPS)
        state, found = optimizer.init(params), []
        for gradient in gradients:
            update, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
            found.append(np.asarray(update["w"]))
        return np.array(found)

    fields = {"schedule": "cosine", "warmup_steps": 3}
    rates = make_schedule(OptimizerConfig(learning_rate=PEAK, **fields), STEPS)(np.arange(6))
    of_rate_one = updates(gradients, schedule="constant") / PEAK
    found = updates(gradients, **fields)
    np.testing.assert_allclose(found, rates[:, None, None] * of_rate_one, rtol=1e-5)

    assert (np.linalg.norm(gradients, axis=(1, 2)) > 0.5).all()
    cut, same = (updates(given, clip_norm=0.5) for given in (gradients, longer))
    np.testing.assert_allclose(cut, same, rtol=1e-5)
    free, other = (updates(given, clip_norm=0.0) for given in (gradients, longer))
    assert abs(free - other).max() > 0.1 * abs(free).max()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_only_matrices_decay(name):
    params = {
        "attention": {"q": jnp.ones((5, 3)), "relative_bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones(3)},
        "bias": jnp.ones(2),
        "gain": jnp.ones(2),
    }
    expected = {
        "attention": {"q": True, "relative_bias": False},
        "norm": {"scale": False},
        "bias": False,
        "gain": False,
    }
    assert decayed(params) == expected
    zero = jax.tree.map(jnp.zeros_like, params)
    for rate in (0.1, 0.001):
        settings = {"name": name, "learning_rate": rate, "schedule": "constant"}
        optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, **settings), STEPS)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        jax.tree.map(
            lambda update, decays, rate=rate: np.testing.assert_allclose(
                update, -rate * 0.5 * decays, rtol=1e-6
            ),
            updates,
            expected,
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"floor": 1.5}, "within 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"b1": 1.0}, "b1, b2 and epsilon are 1.0, 0.98 and 1e-08, must be within"),
        ({"b2": float("nan")}, "b1, b2 and epsilon are"),
        ({"epsilon": 0.0}, "b1, b2 and epsilon are"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"name": "adafactor", "b1": 0.8}, "b1 is not a setting of adafactor"),
        ({"scale_by_parameter": False}, "scale_by_parameter is not a setting of adamw"),
    ],
)
def test_bad_settings_are_refused_in_words(fields, words):
    with pytest.raises(UserError, match=words):
        OptimizerConfig(**fields)
