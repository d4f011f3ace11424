"""Likelihood of references: what fine-tuning is judged by while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.distill import losses
from distillspec_jax.models import transformer


def make_likelihood(
    model: transformer.Transformer, batches: Iterable[Any], *, chunk: int | None = None
) -> Callable[[Any], dict[str, float]]:
    """Returns params -> {"loss", "token_accuracy"}, means over all real tokens of `batches`.

    loss = -(1/n) sum_t log q(y_t | x, y_<t) in nats a token; token_accuracy is the share of
    tokens that are the model's first choice, given the reference before them. `chunk` positions
    at a time have logits; None: all.
    """
    batches = list(batches)

    def evaluate(params: Any) -> dict[str, float]:
        each = [sums(model, params, batch.inputs, batch.targets, chunk) for batch in batches]
        loss, hits, count = jax.device_get(sum(each))
        return {"loss": loss / count, "token_accuracy": hits / count}

    return evaluate


@functools.partial(jax.jit, static_argnums=(0, 4))
def sums(
    model: transformer.Transformer,
    params: Any,
    inputs: jax.Array,
    targets: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """Sums over the real tokens of `targets` [B, T]: [-log q, first choices, tokens] float32."""

    def of_tokens(fields: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, tokens = fields
        logits = transformer.unembed(model, params, hidden)
        hits = jnp.argmax(logits, -1) == tokens
        return losses.negative_log_likelihood(logits, tokens), hits

    hidden = transformer.hidden_states(model, params, inputs, targets)
    nll, hits = losses.in_chunks(of_tokens, (hidden, targets), chunk)
    mask = losses.token_mask(targets, model.config.pad_id)
    return jnp.stack([jnp.sum(nll * mask), jnp.sum(hits * mask), jnp.sum(mask)])
