"""The cache of keys and values: an explicit pytree with one length per row.

Rolling back is lowering a length. Entries past a row's length are stale: the causal bias masks
them (their position is after every query), and attention looks at none of them, so not even a NaN
among them can reach a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import KeysValues


class Cache(struct.PyTreeNode):
    """Keys and values of a batch; S is the room of the cache, E the length of the source.

    lengths: [B] int32, entries of each row that are valid.
    keys, values: one [B, N, S, H] per decoder layer.
    cross_keys, cross_values: one [B, N, E, H] per decoder layer; empty without an encoder.
    source_bias: [B, 1, 1, E] float32, 0 at real tokens of the source; None without an encoder.
    """

    lengths: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    cross_keys: tuple[jax.Array, ...] = ()
    cross_values: tuple[jax.Array, ...] = ()
    source_bias: jax.Array | None = None

    @property
    def room(self) -> int:
        return self.keys[0].shape[2]


def empty(config: ModelConfig, batch_size: int, room: int) -> Cache:
    """A cache of length 0 with space for `room` positions a row."""
    shape = (batch_size, config.num_heads, room, config.head_dim)
    layers = range(config.num_decoder_layers)
    return Cache(
        lengths=jnp.zeros(batch_size, jnp.int32),
        keys=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
    )


def rollback(cache: Cache, lengths: jax.Array) -> Cache:
    """The cache cut to `lengths` [B]; what lies past them is stale from now on."""
    return cache.replace(lengths=lengths)


def write(buffer: jax.Array, block: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes block [B, N, T, H] into buffer [B, N, S, H] at each row's own length.

    The caller keeps lengths + T <= S: a start past that would be moved back silently.
    """
    at_row = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (0, start, 0)))
    return at_row(buffer, block.astype(buffer.dtype), lengths)


def append(cache: Cache, layer: int, keys: jax.Array, values: jax.Array) -> KeysValues:
    """One layer's keys and values with a block's written behind those of each row."""
    new_keys = write(cache.keys[layer], keys, cache.lengths)
    return new_keys, write(cache.values[layer], values, cache.lengths)
