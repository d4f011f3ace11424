"""Verification rules: which draft tokens stay, and which token follows them.

A rule is a pure function of probabilities and uniforms,

    rule(target_probs [B, gamma + 1, V], draft_probs [B, gamma, V], draft_tokens [B, gamma],
         draft_lengths [B], uniforms [B, gamma], final_uniform [B])
        -> (num_accepted [B] in 0..draft_lengths, next_token [B])

Row b drafted the first draft_lengths[b] tokens; what stands behind them is never looked at.
target_probs[:, i] is p after i draft tokens, draft_probs[:, i] the q that token i was drawn from:
with the paper's count from 1, p_{i+1}, q_{i+1} and x_{i+1}. The next token is the correction of a
rejected token, or the bonus token of p where all of the row's tokens are accepted.

Comparisons are strict: with u in [0, 1), `u q < p` always accepts where p = q and never where
p = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distillspec_jax.decoding.lenience import Lenience, relax
from distillspec_jax.decoding.sampling import argmax, inverse_cdf

RULES = ("token", "block", "greedy")

Rule = Callable[..., tuple[jax.Array, jax.Array]]


def choose_rule(name: str, lenience: Lenience | None = None) -> Rule:
    """The rule called `name`; `lenience` belongs to the token rule alone."""
    if name == "token":
        return functools.partial(token_rule, lenience=lenience)
    return {"block": block_rule, "greedy": greedy_rule}[name]


def token_rule(
    target_probs: jax.Array,
    draft_probs: jax.Array,
    draft_tokens: jax.Array,
    draft_lengths: jax.Array,
    uniforms: jax.Array,
    final_uniform: jax.Array,
    *,
    lenience: Lenience | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Accepts token after token with probability min(1, p / q), until the first rejection.

    The correction is drawn from norm((p - q)+). Lossless: the emitted tokens have the law of the
    target. With `lenience`, f(p) takes the place of p in the test (and in the residual where it
    says so), and the law changes. Sources: arXiv 2211.17192, Algorithm 1; arXiv 2302.01318.
    """
    gamma = draft_tokens.shape[1]
    p = relax(_at(target_probs[:, :gamma], draft_tokens), lenience)
    q = _at(draft_probs, draft_tokens)
    accepted = (uniforms * q < p) & _drafted(draft_lengths, gamma)
    num_accepted = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1, dtype=jnp.int32)
    target_next, draft_next = _next_probs(target_probs, draft_probs, draft_lengths, num_accepted)
    raised = relax(target_next, lenience) if lenience and lenience.relaxed_residual else target_next
    raised = jnp.where((num_accepted == draft_lengths)[:, None], target_next, raised)
    return num_accepted, _draw_residual(raised, draft_next, target_next, final_uniform)


def block_rule(
    target_probs: jax.Array,
    draft_probs: jax.Array,
    draft_tokens: jax.Array,
    draft_lengths: jax.Array,
    uniforms: jax.Array,
    final_uniform: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Accepts the longest prefix that passes its own test, also behind tests that failed.

        w_0 = 1,  w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i))
        R_i = sum_v (w_i p_{i+1}(v) - q_{i+1}(v))+,   h_i = R_i / (R_i + 1 - w_i),  h_last = w_last

    num_accepted is the largest i with u_i < h_i; the correction comes from
    norm((w_n p_{n+1} - q_{n+1})+). Lossless, and never fewer accepted tokens in expectation than
    `token_rule`. Source: arXiv 2403.10444, Algorithm 2.
    """
    gamma = draft_tokens.shape[1]
    p, q = _at(target_probs[:, :gamma], draft_tokens), _at(draft_probs, draft_tokens)
    ratio = jnp.where(q > 0, p / jnp.where(q > 0, q, 1), p > 0)
    weights = [jnp.ones_like(ratio[:, 0])]
    for i in range(gamma):
        weights.append(jnp.minimum(1, weights[-1] * ratio[:, i]))
    w = jnp.stack(weights, axis=1)  # [B, gamma + 1]: w_0 .. w_gamma

    residual = jnp.maximum(w[:, :gamma, None] * target_probs[:, :gamma] - draft_probs, 0)
    mass = jnp.sum(residual, axis=2)[:, 1:]  # R_1 .. R_{gamma-1}
    rest = mass + 1 - w[:, 1:gamma]
    inner = jnp.where(rest > 0, mass / jnp.where(rest > 0, rest, 1), 1)  # 0/0: p = q, accept
    thresholds = jnp.concatenate([inner, w[:, gamma:]], axis=1)
    indices = jnp.arange(1, gamma + 1)[None]
    thresholds = jnp.where(indices == draft_lengths[:, None], w[:, 1:], thresholds)

    passed = (uniforms < thresholds) & _drafted(draft_lengths, gamma)
    num_accepted = jnp.max(jnp.where(passed, indices, 0), axis=1).astype(jnp.int32)
    target_next, draft_next = _next_probs(target_probs, draft_probs, draft_lengths, num_accepted)
    weight = jnp.take_along_axis(w, num_accepted[:, None], axis=1)
    weight = jnp.where((num_accepted == draft_lengths)[:, None], 1, weight)
    return num_accepted, _draw_residual(
        weight * target_next, draft_next, target_next, final_uniform
    )


def greedy_rule(
    target_probs: jax.Array,
    draft_probs: jax.Array,
    draft_tokens: jax.Array,
    draft_lengths: jax.Array,
    uniforms: jax.Array,
    final_uniform: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Accepts while the draft token is the target's argmax; what both rules become at T = 0.

    Any draft will do, sampled or greedy: with a one-hot p the test u q < p is just this one.
    """
    choices = argmax(target_probs)  # [B, gamma + 1]
    gamma = draft_tokens.shape[1]
    accepted = (draft_tokens == choices[:, :gamma]) & _drafted(draft_lengths, gamma)
    num_accepted = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1, dtype=jnp.int32)
    return num_accepted, jnp.take_along_axis(choices, num_accepted[:, None], axis=1)[:, 0]


def _at(probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """probs [B, T, V] at tokens [B, T] -> [B, T]."""
    return jnp.take_along_axis(probs, tokens[..., None], axis=2)[..., 0]


def _drafted(draft_lengths: jax.Array, gamma: int) -> jax.Array:
    """True at the positions that a row drafted: [B, gamma]."""
    return jnp.arange(gamma)[None] < draft_lengths[:, None]


def _next_probs(
    target_probs: jax.Array,
    draft_probs: jax.Array,
    draft_lengths: jax.Array,
    num_accepted: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """p and q of the token after the accepted ones: [B, V] each; q = 0 where none was drafted."""
    index = num_accepted[:, None, None]
    target_next = jnp.take_along_axis(target_probs, index, axis=1)[:, 0]
    within = jnp.minimum(index, draft_probs.shape[1] - 1)
    draft_next = jnp.take_along_axis(draft_probs, within, axis=1)[:, 0]
    return target_next, jnp.where((num_accepted < draft_lengths)[:, None], draft_next, 0)


def _draw_residual(
    raised: jax.Array, draft_next: jax.Array, target_next: jax.Array, uniform: jax.Array
) -> jax.Array:
    """A token of norm((raised - q)+), or of p where that has no mass (p = q by rounding): [B]."""
    residual = jnp.maximum(raised - draft_next, 0)
    has_mass = jnp.any(residual > 0, axis=1, keepdims=True)
    return inverse_cdf(jnp.where(has_mass, residual, target_next), uniform)
