"""The distillation step as programs with a clock between them, to see where the time goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distillspec_jax.distill.recipes import Recipe
from distillspec_jax.distill.step import (
    jitted,
    make_distill_step,
    make_rollout,
    make_update,
)
from distillspec_jax.models.transformer import Transformer, hidden_states


class PhasedStep:
    """`distill.step.make_distill_step` with the seconds of its phases in its metrics.

    `rollout_seconds`, `score_seconds` and `update_seconds`. The numbers learnt are the same. The
    host waits for each phase, so a step takes a little longer than the one program of which
    nothing can be timed inside. Scoring is the target's pass over the text, up to its states; its
    logits, made where the loss reads them, belong to the update, as does the draft's own pass.
    It is no phase for likelihood, nor where the rollout keeps the states (`teacher_gamma`).
    """

    def __init__(
        self,
        draft: Transformer,
        target: Transformer,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        *,
        rollout_length: int,
        chunk: int | None = None,
        micro_batches: int = 1,
        state_shardings: Any = None,
    ) -> None:
        parts: dict[str, Any] = {"chunk": chunk, "micro_batches": micro_batches}
        self._rollout = jax.jit(make_rollout(draft, target, recipe, rollout_length=rollout_length))
        self._score = jax.jit(functools.partial(hidden_states, target))
        self._needs_score = recipe.needs_target_scores and not recipe.keeps_target_hidden
        self._update = jitted(
            make_update(draft, target, recipe, optimizer, **parts), state_shardings
        )
        whole: Any = make_distill_step(
            draft,
            target,
            recipe,
            optimizer,
            rollout_length=rollout_length,
            state_shardings=state_shardings,
            **parts,
        )
        self.lower = whole.lower  # what a plan is made of

    def __call__(self, state: Any, target_params: Any, batch: Any, *reference: Any) -> Any:
        """(state, target_params, batch[, reference]) -> (state, metrics)."""
        clock: dict[str, tuple[jax.Array, jax.Array]] = {}

        def timed(name: str, phase: Callable[..., Any], *arguments: Any) -> Any:
            begin = time.perf_counter()
            result = jax.block_until_ready(phase(*arguments))
            seconds = time.perf_counter() - begin
            clock[f"{name}_seconds"] = jnp.float32(seconds), jnp.ones(())
            return result

        batch, written = timed("rollout", self._rollout, state, target_params, batch)
        if self._needs_score:
            text = batch.inputs, batch.targets
            hidden = timed("score", self._score, target_params, *text)
            batch = batch.replace(target_hidden=hidden)
        state, metrics = timed("update", self._update, state, target_params, batch, *reference)
        return state, {**metrics, **written, **clock}
