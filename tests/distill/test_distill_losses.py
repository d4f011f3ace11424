"""Reductions, masks and the chunked vocabulary loss."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.distill import divergences, losses
from distillspec_jax.errors import UserError

B, T, D, V = 3, 7, 5, 13
CHUNKS = (1, 2, 3, 5)  # most do not divide T


def lengths_mask(*lengths: int) -> np.ndarray:
    return (np.arange(T) < np.array(lengths)[:, None]).astype(np.float32)


def mean(values: np.ndarray, mask: np.ndarray, reduction: str) -> float:
    weights, count = losses.token_weights(mask, reduction)
    return float(jnp.sum(weights * values) / jnp.maximum(count, 1.0))


def test_sequence_mean_then_batch_mean_and_token_mean():
    values = np.arange(B * T, dtype=np.float32).reshape(B, T)
    mask = lengths_mask(2, 7, 1)
    rows = [values[0, :2].mean(), values[1].mean(), values[2, 0]]
    assert mean(values, mask, "sequence") == pytest.approx(np.mean(rows))
    assert mean(values, mask, "token") == pytest.approx(values[mask > 0].mean())


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_an_empty_row_counts_for_nothing(reduction):
    values = np.arange(B * T, dtype=np.float32).reshape(B, T)
    with_empty, without = lengths_mask(2, 0, 3), lengths_mask(2, 3)
    expected = mean(values[[0, 2]], without, reduction)
    assert mean(values, with_empty, reduction) == pytest.approx(expected)
    assert mean(values, lengths_mask(0, 0, 0), reduction) == 0.0


def test_unknown_reduction():
    with pytest.raises(UserError, match=r"unknown reduction 'tokens'.*'token'"):
        losses.token_weights(lengths_mask(1), "tokens")


def test_mask_is_what_is_not_padding():
    tokens = np.array([[4, 1, 0], [0, 0, 0]], np.int32)
    np.testing.assert_array_equal(losses.token_mask(tokens), [[1, 1, 0], [0, 0, 0]])


def test_likelihood_of_targets_with_masked_and_huge_logits():
    logits = np.array([[2.0, -1e9, 0.5, -np.inf], [1e5, 0.0, 3.0, 0.0]], np.float32)
    chosen = losses.negative_log_likelihood(logits, np.array([2, 0]))
    np.testing.assert_allclose(chosen, [np.log(np.exp(2) + np.exp(0.5)) - 0.5, 0], rtol=1e-6)
    grads = jax.grad(lambda z: jnp.sum(losses.negative_log_likelihood(z, np.array([2, 0]))))(logits)
    p = np.exp(2) / (np.exp(2) + np.exp(0.5))
    np.testing.assert_allclose(grads, [[p, 0, -p, 0], [0, 0, 0, 0]], atol=1e-6)


def problem(seed: int = 0):
    """Weights of a tiny head with a leaf it does not read, hidden states, targets, weights."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    params = {"head": draw(D, V), "elsewhere": draw(2, 3)}
    target_hidden, tokens = draw(B, T, D), rng.integers(0, V, (B, T)).astype(np.int32)
    weights, _ = losses.token_weights(lengths_mask(4, 7, 1))
    return params, draw(B, T, D), (target_hidden, tokens), weights


def unembed(params, hidden):
    return jnp.einsum("btd,dv->btv", hidden, params["head"])


TARGET_HEAD = np.random.default_rng(1).standard_normal((D, V)).astype(np.float32)


def token_loss(name: str):
    def values(logits, fields):
        target_hidden, tokens = fields
        if name == "nll":
            return losses.negative_log_likelihood(logits, tokens), {}
        target_logits = jnp.einsum("btd,dv->btv", target_hidden, TARGET_HEAD)
        watched = {"accepted": divergences.acceptance_rate(target_logits, logits)}
        return divergences.named(name)(target_logits, logits), watched

    return values


@functools.cache
def loss_and_gradient(name: str, chunk: int | None):
    def loss(params, hidden, fields, weights):
        return losses.weighted_sum(
            token_loss(name), unembed, params, hidden, fields, weights, chunk=chunk
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", ["nll", *divergences.DIVERGENCES])
def test_chunked_is_plain(name):
    arguments = problem()
    plain = loss_and_gradient(name, None)(*arguments)
    assert float(jnp.max(jnp.abs(plain[1][0]["head"]))) > 1e-3
    for chunk in CHUNKS if name in ("nll", "forward_kl") else (3,):
        chunked = loss_and_gradient(name, chunk)(*arguments)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), plain, chunked
        )


def test_chunk_longer_than_the_text_is_plain():
    arguments = problem()
    plain, longer = (loss_and_gradient("tvd", chunk)(*arguments)[0][0] for chunk in (None, 64))
    assert float(plain) == float(longer)


