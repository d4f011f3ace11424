"""Weights on a CPU in one block of large pages: what decoding reads at every step.

Reading the weights is the cost of a step, and with pages of 4 KB, at whose ends a processor stops
fetching ahead, memory gives half to two thirds of what it gives with pages of 2 MB. Linux has them
for who asks.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import jax
import numpy as np

PAGE = 2 * 2**20  # bytes; also how much a block must hold to be worth one
LINE = 64  # bytes of a cache line, and what XLA asks of an array it takes as it lies


def on_large_pages(params: Any) -> Any:
    """A tree of arrays with the same values, those of the CPU moved to one block of large pages.

    Arrays on other devices, on several, and all of them where the system has no such pages or they
    would not fill one, are returned as they are. The block is freed with the last of its arrays.
    """
    leaves, tree = jax.tree.flatten(params)
    del params  # each array can go as soon as it is copied
    mine = [i for i, leaf in enumerate(leaves) if _is_on_one_cpu(leaf)]
    size = sum(_rounded(leaves[i].nbytes) for i in mine)
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return jax.tree.unflatten(tree, leaves)
    block, start = _block(size), 0
    for i in mine:
        leaf = leaves[i]
        place = block[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        place[...] = leaf
        sharding = leaf.sharding if leaf.committed else None
        leaves[i] = jax.device_put(place, sharding, may_alias=True)
        start += _rounded(leaf.nbytes)
    return jax.tree.unflatten(tree, leaves)


def _is_on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def _rounded(size: int) -> int:
    return -(-size // LINE) * LINE


def _block(size: int) -> np.ndarray:
    """Bytes [size] that begin with a page."""
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(memory, np.uint8)
    first = -every.ctypes.data % PAGE
    return every[first : first + size]
