"""Who writes the text that the draft learns from: references, target, draft, or both in turn.

Algorithm 1 of arXiv 2310.08461: with u1, u2 ~ U(0, 1) drawn once a step for its whole batch,

    u1 <= lambda1: fixed (the batch's targets);  else  u2 <= lambda2: draft;  else: teacher

so P(fixed) = lambda1, P(draft) = (1 - lambda1) lambda2, P(teacher) = (1 - lambda1)(1 - lambda2).
Rollouts are drawn with the current weights, without dropout, and end with their end-of-sequence,
which is kept. Every draw is a function of (seed, purpose, step, example), not of the place in a
batch; nothing here is differentiable, the tokens are integers. A model that writes the padding id
has written nothing there: the losses leave that position out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.decoding import keys
from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling, draw
from distillspec_jax.decoding.speculative import speculate
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.distill.recipes import Recipe
from distillspec_jax.models.transformer import (
    Params,
    Transformer,
    hidden_states,
    in_compute_dtype,
    next_logits,
    start,
)

SOURCES = ("fixed", "draft", "teacher")

# tokens [B, L], and the target's hidden states [B, L, D] on them where writing has made them
Text = tuple[jax.Array, jax.Array | None]
# (draft_params, target_params, inputs [B, S], key, row_ids [B]) -> text
Writer = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Text]


def step_key(seed: jax.Array, purpose: str, step: jax.Array) -> jax.Array:
    """The key of everything random that one step does for one purpose."""
    return jax.random.fold_in(keys.purpose_key(seed, purpose), step)


def source_probabilities(recipe: Recipe) -> dict[str, float]:
    """How often each source writes a batch; the three sum to 1."""
    sampled = 1.0 - recipe.lambda1
    return {
        "fixed": recipe.lambda1,
        "draft": sampled * recipe.lambda2,
        "teacher": sampled * (1.0 - recipe.lambda2),
    }


def draw_source(key: jax.Array, recipe: Recipe) -> jax.Array:
    """Index in SOURCES of the source of one step: [] int32.

    Strictly less than lambda: uniforms lie in [0, 1), so a source of probability 0 never comes.
    """
    u1, u2 = jax.random.uniform(key, (2,))
    sampled = jnp.where(u2 < recipe.lambda2, SOURCES.index("draft"), SOURCES.index("teacher"))
    return jnp.where(u1 < recipe.lambda1, SOURCES.index("fixed"), sampled)


def make_source(
    draft: Transformer, target: Transformer, recipe: Recipe, *, rollout_length: int
) -> Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[Text, jax.Array]]:
    """Returns `(draft_params, target_params, batch, seed, step) -> (text [B, L], source [])`.

    Traceable. `source` is an index in SOURCES; L is the longer of `rollout_length` and the
    references if both can come, else that of the one that does. Sources of probability 0 are not
    compiled. If `recipe.keeps_target_hidden`, every text has the target's hidden states: a text
    that it has not written is scored here.
    """
    writers = _writers(draft, target, recipe, rollout_length)
    probabilities = source_probabilities(recipe)
    possible = [name for name in SOURCES if probabilities[name] > 0]

    def write(draft_params, target_params, batch, seed, step):
        width = max(
            batch.targets.shape[1] if name == "fixed" else rollout_length for name in possible
        )

        def branch(name: str) -> Callable[[jax.Array], Text]:
            def text(key: jax.Array) -> Text:
                tokens, hidden = batch.targets, None
                if name != "fixed":
                    params = draft_params, target_params
                    tokens, hidden = writers[name](*params, batch.inputs, key, batch.example_ids)
                if recipe.keeps_target_hidden and hidden is None:
                    hidden = hidden_states(target, target_params, batch.inputs, tokens)
                hidden = None if hidden is None else _widen(hidden, width, 0)
                return _widen(tokens, width, draft.config.pad_id), hidden

            return text

        key = step_key(seed, "rollout", step)
        if len(possible) == 1:
            return branch(possible[0])(key), jnp.int32(SOURCES.index(possible[0]))
        source = draw_source(step_key(seed, "source", step), recipe)
        # branches hold only what can come: from an index in SOURCES to one in `possible`
        place = sum(source > SOURCES.index(name) for name in possible)
        return jax.lax.switch(place, [branch(name) for name in possible], key), source

    return write


def _writers(
    draft: Transformer, target: Transformer, recipe: Recipe, length: int
) -> dict[str, Writer]:
    """The function that writes for each sampled source."""
    sampling = Sampling(temperature=recipe.rollout_temperature)

    def plain(model, params, inputs, key, row_ids):
        output = generate(
            model, params, inputs, key, sampling=sampling, max_new_tokens=length, row_ids=row_ids
        )
        return output.tokens, None

    def from_draft(draft_params, target_params, inputs, key, row_ids):
        if recipe.interleave_top_k == 0:
            return plain(draft, draft_params, inputs, key, row_ids)
        tokens = interleaved(
            draft,
            draft_params,
            target,
            target_params,
            inputs,
            key,
            top_k=recipe.interleave_top_k,
            sampling=sampling,
            max_new_tokens=length,
            row_ids=row_ids,
        )
        return tokens, None

    def from_teacher(draft_params, target_params, inputs, key, row_ids):
        if recipe.teacher_gamma == 0:
            return plain(target, target_params, inputs, key, row_ids)
        speculation = Speculation(
            target=target,
            draft=draft,
            gamma=recipe.teacher_gamma,
            max_new_tokens=length,
            sampling=sampling,
            keeps_hidden=recipe.keeps_target_hidden,
        )
        output = speculate(speculation, target_params, draft_params, inputs, key, row_ids)
        return output.tokens, output.hidden

    return {"draft": from_draft, "teacher": from_teacher}


def interleaved(
    draft: Transformer,
    draft_params: Params,
    target: Transformer,
    target_params: Params,
    inputs: jax.Array,
    rng: jax.Array,
    *,
    top_k: int = 25,
    sampling: Sampling,
    max_new_tokens: int,
    row_ids: jax.Array,
) -> jax.Array:
    """Text of the draft in which the target replaces what it finds unlikely: tokens [B, L].

    Each token is proposed by the draft; one that is not among the target's `top_k` for that prefix
    is replaced by a sample of the target, and both go on from there. Early in training that is
    mostly the target's text, late mostly the draft's. Source: arXiv 2410.11325 (SKD), algorithm 1.
    """
    config, batch_size = draft.config, inputs.shape[0]
    row_keys = keys.row_keys(rng, row_ids)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (max_new_tokens, 2)))(row_keys)
    draft_params = in_compute_dtype(draft, draft_params)
    target_params = in_compute_dtype(target, target_params)
    draft_cache, draft_pending = start(draft, draft_params, inputs, max_new_tokens)
    target_cache, target_pending = start(target, target_params, inputs, max_new_tokens)
    top_k = min(top_k, config.num_pieces)

    def unfinished(state) -> jax.Array:
        step, _, active, *_ = state
        return (step < max_new_tokens) & jnp.any(active)

    def step(state):
        step, pending, active, tokens, draft_cache, target_cache = state
        draft_logits, draft_cache = next_logits(draft, draft_params, draft_cache, pending[0])
        target_logits, target_cache = next_logits(target, target_params, target_cache, pending[1])
        proposed, _ = draw(draft_logits, uniforms[:, step, 0], sampling)
        instead, _ = draw(target_logits, uniforms[:, step, 1], sampling)
        least = jax.lax.top_k(target_logits, top_k)[0][:, -1]
        rating = jnp.take_along_axis(target_logits, proposed[:, None], axis=-1)[:, 0]
        token = jnp.where(rating >= least, proposed, instead)
        token = jnp.where(active, token, config.pad_id)
        active = active & (token != config.eos_id)
        tokens = tokens.at[:, step].set(token)
        return step + 1, (token, token), active, tokens, draft_cache, target_cache

    tokens = jnp.full((batch_size, max_new_tokens), config.pad_id, jnp.int32)
    pending = (draft_pending, target_pending)  # their start tokens may differ
    initial = (jnp.int32(0), pending, row_ids >= 0, tokens, draft_cache, target_cache)
    return jax.lax.while_loop(unfinished, step, initial)[3]


def _widen(text: jax.Array, width: int, value: int) -> jax.Array:
    """[B, T, ...] -> [B, width, ...], filled up with `value`."""
    padding = [(0, 0), (0, width - text.shape[1])] + [(0, 0)] * (text.ndim - 2)
    return jnp.pad(text, padding, constant_values=value)
