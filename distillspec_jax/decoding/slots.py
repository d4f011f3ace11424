"""A data set through a fixed number of slots: rows that end make room for waiting prompts.

In a batch every row waits for the longest; here a compiled loop runs until enough slots are free,
then their texts are taken out and as many prompts move in, always in the same shapes. A prompt's
output is that of `speculative_sample` for its row id, whatever slot and company it had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.decoding.checks import check_finite, check_request
from distillspec_jax.decoding.speculative import advance, begin, in_compute_dtypes, output_of
from distillspec_jax.decoding.state import Speculation, SpeculativeOutput, State
from distillspec_jax.errors import UserError, check_count
from distillspec_jax.models.transformer import Params


def slot_sample(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    inputs: np.ndarray,
    rng: jax.Array,
    *,
    slots: int,
    refill: int | None = None,
    row_ids: np.ndarray | None = None,
    report: Callable[[int], None] = lambda finished: None,
) -> SpeculativeOutput:
    """Decodes inputs [P, S] in `slots` rows at a time; the result is numpy throughout, [P, ...].

    `refill` prompts move in together, as soon as that many slots are free: more waiting against
    fewer reads of prompts. None takes an eighth of the slots, and no more slots than prompts.
    `report` is told how many texts are finished, now and then. Compiles three functions per shape
    and settings. `statistics.draft_steps` depends on the company, the rest does not. Raises
    UserError as `speculative_sample` does, and for row ids below 0, which mark empty slots here.
    """
    check_count("slots", slots)
    params = target_params, draft_params
    check_request(inputs, row_ids, speculation.configs, rng=rng, lowest_id=0)
    if refill is None:
        slots = min(slots, len(inputs))
        refill = max(1, slots // 8)
    check_count("refill", refill)
    if refill > slots:
        raise UserError(f"refill is {refill}; it must be between 1 and the {slots} slots")
    row_ids = np.arange(len(inputs)) if row_ids is None else np.asarray(row_ids)
    pad_id = speculation.target.config.pad_id

    def prompts(first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the next prompts, their tokens and row ids; -1 where none are left."""
        indices = np.arange(first, first + count)
        indices = np.where(indices < len(inputs), indices, -1)
        there = indices >= 0
        tokens = np.where(there[:, None], inputs[indices], pad_id)
        return indices, tokens, np.where(there, row_ids[indices], -1)

    owners, tokens, ids = prompts(0, slots)
    waiting = slots
    state = _begin(speculation, *params, tokens, rng, ids)
    results = _no_texts(speculation, state, len(inputs))
    while (owners >= 0).any():
        enough = refill if waiting < len(inputs) else slots
        state, output = _run(speculation, *params, state, enough)
        check_finite(output.statistics.finite, speculation.names)
        ended = np.flatnonzero(~np.asarray(state.active) & (owners >= 0))
        for whole, new in zip(*map(jax.tree.leaves, (results, output)), strict=True):
            whole[owners[ended]] = np.asarray(new)[ended]
        owners[ended] = -1
        report(min(waiting, len(inputs)) - int((owners >= 0).sum()))
        free = np.flatnonzero(owners < 0)
        while waiting < len(inputs) and len(free) >= refill:
            here, free = free[:refill], free[refill:]
            owners[here], tokens, ids = prompts(waiting, refill)
            state = _refill(speculation, *params, state, here, tokens, rng, ids)
            waiting += refill
    return results


@functools.partial(jax.jit, static_argnums=0)
def _begin(speculation, target_params, draft_params, inputs, rng, row_ids) -> State:
    return begin(speculation, target_params, draft_params, inputs, rng, row_ids)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _run(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    state: State,
    enough: jax.Array,
) -> tuple[State, SpeculativeOutput]:
    """Advances until `enough` rows are not active."""
    params = in_compute_dtypes(speculation, target_params, draft_params)
    state = jax.lax.while_loop(
        lambda state: jnp.sum(~state.active) < enough,
        lambda state: advance(speculation, *params, state),
        state,
    )
    return state, output_of(speculation, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _refill(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    state: State,
    slots: jax.Array,
    inputs: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array,
) -> State:
    """Puts new prompts [refill, S] into rows `slots` [refill]."""
    fresh = begin(speculation, target_params, draft_params, inputs, rng, row_ids)
    per_row = speculation.num_drafts
    cache_rows = (slots[:, None] * per_row + jnp.arange(per_row)[None]).reshape(-1)

    def move_in(old: jax.Array, new: jax.Array) -> jax.Array:
        rows = slots if len(new) == len(slots) else cache_rows
        return old.at[rows].set(new)

    return jax.tree.map(move_in, state, fresh)


def _no_texts(speculation: Speculation, state: State, count: int) -> SpeculativeOutput:
    """Results of `count` prompts before any has ended, in numpy."""
    shapes = jax.eval_shape(functools.partial(output_of, speculation), state)
    return jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), shapes)
