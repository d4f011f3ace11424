"""The state: one step of it is optax's, and a gradient that is not finite changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState

STEPS = 7


def params():
    return {"w": jnp.arange(15.0).reshape(5, 3) / 7, "norm": {"scale": jnp.ones(3)}}


def gradients(step):
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "w": jax.random.normal(keys[0], (5, 3)),
        "norm": {"scale": jax.random.normal(keys[1], (3,))},
    }


def adamw(**fields):
    return make_optimizer(OptimizerConfig(**fields), STEPS)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_steps_are_those_of_the_optimizer():
    optimizer = adamw(clip_norm=0.0, weight_decay=0.1)
    state, expected = TrainState.create(params(), optimizer, seed=11), params()
    opt_state = optimizer.init(expected)
    for step in range(STEPS):
        state = state.apply_gradients(gradients(step), optimizer)
        updates, opt_state = optimizer.update(gradients(step), opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert int(state.step) == STEPS
    assert int(state.seed) == 11
    assert_same(state.params, expected)
    assert_same(state.opt_state, opt_state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradient_not_finite_is_left_out_and_counted(bad):
    optimizer = adamw()
    state = TrainState.create(params(), optimizer, average_decay=0.9)
    state = state.apply_gradients(gradients(0), optimizer)
    poisoned = gradients(1)
    poisoned["norm"]["scale"] = poisoned["norm"]["scale"].at[1].set(bad)
    after = state
    for count in (1, 2, 3):
        after = after.apply_gradients(poisoned, optimizer)
        assert (int(after.skipped), int(after.skipped_in_row)) == (count, count)
    assert int(after.step) == 4
    for name in ("params", "opt_state", "average"):
        assert_same(getattr(after, name), getattr(state, name))
    good = after.apply_gradients(gradients(2), optimizer)
    assert (int(good.skipped), int(good.skipped_in_row)) == (3, 0)
    assert_same(good.params, state.apply_gradients(gradients(2), optimizer).params)


def test_steps_left_out_do_not_lengthen_the_memory_of_the_average():
    optimizer = adamw(learning_rate=0.1)
    straight = late = TrainState.create(params(), optimizer, average_decay=0.9)
    for step in range(2):
        for _ in range(3):
            late = late.apply_gradients(jax.tree.map(lambda g: g * np.nan, params()), optimizer)
        straight = straight.apply_gradients(gradients(step), optimizer)
        late = late.apply_gradients(gradients(step), optimizer)
    assert_same(late.average, straight.average)


def test_average_is_the_recursion_with_a_short_memory_at_first():
    optimizer = adamw(learning_rate=0.1)
    state = TrainState.create(params(), optimizer, average_decay=0.5)
    average = np.asarray(params()["w"], np.float64)
    for step in range(STEPS):
        state = state.apply_gradients(gradients(step), optimizer)
        decay = min(0.5, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-6)
    assert state.averaged_params is state.average


def test_without_average_the_trained_weights_are_the_best():
    state = TrainState.create(params(), adamw())
    assert state.average is None
    assert state.averaged_params is state.params


def test_donating_the_state_leaves_the_given_params_alone():
    optimizer, given = adamw(), params()
    state = TrainState.create(given, optimizer, average_decay=0.9)
    step = jax.jit(lambda s: s.apply_gradients(gradients(0), optimizer), donate_argnums=0)
    step(state)
    assert_same(given, params())


def test_weights_are_trained_in_float32_whatever_they_come_in():
    rough = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = TrainState.create(rough, adamw(), average_decay=0.9)
    for tree in (state.params, state.average):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    assert_same(state.params, jax.tree.map(lambda x: x.astype(jnp.float32), rough))


def test_weights_in_another_dtype_stay_where_they_lie():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    place = jax.NamedSharding(mesh, jax.P("data"))
    given = {"w": jax.device_put(jnp.ones((4, 3), jnp.bfloat16), place)}
    assert TrainState.create(given, optax.sgd(0.1)).params["w"].sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize("seed", [-1, 2**32, np.int64(-1), 0.5])
def test_seeds_that_are_no_uint32_are_refused(seed):
    with pytest.raises(UserError, match=rf"seed is {seed}, must be an integer within 0 and 2"):
        TrainState.create(params(), adamw(), seed=seed)
