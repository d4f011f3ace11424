"""The products of a decoding step alone: XLA's own beside the kernel for few rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.evaluation.latency import side_by_side
from distillspec_jax.models import cpu_product
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.cpu_memory import on_large_pages
from distillspec_jax.models.presets import preset
from experiments.benchmarks.decode import Config, Found, Row
from experiments.benchmarks.decode_plain import named, ratio

RATIO = "xla_over_kernel"


def measure(config: Config, seed: int, has_peers: bool) -> Found:
    """Every shape and number of rows; figures `xla_over_kernel_rowsM`, _small for the second."""
    del has_peers  # XLA is the peer
    summary: Row = {}
    records: list[Row] = []
    if cpu_product.cpu_kernel is None or jax.default_backend() != "cpu":
        print("products: left out, there is no kernel here")
        return summary, records
    for shape in config.shapes:
        suffix = "" if shape == config.shapes[0] else "_" + shape.rpartition("_")[2]
        weights = on_large_pages(weights_of(preset(shape), jax.random.key(seed)))
        for rows in config.product_rows:
            row = _timed(config, seed, weights, rows)
            records.append({"shape": shape, "rows": rows, **row})
            summary |= named(row, RATIO, f"{RATIO}_rows{rows}{suffix}")
    return summary, records


def weights_of(c: ModelConfig, key: jax.Array) -> list[jax.Array]:
    """Kernels [K, F] of all that a decoder reads in a step but its logits."""
    inner, gates = c.num_heads * c.head_dim, 2 if c.gated else 1
    attention = [(c.d_model, 3 * inner), (inner, c.d_model), (c.d_model, inner), (inner, c.d_model)]
    shapes = [*attention, (c.d_model, gates * c.d_ff), (c.d_ff, c.d_model)] * c.num_decoder_layers
    keys = jax.random.split(key, len(shapes))
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return [draw(each, shape) for each, shape in zip(keys, shapes, strict=True)]


def one_after_another(product: Callable[..., jax.Array]) -> Any:
    """Compiled: x [M, K], weights -> a number; a product waits for the one before, as in layers."""

    @jax.jit
    def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        last = jnp.zeros(())
        for each in weights:
            last = 1e-6 * product(x[:, : each.shape[0]] + last, each)[0, 0]
        return last

    return run


def _timed(config: Config, seed: int, weights: list[jax.Array], rows: int) -> Row:
    x = jax.random.normal(jax.random.key(seed), (rows, max(w.shape[0] for w in weights)))

    calls = {
        "xla": functools.partial(one_after_another(jnp.matmul), x, weights),
        "kernel": functools.partial(one_after_another(cpu_product.product), x, weights),
    }
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    size = sum(each.nbytes for each in weights)
    return {
        "megabytes": size / 1e6,
        **{f"{name}_seconds": timing.median for name, timing in timings.items()},
        **{f"{name}_gigabytes_per_second": size / t.median / 1e9 for name, t in timings.items()},
        **ratio(RATIO, timings["xla"].seconds, timings["kernel"].seconds),
    }
