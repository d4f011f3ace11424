"""Several drafts of every block, verified in one call: SpecTr's K-SEQ.

Draft j of row b is row b * num_drafts + j of both caches. While they agree with what was emitted
the drafts of a row hold the same prefix; afterwards all of them take over the followed one's.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from distillspec_jax.decoding.sampling import argmax, inverse_cdf
from distillspec_jax.models.cache import Cache

Tree = TypeVar("Tree")

BISECTIONS = 30  # halvings of [1, K]: below float32 resolution


def per_draft(tree: Tree, num_drafts: int) -> Tree:
    """Leaves [B, ...] -> [B * num_drafts, ...], each row once per draft."""
    if num_drafts == 1:
        return tree
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_drafts, axis=0), tree)


def by_row(tree: Tree, num_drafts: int) -> Tree:
    """Leaves [B * num_drafts, ...] -> [B, num_drafts, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, num_drafts, *leaf.shape[1:]), tree)


def follow(tree: Tree, path: jax.Array, num_drafts: int) -> Tree:
    """Leaves [B * num_drafts, ...] -> [B, ...], those of draft `path` [B] of each row."""
    if num_drafts == 1:
        return tree
    rows = jnp.arange(path.shape[0]) * num_drafts + path
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def share_cache(cache: Cache, path: jax.Array, num_drafts: int) -> Cache:
    """Gives all drafts of a row the keys and values of the draft that was followed."""
    shared = per_draft(follow((cache.keys, cache.values), path, num_drafts), num_drafts)
    return cache.replace(keys=shared[0], values=shared[1])


def k_seq_rule(
    target_probs: jax.Array,
    draft_probs: jax.Array,
    draft_tokens: jax.Array,
    draft_lengths: jax.Array,
    uniforms: jax.Array,
    last_uniforms: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Verifies K drafts of a row: at each position those that share the accepted prefix compete.

    target_probs: [B, K, gamma + 1, V]. draft_probs: [B, K, gamma, V]. draft_tokens, uniforms:
    [B, K, gamma]. draft_lengths: [B, K]. last_uniforms: [B, gamma + 1]. Returns (path [B] a draft
    that holds the accepted tokens, num_accepted [B], next_token [B]).

    At one position the surviving drafts are tried in order, x accepted with probability
    min(1, p(x) / (rho q(x))); if none is, the token comes from `_rejected_all`. Drafts whose token
    is the emitted one survive, also where the emitted one was drawn after all were rejected. The
    block ends where none survives, or with a bonus token of p. Lossless; with K = 1 it is
    `token_rule`. Source: SpecTr (arXiv 2310.15141), K-SEQ.
    """
    batch_size, _, gamma = draft_tokens.shape
    rows = jnp.arange(batch_size)
    alive = jnp.ones(draft_tokens.shape[:2], bool)
    running = jnp.ones(batch_size, bool)
    path = num_accepted = next_token = jnp.zeros(batch_size, jnp.int32)
    for i in range(gamma + 1):
        p = target_probs[rows, path, i]
        if i == gamma:
            token, survives = inverse_cdf(p, last_uniforms[:, i]), jnp.zeros_like(alive)
        else:
            is_drafted = draft_lengths[rows, path] > i
            candidates = alive & is_drafted[:, None]
            tokens = draft_tokens[:, :, i]
            q = draft_probs[rows, path, i]
            token = _compete(p, q, tokens, candidates, uniforms[:, :, i], last_uniforms[:, i])
            survives = candidates & (tokens == token[:, None])
        goes_on = running & jnp.any(survives, axis=1)
        next_token = jnp.where(running, token, next_token)
        num_accepted += goes_on
        alive = jnp.where(goes_on[:, None], survives, alive)
        path = jnp.where(goes_on, argmax(alive), path)
        running = goes_on
    return path, num_accepted, next_token


def _compete(
    p: jax.Array,
    q: jax.Array,
    tokens: jax.Array,
    candidates: jax.Array,
    uniforms: jax.Array,
    last_uniform: jax.Array,
) -> jax.Array:
    """The token [B] of one position: tokens, candidates, uniforms [B, K]; p, q [B, V]."""
    count = jnp.sum(candidates, axis=1)
    rho = smallest_rho(p, q, count)[:, None]
    p_at = jnp.take_along_axis(p, tokens, axis=1)
    q_at = jnp.take_along_axis(q, tokens, axis=1)
    accepted = candidates & (uniforms * rho * q_at < p_at)
    first = argmax(accepted)[:, None]
    chosen = jnp.take_along_axis(tokens, first, axis=1)[:, 0]
    corrected = inverse_cdf(_rejected_all(p, q, rho, count), last_uniform)
    return jnp.where(jnp.any(accepted, axis=1), chosen, corrected)


def smallest_rho(p: jax.Array, q: jax.Array, count: jax.Array) -> jax.Array:
    """The smallest rho in [1, count] that keeps the correction a distribution: [B].

    Root of 1 - (1 - beta)^count = rho beta, beta(rho) = sum_v min(q, p / rho); bisected from the
    side where the left does not exceed the right.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        beta = jnp.sum(jnp.minimum(q, p / middle[:, None]), axis=1)
        valid = 1 - (1 - beta) ** count <= middle * beta
        return jnp.where(valid, low, middle), jnp.where(valid, middle, high)

    low = jnp.ones_like(p[:, 0])
    high = jnp.maximum(low, count.astype(p.dtype))
    return jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))[1]


def _rejected_all(p: jax.Array, q: jax.Array, rho: jax.Array, count: jax.Array) -> jax.Array:
    """Weights [B, V] of the token after `count` [B] rejections at rho [B, 1]; p if all vanish.

    p - min(q, p / rho) (1 - (1 - beta)^count) / beta; p itself without candidates.
    """
    overlap = jnp.minimum(q, p / rho)
    beta = jnp.sum(overlap, axis=1, keepdims=True)
    accepting = 1 - (1 - beta) ** count[:, None]
    share = jnp.where(beta > 0, accepting / jnp.where(beta > 0, beta, 1), 0)
    weights = jnp.maximum(p - overlap * share, 0)
    return jnp.where(jnp.any(weights > 0, axis=1, keepdims=True), weights, p)
