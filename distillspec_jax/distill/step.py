"""The training steps, each one compiled function: fine-tuning on references, and distillation.

A step is `(state, [target_params,] batch) -> (state, metrics)`. `state` carries `params`, `step`,
`seed` and `apply_gradients(grads, optimizer)`; its buffers are donated, so the old one is gone.
Metrics are `{name: (sum, count)}`, float32 scalars that add up over steps and hosts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distillspec_jax.distill import losses
from distillspec_jax.models import transformer

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def step_key(seed: jax.Array, purpose: str, step: jax.Array) -> jax.Array:
    """The key of everything random that one step does for one purpose."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, step)


def make_finetune_step(
    model: transformer.Transformer,
    optimizer: optax.GradientTransformation,
    *,
    dropout: bool = False,
    reduction: str = "sequence",
    chunk: int | None = None,
    micro_batches: int = 1,
) -> Callable[[Any, Any], tuple[Any, Metrics]]:
    """Returns the jitted step `(state, batch) -> (state, metrics)` of likelihood training.

    Loss: -(1/B) sum_b (1/|y_b|) sum_t log q(y_t | x, y_<t) over the real tokens of
    `batch.targets` [B, T]. `chunk` positions at a time have logits (losses.weighted_sum);
    gradients are summed over `micro_batches` parts of the batch, which must divide it.
    """

    def loss_sum(params, batch, key):
        rng = key if dropout else None
        hidden = transformer.hidden_states(
            model, params, batch.inputs, batch.targets, dropout_rng=rng
        )
        mask = losses.token_mask(batch.targets, model.config.pad_id)
        weights, count = losses.token_weights(mask, reduction)
        total, _ = losses.weighted_sum(
            lambda logits, targets: (losses.negative_log_likelihood(logits, targets), {}),
            lambda params, hidden: transformer.unembed(model, params, hidden),
            params,
            hidden,
            batch.targets,
            weights,
            chunk=chunk,
        )
        rows = jnp.sum(jnp.any(mask > 0, axis=-1)).astype(jnp.float32)
        return total, {"loss": (total, count), "target_length": (jnp.sum(mask), rows)}

    def step(state, batch):
        key = step_key(state.seed, "dropout", state.step)
        grads, metrics = summed_gradients(loss_sum, state.params, batch, key, micro_batches)
        return _update(state, grads, metrics, optimizer)

    return jax.jit(step, donate_argnums=0)


def summed_gradients(
    loss_sum: Callable[..., tuple[jax.Array, Metrics]],
    params: Any,
    batch: Any,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of `loss_sum(params, part, key)`, summed over equal parts of a batch."""
    grad = jax.grad(loss_sum, has_aux=True)
    if micro_batches == 1:
        return grad(params, batch, key)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(micro_batches, x.shape[0] // micro_batches, *x.shape[1:])

    def add(total, numbered):
        index, part = numbered
        new = grad(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, start, (jnp.arange(micro_batches), parts))
    return total


def _update(
    state: Any, grads: Any, metrics: Metrics, optimizer: optax.GradientTransformation
) -> tuple[Any, Metrics]:
    """Divides the summed gradient by the loss's count, applies it and adds its norm."""
    count = jnp.maximum(metrics["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.global_norm(grads)
    return state.apply_gradients(grads, optimizer), {**metrics, "grad_norm": (norm, jnp.ones(()))}
