"""Short names for exact weights, to tell what was made with them and whether they are whole."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from distillspec_jax.models.transformer import Params, Transformer


def fingerprint(model: Transformer, params: Params) -> str:
    """Hex sha256 of a model's shape and of checksums of its parameters.

    Neither its name counts nor the dtype that it computes in.

    The checksums are sums of integers modulo 2^32, on the devices where the parameters are: exact,
    whatever the sharding.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps({**model.config.as_stored(), "name": ""}, sort_keys=True).encode())
    sums = jax.device_get([_pair(leaf) for leaf in jax.tree.leaves(params)])
    for (path, leaf), pair in zip(jax.tree_util.tree_leaves_with_path(params), sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {pair}".encode())
    return digest.hexdigest()


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """One uint32 per leaf, sum_i mix(bits_i ^ i * odd): other bits or another order, other sums.

    A sum of integers modulo 2^32, so it is the same for every layout over devices; a third of the
    work of `fingerprint`, for what is summed at each save. Any one flipped bit changes it, and
    what else differs but for one chance in 2^32.
    """

    def one(leaf: jax.Array) -> jax.Array:
        bits = _as_uint32(leaf)
        mixed = _mix(bits ^ (_places(bits.shape) * jnp.uint32(0x9E3779B1)))
        return jnp.sum(mixed, dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


def _as_uint32(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    # 8 bytes become two numbers, along an axis of their own
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


@jax.jit
def _pair(leaf: jax.Array) -> jax.Array:
    """sum_i mix(i) bits_i and sum_i mix(i ^ mix(bits_i)), [2] uint32: other bits, other sums."""
    bits = _as_uint32(leaf)
    place = _places(bits.shape)
    sums = jnp.sum(_mix(place) * bits), jnp.sum(_mix(place ^ _mix(bits)))
    return jnp.stack([each.astype(jnp.uint32) for each in sums])


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The number of every element, modulo 2^32; no reshape: it would gather what is sharded."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride = stride * shape[axis] % 2**32
    return place


def _mix(x: jax.Array) -> jax.Array:
    """Scatters the bits of uint32 numbers (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
