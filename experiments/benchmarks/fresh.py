"""Weights of large models that are only timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.models.transformer import Params, Transformer, init_params


def fresh_params(model: Transformer, rng: jax.Array) -> Params:
    """Fresh float32 parameters: a stack's first layer is drawn, the others are it turned round.

    XLA compiles a generator for every weight that is drawn: minutes for T5 1.1 XL on a GPU.
    """
    depths = {
        "encoder": model.config.num_encoder_layers,
        "decoder": model.config.num_decoder_layers,
    }
    one: dict[str, Any] = {f"num_{stack}_layers": min(1, n) for stack, n in depths.items()}
    params = init_params(Transformer(dataclasses.replace(model.config, **one)), rng)
    for stack, depth in depths.items():
        for layer in range(1, depth):
            first = params[stack]["layers_0"]
            turned = jax.tree.map(lambda x, by=layer: jnp.roll(x, by, axis=0), first)
            params[stack][f"layers_{layer}"] = turned
    return params
