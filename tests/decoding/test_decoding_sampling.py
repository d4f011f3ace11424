"""Logits to distributions, distributions to tokens, and whose random numbers are whose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding.keys import block_uniforms, position_uniforms, row_keys
from distillspec_jax.decoding.sampling import Sampling, argmax, draw, inverse_cdf, process
from distillspec_jax.errors import UserError

processed = jax.jit(process, static_argnums=1)
drawn = jax.jit(draw, static_argnums=2)
inverse = jax.jit(inverse_cdf)
LARGEST = np.float32(1 - 2**-24)  # the largest float32 below 1


def by_sorting(logits, temperature, top_k, top_p):
    """The same distribution from a sorted row, in float64; for rows without ties."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled)
    probs[order[top_k or len(order) :]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= (top_p if top_p < 1 else 2)]] = 0  # rounding can pass 1
    return probs / probs.sum()


@pytest.mark.parametrize(
    "settings", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.7, 0, 0.8), (0.9, 11, 0.6)]
)
def test_process_matches_a_sorted_row(settings):
    logits = np.random.default_rng(1).normal(size=(7, 301)).astype(np.float32) * 3
    expected = np.stack([by_sorting(row, *settings) for row in logits])
    probs = np.asarray(processed(logits, Sampling(*settings)))
    assert ((probs > 0) == (expected > 0)).all()
    np.testing.assert_allclose(probs, expected, rtol=2e-5)


def test_top_p_reaches_its_mass_with_the_fewest_tokens():
    probs = processed(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), Sampling(top_p=0.75))
    np.testing.assert_allclose(probs, [0.625, 0.375, 0, 0], rtol=1e-6)


def test_ties_at_the_edge_are_kept_together():
    logits = jnp.log(jnp.array([0.1, 0.3, 0.3, 0.3]))
    third = [0, 1 / 3, 1 / 3, 1 / 3]
    np.testing.assert_allclose(processed(logits, Sampling(top_k=2)), third, rtol=1e-6)
    np.testing.assert_allclose(processed(logits, Sampling(top_p=0.4)), third, rtol=1e-6)


def test_greedy_takes_the_lowest_of_equal_maxima():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    token, probs = drawn(logits, jnp.array([0.9, 0.9]), Sampling(temperature=0))
    assert token.tolist() == [1, 0]
    assert probs.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_argmax_equals_numpys():
    values = np.random.default_rng(2).integers(5, size=(97, 31)).astype(np.float32)
    assert (np.asarray(argmax(values)) == values.argmax(axis=1)).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    """Below 1e-38 lies what float32 takes for 0."""
    logits = jnp.array([[1.0, 3.0, 2.0, -jnp.inf], [-400.0, -900.0, -400.5, -401.0]])
    probs = processed(logits, Sampling(temperature, top_k=3))
    assert probs.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0), Sampling(), Sampling(top_k=2), Sampling(top_p=0.3), Sampling(0.5, 3, 0.9)],
)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_logit_spreads_over_its_row_and_no_other(sampling, broken):
    logits = np.random.default_rng(3).normal(size=(3, 7)).astype(np.float32)
    logits[1, 4] = broken
    probs = np.asarray(processed(logits, sampling))
    assert np.isnan(probs[1]).all()
    assert np.isfinite(probs[[0, 2]]).all()


@pytest.mark.parametrize("size", [5, 128, 1009])
def test_inverse_cdf_matches_a_running_sum(size):
    rng = np.random.default_rng(size)
    weights = (rng.dirichlet(np.full(size, 0.3)) * 7).astype(np.float32)
    uniforms = rng.uniform(size=20_011).astype(np.float32)
    edges = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    tokens = np.asarray(inverse(jnp.tile(weights[None], (len(uniforms), 1)), uniforms))
    clear = np.abs(edges[None] - uniforms[:, None]).min(axis=1) > 1e-6
    assert clear.mean() > 0.95
    assert (tokens == np.searchsorted(edges, uniforms, side="right"))[clear].all()


def test_a_token_without_weight_is_never_drawn():
    rng = np.random.default_rng(5)
    weights = rng.uniform(size=(61, 389)).astype(np.float32)
    weights[rng.uniform(size=weights.shape) < 0.5] = 0
    weights[:, [0, 127, 128, 129, 388]] = 0  # first, last, and both sides of a block's edge
    weights[::2, 128:256] = 0  # a block without weight
    weights[1::2, 256:] = 0  # nothing but zeros behind
    for uniform in (0, 1e-30, 0.3, LARGEST):
        tokens = np.asarray(inverse(weights, jnp.full(61, uniform, jnp.float32)))
        assert (weights[np.arange(61), tokens] > 0).all()


def test_draw_returns_the_distribution_it_drew_from():
    logits = np.random.default_rng(6).normal(size=(101, 13)).astype(np.float32)
    uniforms = np.random.default_rng(7).uniform(size=101).astype(np.float32)
    for sampling in (Sampling(), Sampling(0.5, top_k=3), Sampling(top_p=0.4), Sampling(0)):
        token, probs = map(np.asarray, drawn(logits, uniforms, sampling))
        np.testing.assert_array_equal(probs, processed(logits, sampling))
        assert (probs[np.arange(101), token] > 0).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0; it must be 0"),
        ({"top_k": float("nan")}, "top_k is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": 1e-46}, "top_p is 1e-46"),  # 0 in float32
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"temperature": jnp.float32(1)}, "it must be a number"),
        ({"top_k": True}, "top_k is True; it must be 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        Sampling(**settings)


def test_random_numbers_belong_to_the_row():
    rng = jax.random.key(8)
    ids = jnp.array([3, 1, 4, 15])
    uniforms = jax.jit(lambda ids: position_uniforms(row_keys(rng, ids), 11))
    together = uniforms(ids)
    np.testing.assert_array_equal(together[2], uniforms(ids[2:3])[0])
    np.testing.assert_array_equal(together[::-1], uniforms(ids[::-1]))
    assert len(np.unique(together)) == together.size


def test_a_longer_limit_begins_with_the_same_numbers():
    draws = functools.partial(position_uniforms, row_keys(jax.random.key(9), jnp.arange(3)))
    np.testing.assert_array_equal(draws(5), draws(17)[:, :5])


def test_every_block_has_its_own_numbers():
    keys = row_keys(jax.random.key(10), jnp.arange(5))
    first, second = (block_uniforms(keys, jnp.full(5, block), 7) for block in (0, 1))
    assert len(np.unique(jnp.concatenate([first, second]))) == 70
    mixed = block_uniforms(keys, jnp.array([0, 1, 0, 1, 0]), 7)
    np.testing.assert_array_equal(mixed, jnp.where(jnp.arange(5)[:, None] % 2, second, first))


def test_a_temperature_that_makes_all_equal_keeps_the_k_largest():
    """Divided by it the logits are ties; which are the largest is asked before."""
    probs = process(jnp.array([1.0, 4.0, 2.0, 3.0]), Sampling(1e38, top_k=2))
    np.testing.assert_array_equal(probs, [0, 0.5, 0, 0.5])
