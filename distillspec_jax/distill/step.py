"""The training steps, each one compiled function: fine-tuning on references, and distillation.

A step is `(state, [target_params,] batch) -> (state, metrics)`. `state` carries `params`, `step`,
`seed` and `apply_gradients(grads, optimizer)`; its buffers are donated, so the old one is gone.
Metrics are `{name: (sum, count)}`, float32 scalars that add up over steps and hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distillspec_jax.decoding.state import check_pair
from distillspec_jax.distill import data_sources, divergences, losses
from distillspec_jax.distill.recipes import Recipe
from distillspec_jax.errors import UserError, check_count, check_kind
from distillspec_jax.models import transformer
from distillspec_jax.models.transformer import Params, Transformer

Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossSum = Callable[..., tuple[jax.Array, Metrics]]  # (params, batch, key) -> (sum, metrics)


def make_finetune_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    dropout: bool = False,
    reduction: str = "sequence",
    chunk: int | None = None,
    micro_batches: int = 1,
    state_shardings: Any = None,
) -> Callable[[Any, Any], tuple[Any, Metrics]]:
    """Returns the jitted step `(state, batch) -> (state, metrics)` of likelihood training.

    Loss: -(1/B) sum_b (1/|y_b|) sum_t log q(y_t | x, y_<t) over the real tokens of
    `batch.targets` [B, T]. `chunk` positions at a time have logits (losses.weighted_sum);
    gradients are summed over `micro_batches` parts of the batch, which must divide it.
    `state_shardings`, a sharding for each leaf of the state, keeps the state in its place.
    """
    _check_parts(chunk, micro_batches)

    def step(state, batch):
        loss_sum = likelihood_loss(model, reduction=reduction, chunk=chunk, dropout=dropout)
        key = data_sources.step_key(state.seed, "dropout", state.step)
        return _update(state, batch, key, loss_sum, optimizer, micro_batches)

    return jitted(step, state_shardings)


def jitted(step: Callable[..., Any], state_shardings: Any) -> Callable[..., Any]:
    """`step(state, ...) -> (state, metrics)`, compiled; the new state takes the old one's memory.

    Without shardings the compiler chooses where the new state lies, and may split what was whole.
    """
    places: dict[str, Any] = (
        {} if state_shardings is None else {"out_shardings": (state_shardings, None)}
    )
    return jax.jit(step, donate_argnums=0, **places)


def make_distill_step(
    draft: Transformer,
    target: Transformer,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    *,
    rollout_length: int,
    chunk: int | None = None,
    micro_batches: int = 1,
    state_shardings: Any = None,
) -> Callable[..., tuple[Any, Metrics]]:
    """Returns the jitted step `(state, target_params, batch) -> (state, metrics)`.

    One call writes the text (data_sources), scores it with target and draft, and updates the
    draft in `state`; only its weights are differentiated. Recipes that select tokens take the
    frozen weights of a reference draft as a fourth argument. `rollout_length` bounds what is
    written; `chunk`, `micro_batches` and `state_shardings` as in `make_finetune_step`.

    Metrics beside the loss: `acceptance_rate`, sum_v min(p_v, q_v) at temperature 1 over all real
    tokens of the text, those too that the recipe leaves out of the loss; `target_length`, their
    number per row; `rollout_length` and `eos_rate` of what was written in this step, count 0 where
    nothing was; `source_*`; `grad_norm`.
    """
    rollout = make_rollout(draft, target, recipe, rollout_length=rollout_length)
    update = make_update(draft, target, recipe, optimizer, chunk=chunk, micro_batches=micro_batches)

    def step(state, target_params, batch, reference_params=None):
        batch, written = rollout(state, target_params, batch)
        state, metrics = update(state, target_params, batch, reference_params)
        return state, {**metrics, **written}

    return jitted(step, state_shardings)


def make_rollout(
    draft: Transformer, target: Transformer, recipe: Recipe, *, rollout_length: int
) -> Callable[[Any, Params, Any], tuple[Any, Metrics]]:
    """Returns the first half of a step, `(state, target_params, batch) -> (batch, metrics)`.

    Traceable; the batch comes back with the recipe's text as its targets.
    """
    check_kind("recipe", recipe, Recipe)
    check_count("rollout_length", rollout_length)
    check_pair(target, draft)
    write = data_sources.make_source(draft, target, recipe, rollout_length=rollout_length)

    def rollout(state, target_params, batch):
        (tokens, hidden), source = write(state.params, target_params, batch, state.seed, state.step)
        sampled = source != data_sources.SOURCES.index("fixed")
        mask = losses.token_mask(tokens, draft.config.pad_id)
        rows = jnp.where(sampled, _count(jnp.any(mask > 0, axis=1)), 0.0)
        ended = _count(jnp.any(tokens == draft.config.eos_id, axis=1))
        metrics = {
            "rollout_length": (jnp.where(sampled, jnp.sum(mask), 0.0), rows),
            "eos_rate": (jnp.where(sampled, ended, 0.0), rows),
        }
        for index, name in enumerate(data_sources.SOURCES):
            metrics[f"source_{name}"] = ((source == index).astype(jnp.float32), jnp.ones(()))
        return batch.replace(targets=tokens, target_hidden=hidden), metrics

    return rollout


def make_update(
    draft: Transformer,
    target: Transformer,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    *,
    chunk: int | None = None,
    micro_batches: int = 1,
) -> Callable[..., tuple[Any, Metrics]]:
    """Returns the second half, `(state, target_params, batch[, reference]) -> (state, metrics)`.

    Traceable; scores `batch.targets` with both models, the target's part unless the batch brings
    it, and updates the draft.
    """
    check_kind("recipe", recipe, Recipe)
    _check_parts(chunk, micro_batches)
    check_pair(target, draft)

    def update(state, target_params, batch, reference_params=None):
        if (reference_params is None) == recipe.needs_reference:
            needs = "needs" if recipe.needs_reference else "takes no"
            raise UserError(f"recipe '{recipe.name}' {needs} weights of a reference draft")
        if recipe.needs_target_scores:
            loss_sum = distillation_loss(
                draft, target, recipe, target_params, reference_params, chunk=chunk
            )
        else:
            loss_sum = likelihood_loss(draft, reduction=recipe.reduction, chunk=chunk)
        key = data_sources.step_key(state.seed, "update", state.step)
        return _update(state, batch, key, loss_sum, optimizer, micro_batches)

    return update


def likelihood_loss(
    model: Transformer, *, reduction: str, chunk: int | None, dropout: bool = False
) -> LossSum:
    """Returns `(params, batch, key) -> (sum of -log q(y_t) by weight, metrics)`."""

    def loss_sum(params, batch, key):
        mask = losses.token_mask(batch.targets, model.config.pad_id)
        weights, count = losses.token_weights(mask, reduction)
        hidden = transformer.hidden_states(
            model, params, batch.inputs, batch.targets, dropout_rng=key if dropout else None
        )
        total, _ = losses.weighted_sum(
            lambda logits, tokens: (losses.negative_log_likelihood(logits, tokens), {}),
            lambda params, hidden: transformer.unembed(model, params, hidden),
            params,
            hidden,
            batch.targets,
            weights,
            chunk=chunk,
        )
        return total, {"loss": (total, count), **_lengths(mask)}

    return loss_sum


def distillation_loss(
    draft: Transformer,
    target: Transformer,
    recipe: Recipe,
    target_params: Params,
    reference_params: Params | None,
    *,
    chunk: int | None,
) -> LossSum:
    """Returns `(params, batch, key) -> (sum of D(p || q)_t by weight, metrics)`.

    Differentiable in the draft's params alone.
    """
    target_params, reference_params = jax.lax.stop_gradient((target_params, reference_params))
    # once a step, not once for each micro-batch and chunk
    target_params = transformer.in_compute_dtype(target, target_params)
    divergence = recipe.divergence
    size = min(draft.config.vocab_size, target.config.vocab_size)  # padding rows may differ

    def logits_of(model, params, hidden):
        return transformer.unembed(model, params, hidden)[..., :size]

    def token_loss(draft_logits, target_hidden):
        target_logits = logits_of(target, target_params, target_hidden)
        accepted = divergences.acceptance_rate(target_logits, draft_logits)
        return divergence(target_logits, draft_logits), {"accepted": accepted}

    def learnable(params, hidden, target_hidden, batch, mask):
        reference_hidden = transformer.hidden_states(
            draft, reference_params, batch.inputs, batch.targets
        )

        def gains(fields):
            hidden, reference_hidden, target_hidden = fields
            target_logits = logits_of(target, target_params, target_hidden)
            reference_logits = logits_of(draft, reference_params, reference_hidden)
            loss = divergence(target_logits, logits_of(draft, params, hidden))
            return loss - divergence(target_logits, reference_logits)

        fields = jax.lax.stop_gradient((hidden, reference_hidden, target_hidden))
        return losses.most_learnable(
            losses.in_chunks(gains, fields, chunk), mask, recipe.keep_fraction
        )

    def loss_sum(params, batch, key):
        del key  # no dropout in distillation: the draft is scored as it will decode
        text = (batch.inputs, batch.targets)
        hidden = transformer.hidden_states(draft, params, *text)
        target_hidden = batch.target_hidden
        if target_hidden is None:
            target_hidden = transformer.hidden_states(target, target_params, *text)
        mask = kept = losses.token_mask(batch.targets, draft.config.pad_id)
        if recipe.needs_reference:
            frozen = jax.lax.stop_gradient(params)
            kept = learnable(frozen, hidden, target_hidden, batch, mask)
        weights, count = losses.token_weights(kept, recipe.reduction)
        total, watched = losses.weighted_sum(
            token_loss,
            lambda params, hidden: logits_of(draft, params, hidden),
            params,
            hidden,
            target_hidden,
            weights,
            chunk=chunk,
        )
        accepted = jnp.sum(mask * watched["accepted"])
        metrics = {"loss": (total, count), "acceptance_rate": (accepted, jnp.sum(mask))}
        return total, metrics | _lengths(mask)

    return loss_sum


def _check_parts(chunk: int | None, micro_batches: int) -> None:
    if chunk is not None:
        check_count("chunk", chunk)
    check_count("micro_batches", micro_batches)


def _lengths(mask: jax.Array) -> Metrics:
    """Real tokens, and rows that have any."""
    return {"target_length": (jnp.sum(mask), _count(jnp.any(mask > 0, axis=1)))}


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.float32)


def _update(
    state: Any,
    batch: Any,
    key: jax.Array,
    loss_sum: LossSum,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
) -> tuple[Any, Metrics]:
    """Applies the gradient of the mean loss, and adds its norm to the metrics."""
    grads, metrics = summed_gradients(loss_sum, state.params, batch, key, micro_batches)
    count = jnp.maximum(metrics["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    metrics["grad_norm"] = (optax.tree.norm(grads), jnp.ones(()))
    return state.apply_gradients(grads, optimizer), metrics


def summed_gradients(
    loss_sum: LossSum, params: Params, batch: Any, key: jax.Array, micro_batches: int
) -> tuple[Params, Metrics]:
    """Gradient and metrics of `loss_sum(params, part, key)`, summed over equal parts of a batch."""
    grad = jax.grad(loss_sum, has_aux=True)
    if micro_batches == 1:
        return grad(params, batch, key)
    batch_size = batch.inputs.shape[0]
    if batch_size % micro_batches:
        raise UserError(f"a batch of {batch_size} does not split into {micro_batches} parts")

    def split(x: jax.Array) -> jax.Array:
        # every n-th row: a mesh that splits the batch then splits each part likewise
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, numbered):
        index, part = numbered
        new = grad(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, start, (jnp.arange(micro_batches), parts))
    return total
