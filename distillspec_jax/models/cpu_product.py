"""Products of a few rows with matrices on a CPU: what decoding consists of.

Reading the weights is the cost, so they should be read once, in order, by all cores. XLA falls
short of that for a single row, and packs the weights anew at each product of more. The kernel in
`cpu_kernel` does what the cost asks for; elsewhere, for other sizes, on a mesh of several devices
and without llvmlite XLA's own product serves.

Shapes: G products of M rows, K inputs, F outputs; x [..., M, K], weights [..., K, F] or,
transposed, [..., F, K], y [..., M, F], all float32; the axes in front multiply to G.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

try:
    from distillspec_jax.models import cpu_kernel
except (ImportError, OSError, RuntimeError):  # no llvmlite, or none that runs on this host
    cpu_kernel = None  # type: ignore[assignment]

OFF = "DISTILLSPEC_XLA_PRODUCTS"  # set in the environment: XLA's own products everywhere
MAX_ROWS = 64  # where many rows reuse what XLA packed, it is as fast


def serves(x: jax.Array, weights: jax.Array) -> bool:
    """Whether `product` takes x and weights, and gains by it."""
    if cpu_kernel is None or os.environ.get(OFF) or jax.default_backend() != "cpu":
        return False
    return (
        x.dtype == weights.dtype == jnp.float32
        and x.shape[-2] <= MAX_ROWS
        and (x.shape[-2] > 1 or weights.size >= cpu_kernel.SHARED)
        and weights.shape[-1] % cpu_kernel.LANES == 0
        and on_one_device()
    )


def on_one_device() -> bool:
    """Whether what is traced is for one device, not for a mesh of several."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: jax.Array, weights: jax.Array, transposed: bool = False, ends: jax.Array | None = None
) -> jax.Array:
    """x weights, or x weights^T if transposed, for what `serves` says yes to: [..., M, F].

    With `ends` [G] int32, at least 1, only so many lines of each product's weights count: the rest
    is not read, and transposed the outputs behind them are arbitrary.
    """
    arguments = (x, weights) if ends is None else (x, weights, ends)
    call = functools.partial(_call, transposed)
    plain = functools.partial(_plain, transposed)
    return jax.lax.platform_dependent(*arguments, cpu=call, default=plain)


def _plain(
    transposed: bool, x: jax.Array, weights: jax.Array, ends: jax.Array | None = None
) -> jax.Array:
    if ends is not None:
        is_line = jnp.arange(weights.shape[-2])[None] < ends[:, None]
        weights = jnp.where(is_line.reshape(*weights.shape[:-1], 1), weights, 0)
    return jnp.matmul(x, weights.swapaxes(-1, -2) if transposed else weights)


def _forward(
    x: jax.Array, weights: jax.Array, transposed: bool, ends: jax.Array | None
) -> tuple[jax.Array, Any]:
    return product(x, weights, transposed, ends), (x, weights, ends)


def _backward(transposed: bool, saved: Any, grads: jax.Array) -> tuple[jax.Array | None, ...]:
    x, weights, ends = saved
    plain = functools.partial(_plain, transposed, ends=ends)
    return *jax.vjp(plain, x, weights)[1](grads), None


product.defvjp(_forward, _backward)


def _call(
    transposed: bool, x: jax.Array, weights: jax.Array, ends: jax.Array | None = None
) -> jax.Array:
    outputs = weights.shape[-2 if transposed else -1]
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], outputs), jnp.float32)
    name = cpu_kernel.register(x.shape[-2], transposed, ends is not None)
    arguments = (x, weights) if ends is None else (x, weights, ends)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(*arguments)
