"""From tensors on disk to parameters on their devices, one tensor at a time.

Beyond the parameters themselves the host holds at most the buffer of one leaf and one stored
tensor. Each tensor is read once and cut to every device's shard while it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from distillspec_jax.errors import UserError
from distillspec_jax.interop.layout import Leaf, Part, get, nested
from distillspec_jax.models.cpu_memory import Room, as_it_lies, is_one_cpu, rounded

Read = Callable[[Part], np.ndarray]  # a part as "inputs x outputs", in its stored dtype
Ranges = tuple[tuple[int, int], ...]  # start, stop along every axis
PARAM_DTYPES = ("float32", "bfloat16")


def assemble(leaves: Iterable[Leaf], read: Read, *, shardings: Any = None, dtype: str) -> Any:
    """The tree of parameters, each leaf born in its place.

    Args:
      leaves: the table of `layout.leaves`.
      read: gives one published tensor.
      shardings: tree of `jax.sharding.Sharding` like the parameters; None: the default device.
      dtype: of the parameters, float32 or bfloat16.
    """
    stored, leaves = checked_dtype(dtype), list(leaves)
    places = {
        leaf.path: None if shardings is None else get(shardings, leaf.path) for leaf in leaves
    }
    size = sum(rounded(math.prod(leaf.shape) * stored.itemsize) for leaf in leaves)
    room = Room(size if all(map(_is_on_one_cpu, set(places.values()))) else 0)
    return nested(
        {leaf.path: _place(leaf, read, places[leaf.path], stored, room) for leaf in leaves}
    )


def _is_on_one_cpu(sharding: Sharding | None) -> bool:
    return is_one_cpu(jnp.zeros(()).devices() if sharding is None else sharding.device_set)


def checked_dtype(dtype: str) -> np.dtype:
    """The dtype of parameters called `dtype`; raises UserError for one that they cannot have."""
    if dtype not in PARAM_DTYPES:
        raise UserError(f"parameters can be {' or '.join(PARAM_DTYPES)}, not {dtype!r}")
    return np.dtype(jnp.dtype(dtype))


def _place(
    leaf: Leaf, read: Read, sharding: Sharding | None, dtype: np.dtype, room: Room
) -> jax.Array:
    if sharding is None or len(sharding.device_set) == 1:
        buffer = room.empty(leaf.shape, dtype)
        _fill(leaf, read, {tuple((0, n) for n in leaf.shape): buffer})
        return as_it_lies(buffer, sharding)
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    places = {device: _ranges(index, leaf.shape) for device, index in indices.items()}
    buffers = {
        ranges: np.empty([stop - start for start, stop in ranges], dtype)
        for ranges in set(places.values())
    }
    _fill(leaf, read, buffers)
    shards = [jax.device_put(buffers[ranges], device) for device, ranges in places.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _ranges(index: Any, shape: tuple[int, ...]) -> Ranges:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _fill(leaf: Leaf, read: Read, buffers: Mapping[Ranges, np.ndarray]) -> None:
    """Copies every part of a leaf into the pieces of the leaf that `buffers` are."""
    for number, part in enumerate(leaf.parts):
        array = read(part).reshape(leaf.part_shape)  # splits an axis at most: a view
        for ranges, buffer in buffers.items():
            index = tuple(slice(*each) for each in ranges)
            # unsafe: float32 to bfloat16 is not "same kind" for NumPy
            if not leaf.fused:
                np.copyto(buffer, array[index], casting="unsafe")
                continue
            start, stop = ranges[1]
            if start <= number < stop:
                piece = array[(index[0], *index[2:])]
                np.copyto(buffer[:, number - start], piece, casting="unsafe")
