"""Weights on a CPU in one block of large pages: what decoding reads at every step.

Reading the weights is the cost of a step, and with pages of 4 KB, at whose ends a processor stops
fetching ahead, memory gives half to two thirds of what it gives with pages of 2 MB. Linux has them
for who asks.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

PAGE = 2 * 2**20  # bytes; also how much a block must hold to be worth one
LINE = 64  # bytes of a cache line, and what XLA asks of an array it takes as it lies


class Room:
    """Large pages for arrays of `size` bytes in all, handed out one behind the other.

    They are freed with the last of the arrays. Ordinary memory is handed out where the system has
    no such pages or the arrays would not fill one.
    """

    def __init__(self, size: int) -> None:
        self._rest: np.ndarray | None = None
        if size >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            self._rest = _block(size)

    @property
    def is_large(self) -> bool:
        """Whether it has large pages."""
        return self._rest is not None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with arbitrary contents; raises ValueError if the room is used up."""
        if self._rest is None:
            return np.empty(shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        if size > self._rest.size:
            raise ValueError(f"{size} bytes are asked for, {self._rest.size} are left")
        array = self._rest[:size].view(dtype).reshape(shape)
        self._rest = self._rest[rounded(size) :]
        return array


def on_large_pages(params: Any) -> Any:
    """A tree of arrays with the same values, those of one CPU moved to one block of large pages.

    Arrays on other devices, on several, and all of them where the system has no such pages or they
    would not fill one, are returned as they are.
    """
    leaves, tree = jax.tree.flatten(params)
    del params  # each array can go as soon as it is copied
    mine = [i for i, leaf in enumerate(leaves) if _is_on_one_cpu(leaf)]
    room = Room(sum(rounded(leaves[i].nbytes) for i in mine))
    if room.is_large:
        for i in mine:
            leaf = leaves[i]
            place = room.empty(leaf.shape, leaf.dtype)
            place[...] = leaf
            leaves[i] = as_it_lies(place, leaf.sharding if leaf.committed else None)
    return jax.tree.unflatten(tree, leaves)


def as_it_lies(array: np.ndarray, place: Any = None) -> jax.Array:
    """`array` as JAX's: on a CPU itself, not a copy, so nobody may write to it any more.

    `place` is a device or a sharding of one device; None: the default device.
    """
    return jax.device_put(array, place, may_alias=True)


def is_one_cpu(devices: Iterable[jax.Device]) -> bool:
    """Whether a CPU is all there is of these devices."""
    return [device.platform for device in devices] == ["cpu"]


def _is_on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return is_one_cpu(leaf.devices())


def rounded(size: int) -> int:
    """`size` bytes, up to whole cache lines."""
    return -(-size // LINE) * LINE


def _block(size: int) -> np.ndarray:
    """Bytes [size] that begin with a page."""
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(memory, np.uint8)
    first = -every.ctypes.data % PAGE
    return every[first : first + size]
