"""Random numbers that belong to a row, not to its place in a batch.

Every uniform is a function of (rng, row id, position or block of that row). A row therefore
draws the same numbers alone, in any batch and in any place of it.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def purpose_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """The key of everything random that is done for one purpose: no two share their numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def row_keys(rng: jax.Array, row_ids: jax.Array) -> jax.Array:
    """One key per row [B], from the run's key and the rows' ids [B].

    Threefry's, whatever the run's is: under `vmap` an rbg key draws by its place in the batch.
    """
    first, second, *more = jax.random.key_data(rng)
    key = jax.random.wrap_key_data(jnp.stack([first, second]), impl="threefry2x32")
    for word in more:
        key = jax.random.fold_in(key, word)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)


def position_uniforms(keys: jax.Array, count: int) -> jax.Array:
    """Uniforms in [0, 1) for positions 0..count-1 of each row: [B, count] float32.

    Threefry counts positions (by `jax_threefry_partitionable`, JAX's default), so a longer `count`
    begins with the same numbers.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def block_uniforms(keys: jax.Array, blocks: jax.Array, count: int) -> jax.Array:
    """Uniforms of block number `blocks` [B] of each row: [B, count] float32, in one draw.

    Keyed by block and not by position: block verification looks at the acceptance draws behind
    a rejection, so numbers used once for a position must not come back when it is tried again.
    """
    per_block = jax.vmap(jax.random.fold_in)(keys, blocks)
    return position_uniforms(per_block, count)


def default_row_ids(inputs: jax.Array | np.ndarray, row_ids: jax.Array | None) -> jax.Array:
    """`row_ids`, or 0..B-1 where none are given: [B] int32."""
    if row_ids is None:
        ids: Any = np.arange(inputs.shape[0], dtype=np.int32)  # JAX would run a program for it
        return ids
    return jnp.asarray(row_ids, jnp.int32)
