"""A short name for the exact weights of a model, to tell what was made with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.models.transformer import Params, Transformer


def fingerprint(model: Transformer, params: Params) -> str:
    """Hex sha256 of a model's shape and of checksums of its parameters.

    Neither its name counts nor the dtype that it computes in.

    The checksums are sums of integers modulo 2^32, on the devices where the parameters are: exact,
    whatever the sharding.
    """
    return fingerprint_of(model.config.as_stored(), params)


def fingerprint_of(shape: Mapping[str, Any], params: Params) -> str:
    """The same of a stored shape, `ModelConfig.as_stored`."""
    digest = hashlib.sha256()
    digest.update(json.dumps({**shape, "name": ""}, sort_keys=True).encode())
    sums = jax.device_get(_checksums(params))
    for (path, leaf), pair in zip(jax.tree_util.tree_leaves_with_path(params), sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {pair}".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(params: Params) -> list[jax.Array]:
    """Of each leaf [2] uint32."""
    return [_checksum(leaf) for leaf in jax.tree.leaves(params)]


def _checksum(leaf: jax.Array) -> jax.Array:
    """sum_i mix(i) bits_i and sum_i mix(i ^ mix(bits_i)): other bits, other sums."""
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    strides = np.array([np.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)])
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, stride in enumerate(strides.astype(np.uint64) % 2**32):
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    sums = jnp.sum(_mix(place) * bits), jnp.sum(_mix(place ^ _mix(bits)))
    return jnp.stack([each.astype(jnp.uint32) for each in sums])


def _mix(x: jax.Array) -> jax.Array:
    """Scatters the bits of uint32 numbers (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
