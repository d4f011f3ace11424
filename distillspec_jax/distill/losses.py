"""From values per token to one loss: masks, reductions and the vocabulary in chunks.

Shapes: B batch, T query length, C positions of a chunk, D model size, V vocabulary. Losses are a
sum and a count, so that those of micro-batches and of hosts add up exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.errors import unknown_name

REDUCTIONS = ("sequence", "token")

# logits [B, C, V], fields {name: [B, C, ...]} -> values [B, C], watched {name: [B, C]}
TokenLoss = Callable[[jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


def token_mask(targets: jax.Array, pad_id: int = 0) -> jax.Array:
    """1.0 where a token is real, 0.0 at padding: [B, T] -> [B, T] float32."""
    return (targets != pad_id).astype(jnp.float32)


def token_weights(mask: jax.Array, reduction: str = "sequence") -> tuple[jax.Array, jax.Array]:
    """Weights [B, T] and count [] so that the loss is sum(weights * values) / count.

    'sequence': (1/n) sum_b (1/|y_b|) sum_t, the mean over the tokens of each sequence, then over
    the n sequences that are not empty (arXiv 2310.08461, 3). 'token': the mean over all tokens,
    in which long sequences weigh more (TRL).
    """
    if reduction == "token":
        return mask, jnp.sum(mask)
    if reduction == "sequence":
        lengths = jnp.sum(mask, axis=-1, keepdims=True)
        return mask / jnp.maximum(lengths, 1.0), jnp.sum(lengths > 0).astype(jnp.float32)
    raise unknown_name("reduction", reduction, REDUCTIONS)


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log q(y) of each target token y: [..., V], [...] int32 -> [...] float32, in nats."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def most_learnable(gains: jax.Array, mask: jax.Array, fraction: float) -> jax.Array:
    """Mask [B, T] of the `fraction` of real tokens with the largest gains [B, T], ties included.

    The gain is how much more the draft loses at a token than a reference draft does. The
    threshold is taken over all real tokens of the (micro-)batch. Source: arXiv 2510.19779
    (AdaSPEC), 3.
    """
    below = fraction * (1 - 2**-21)  # float32 makes 0.3 of 50 a little more than 15
    kept = jnp.ceil(below * jnp.sum(mask)).astype(jnp.int32)
    ranked = jnp.sort(jnp.where(mask > 0, gains, -jnp.inf).reshape(-1), descending=True)
    return mask * (gains >= ranked[jnp.maximum(kept, 1) - 1])


def in_chunks(function: Callable[[Any], Any], fields: Any, chunk: int | None = None) -> Any:
    """function(fields), `chunk` positions at a time.

    `fields` is a pytree of [B, T, ...], and `function` returns one too, of the same B and T.
    """
    length = jax.tree.leaves(fields)[0].shape[1]
    if chunk is None or chunk >= length:
        return function(fields)
    return _join(jax.lax.map(function, _split(fields, chunk)), length)


def weighted_sum(
    token_loss: TokenLoss,
    unembed: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: jax.Array,
    fields: Any,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum(weights * token_loss(unembed(params, hidden), fields)) [], and what it watched [B, T].

    Differentiable in `params` and `hidden` [B, T, D] only. With `chunk`, only that many positions
    have logits at a time: each chunk's gradient is taken in the forward pass, while its logits
    live, so that nothing of size [B, T, V] exists and no logits are computed twice. Value and
    gradient are those of `chunk=None`; `chunk` need not divide T. `fields` is a pytree of
    [B, T, ...]; what `token_loss` closes over is held constant.
    """
    length = hidden.shape[1]
    fields, weights = jax.lax.stop_gradient((fields, weights))

    def weighted(read, parts):
        hidden, fields, weights = parts
        values, watched = token_loss(read(hidden), fields)
        # the value at a masked position may be infinite, and 0 * inf is NaN
        return weights * jnp.where(weights > 0, values, 0.0), watched

    if chunk is None or chunk >= length:
        values, watched = weighted(lambda h: unembed(params, h), (hidden, fields, weights))
        return jnp.sum(values), watched

    # of all params only those that `unembed` reads: they get an accumulator in the scan
    read, used = jax.closure_convert(lambda h: unembed(params, h), hidden[:, :chunk])

    @jax.custom_vjp
    def fused(used, hidden):
        bound = functools.partial(weighted, lambda h: read(h, *used))
        values, watched = in_chunks(bound, (hidden, fields, weights), chunk)
        return jnp.sum(values), watched

    def forward(used, hidden):
        def chunk_sum(used, hidden, *rest):
            values, watched = weighted(lambda h: read(h, *used), (hidden, *rest))
            return jnp.sum(values), watched

        def add(carry, parts):
            grad = jax.value_and_grad(chunk_sum, argnums=(0, 1), has_aux=True)
            (total, watched), (used_grads, hidden_grads) = grad(used, *parts)
            return jax.tree.map(jnp.add, carry, (total, used_grads)), (watched, hidden_grads)

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, used))
        (total, used_grads), per_token = jax.lax.scan(
            add, start, _split((hidden, fields, weights), chunk)
        )
        watched, hidden_grads = _join(per_token, length)
        return (total, watched), (used_grads, hidden_grads)

    def backward(grads, cotangents):
        return jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), grads)

    fused.defvjp(forward, backward)
    return fused(used, hidden)


def _split(tree: Any, chunk: int) -> Any:
    """[B, T, ...] -> [chunks, B, C, ...], padded with zeros: positions of weight 0."""

    def split(x: jax.Array) -> jax.Array:
        missing = -x.shape[1] % chunk
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree: Any, length: int) -> Any:
    """Undoes `_split`: [chunks, B, C, ...] -> [B, length, ...]."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)
