"""Likelihood of references: what fine-tuning is judged by while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.distill import losses
from distillspec_jax.models import transformer


def make_likelihood(
    model: transformer.Transformer, batches: Iterable[Any]
) -> Callable[[Any], dict[str, float]]:
    """Returns params -> {"loss", "token_accuracy"}, means over all real tokens of `batches`.

    loss = -(1/n) sum_t log q(y_t | x, y_<t) in nats a token; token_accuracy is the share of
    tokens that are the model's first choice, given the reference before them.
    """
    batches = list(batches)

    @jax.jit
    def sums(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = transformer.score(model, params, inputs, targets)  # [B, T, V]
        mask = losses.token_mask(targets, model.config.pad_id)
        nll = losses.negative_log_likelihood(logits, targets)
        hits = jnp.argmax(logits, -1) == targets
        return jnp.stack([jnp.sum(nll * mask), jnp.sum(hits * mask), jnp.sum(mask)])

    def evaluate(params: Any) -> dict[str, float]:
        each = [sums(params, batch.inputs, batch.targets) for batch in batches]
        loss, hits, count = jax.device_get(sum(each))
        return {"loss": loss / count, "token_accuracy": hits / count}

    return evaluate