def test_chunked_gradient_scales_with_what_comes_after():
    """The gradient is taken early; a factor applied later must reach it."""
    params, *rest = problem()

    def tripled(params, chunk):
        total, _ = losses.weighted_sum(token_loss("jsd"), unembed, params, *rest, chunk=chunk)
        return 3.0 * total**2

    grads = [jax.jit(jax.grad(tripled), static_argnums=1)(params, chunk) for chunk in (None, 3)]
    np.testing.assert_allclose(grads[0]["head"], grads[1]["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 3])
def test_masked_positions_are_as_if_dropped(chunk):
    """Whatever stands behind the text, infinite losses included, changes nothing."""
    params, hidden, (target_hidden, _), _ = problem()
    mask = lengths_mask(4, 4, 2)
    weights, _ = losses.token_weights(mask)
    spoilt = np.where(mask[..., None] > 0, hidden, 1e20).astype(np.float32)
    infinite = np.where(mask > 0, 0.0, np.inf).astype(np.float32)

    def infinite_loss(logits, fields):
        values, watched = token_loss("forward_kl")(logits, (fields[0], None))
        return values + fields[1], watched

    def loss(params, hidden, fields, weights):
        return losses.weighted_sum(
            infinite_loss, unembed, params, hidden, fields, weights, chunk=chunk
        )

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    whole = (spoilt, (target_hidden, infinite), weights)
    (value, _), (grads, hidden_grads) = run(params, *whole)
    (expected, _), (expected_grads, _) = run(params, *jax.tree.map(lambda x: x[:, :4], whole))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(grads["head"], expected_grads["head"], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(hidden_grads)[mask == 0] == 0.0)


def sizes_and_products(equations, chunk: int | None) -> tuple[int, int]:
    """The largest array, and how many products make logits, in the loss with its gradient."""
    largest, products = 0, 0
    for equation in equations(jax.make_jaxpr(loss_and_gradient("forward_kl", chunk))(*problem())):
        shapes = [v.aval.shape for v in equation.outvars]
        largest = max([largest, *(int(np.prod(shape)) for shape in shapes)])
        makes_logits = len(shapes[0]) == 3 and shapes[0][-1] == V
        products += equation.primitive.name == "dot_general" and makes_logits
    return largest, products


def test_no_array_of_all_logits_and_none_made_twice(equations):
    largest, products = sizes_and_products(equations, None)
    assert (largest, products) == (B * T * V, 2)  # draft and target
    largest, products = sizes_and_products(equations, 2)
    assert largest < B * T * V / 2
    assert products == 2


def test_in_chunks_is_plain():
    x = np.arange(B * T * D, dtype=np.float32).reshape(B, T, D)
    function = lambda fields: {"sum": jnp.sum(fields["x"], -1), "twice": 2 * fields["x"]}  # noqa: E731
    plain = function({"x": x})
    for chunk in (None, *CHUNKS, 64):
        chunked = losses.in_chunks(function, {"x": x}, chunk)
        jax.tree.map(np.testing.assert_array_equal, plain, chunked)


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75, 1.0])
def test_most_learnable_keeps_the_largest_gains_of_the_batch(fraction):
    gains = np.random.default_rng(2).standard_normal((B, T)).astype(np.float32)
    mask = lengths_mask(3, 7, 1)
    gains[mask == 0] = 9.0  # padding must not be chosen, nor move the threshold
    kept = np.asarray(losses.most_learnable(gains, mask, fraction))
    real = np.sort(gains[mask > 0])[::-1]
    count = int(np.ceil(fraction * 11))
    assert kept.sum() == count
    assert np.all(kept[mask == 0] == 0)
    np.testing.assert_array_equal(np.sort(gains[kept > 0])[::-1], real[:count])


@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.4, 0.6, 0.7, 0.95, 1.0])
def test_most_learnable_counts_as_on_paper(fraction):
    """In float32 0.3 times 50 is more than 15."""
    keep = jax.jit(losses.most_learnable, static_argnums=2)
    gains = np.arange(400, dtype=np.float32)[None]
    for count in range(20, 401, 20):
        mask = (np.arange(400) < count).astype(np.float32)[None]
        assert keep(gains, mask, fraction).sum() == round(fraction * count)
    mask = (np.arange(400) < 7).astype(np.float32)[None]
    assert keep(gains, mask, fraction).sum() == math.ceil(fraction * 7)


def test_most_learnable_keeps_all_ties_and_survives_an_empty_batch():
    mask = lengths_mask(2, 3, 1)
    np.testing.assert_array_equal(losses.most_learnable(np.zeros((B, T)), mask, 0.4), mask)
    empty = lengths_mask(0, 0, 0)
    assert np.sum(losses.most_learnable(np.zeros((B, T)), empty, 0.4)) == 0
