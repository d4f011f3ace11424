"""The distillation step as two programs with a clock between them, to see where the time goes."""

from __future__ import annotations

import time
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
from distillspec_jax.models.transformer import Transformer


class PhasedStep:
    """`distill.step.make_distill_step` with `rollout_seconds` and `update_seconds` in its metrics.

    The numbers learnt are the same. The host waits for each half, so a step takes a little longer
    than the one program of which nothing can be timed inside. Scoring belongs to the update, that
    of the target to the rollout where the recipe keeps its states (`teacher_gamma`).
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
        begin = time.perf_counter()
        batch, written = jax.block_until_ready(self._rollout(state, target_params, batch))
        middle = time.perf_counter()
        state, metrics = jax.block_until_ready(
            self._update(state, target_params, batch, *reference)
        )
        seconds = {
            "rollout_seconds": middle - begin,
            "update_seconds": time.perf_counter() - middle,
        }
        clock = {name: (jnp.float32(each), jnp.ones(())) for name, each in seconds.items()}
        return state, {**metrics, **written, **clock}
