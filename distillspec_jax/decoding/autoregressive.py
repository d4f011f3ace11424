"""Plain decoding: one token per forward pass, greedy or sampled, compiled as one loop.

An output row is the text up to and including its end-of-sequence, then pad_id:

    tokens  [[17, 5, 1, 0, 0],    length 3, ended by eos_id = 1
             [ 4, 9, 9, 2, 6],    length 5, cut by the limit
             [ 1, 0, 0, 0, 0]]    length 1: the model had nothing to say

Rows with a negative id are padding of the batch: they are never active and come out empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from distillspec_jax.decoding import keys
from distillspec_jax.decoding.checks import Array, check_finite, check_request
from distillspec_jax.decoding.sampling import STANDARD, Sampling, draw
from distillspec_jax.errors import check_count, check_kind
from distillspec_jax.models.cache import Cache
from distillspec_jax.models.transformer import (
    Params,
    Transformer,
    in_compute_dtype,
    next_logits,
    start,
)


class Generation(struct.PyTreeNode):
    """Texts of a batch; L is the limit.

    tokens: [B, L] int32, pad_id after the end.
    lengths: [B] int32, tokens with the end-of-sequence.
    finished: [B] bool, ended by eos_id rather than by the limit.
    finite: [B] bool, False where the model gave NaN: the row stops before that token.
    """

    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array
    finite: jax.Array


class _State(struct.PyTreeNode):
    """step: [] tokens drawn so far; pending: [B] the token to feed; active: [B] still writing."""

    step: jax.Array
    pending: jax.Array
    active: jax.Array
    output: Generation
    cache: Cache


def generate(
    model: Transformer,
    params: Params,
    inputs: jax.Array,
    rng: jax.Array,
    *,
    sampling: Sampling = STANDARD,
    max_new_tokens: int,
    row_ids: jax.Array | None = None,
) -> Generation:
    """Writes up to `max_new_tokens` after inputs [B, S], one token per forward pass.

    Traceable: usable inside a jitted step; `autoregressive_sample` compiles and checks. Token t
    of a row depends on `rng`, the row's id [B] and t, not on the batch around it. Rows with a
    negative id stay empty.
    """
    config, batch_size = model.config, inputs.shape[0]
    inputs = inputs.astype(jnp.int32)
    row_ids = keys.default_row_ids(inputs, row_ids)
    uniforms = keys.position_uniforms(keys.row_keys(rng, row_ids), max_new_tokens)
    params = in_compute_dtype(model, params)
    cache, pending = start(model, params, inputs, max_new_tokens)
    output = Generation(
        tokens=jnp.full((batch_size, max_new_tokens), config.pad_id, jnp.int32),
        lengths=jnp.zeros(batch_size, jnp.int32),
        finished=jnp.zeros(batch_size, bool),
        finite=jnp.ones(batch_size, bool),
    )

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & jnp.any(state.active)

    def step(state: _State) -> _State:
        logits, cache = next_logits(model, params, state.cache, state.pending)
        token, probs = draw(logits, uniforms[:, state.step], sampling)
        is_finite = ~jnp.isnan(probs[:, 0])
        emits = state.active & is_finite
        token = jnp.where(emits, token, config.pad_id)
        ends = emits & (token == config.eos_id)
        output = Generation(
            tokens=state.output.tokens.at[:, state.step].set(token),
            lengths=state.output.lengths + emits,
            finished=state.output.finished | ends,
            finite=state.output.finite & (is_finite | ~state.active),
        )
        return _State(state.step + 1, token, emits & ~ends, output, cache)

    initial = _State(jnp.zeros((), jnp.int32), pending, row_ids >= 0, output, cache)
    return jax.lax.while_loop(unfinished, step, initial).output


def autoregressive_sample(
    model: Transformer,
    params: Params,
    inputs: Array,
    rng: jax.Array,
    *,
    sampling: Sampling = STANDARD,
    max_new_tokens: int = 128,
    row_ids: jax.Array | None = None,
) -> Generation:
    """`generate`, compiled once per shape, with its input and its output checked on the host.

    Raises UserError for prompts that are not right-padded ids of the model, row ids that do not
    fit them, what is no key, a limit below 1, or NaN from the model.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_kind("sampling", sampling, Sampling)
    check_request(inputs, row_ids, [model.config], rng=rng)
    row_ids = keys.default_row_ids(inputs, row_ids)
    settings = {"sampling": sampling, "max_new_tokens": max_new_tokens}
    output = _compiled_generate(model, params, inputs, rng, **settings, row_ids=row_ids)
    check_finite(output.finite, f"model '{model.config.name}'")
    return output


_compiled_generate = jax.jit(
    generate, static_argnums=0, static_argnames=("sampling", "max_new_tokens")
)
