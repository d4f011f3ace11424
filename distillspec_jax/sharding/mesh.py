"""The mesh of devices: three axes, of which any may be 1.

data    rows of the batch; parameters are copies
fsdp    rows of the batch, and parameters split along the model size D
tensor  parameters and activations split along heads, MLP width and vocabulary
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import ROW_AXES

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; -1 on one axis takes the devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, rows: int = 0
) -> Mesh:
    """The mesh of all devices (or of those given), shaped by `config`.

    An axis of -1 takes the devices that the others leave; given `rows`, only as many as divide
    them, if it is an axis that splits rows. One process may leave devices idle, several may not.

    Raises UserError if the sizes ask for more devices than there are, or make no sense.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices), rows)
    asked, count = _shape([config.data, config.fsdp, config.tensor]), math.prod(sizes)
    if count > len(devices):
        raise UserError(f"mesh {asked} needs {count} devices, there are {len(devices)}")
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh {asked} takes {count} of the {len(devices)} devices of {jax.process_count()} "
            "hosts: on several hosts the product must be the number of devices"
        )
    axis_types = (AxisType.Auto,) * len(AXES)  # jit places what is between inputs and outputs
    return jax.make_mesh(sizes, AXES, axis_types, devices=devices[:count])


def axis_sizes(config: MeshConfig, count: int, rows: int = 0) -> tuple[int, ...]:
    """The sizes that `make_mesh` gives the axes on `count` devices; UserError for nonsense."""
    sizes = dataclasses.astuple(config)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {_shape(sizes)}: sizes must be positive, -1 at most once")
    if -1 not in sizes:
        return sizes
    free = sizes.index(-1)
    given = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 0}
    size = max(1, count // math.prod(given.values()))
    if rows and AXES[free] in ROW_AXES:
        others = math.prod(size for axis, size in given.items() if axis in ROW_AXES)
        size = max((n for n in range(1, size + 1) if rows % (n * others) == 0), default=size)
    return (*sizes[:free], size, *sizes[free + 1 :])


def check_divides(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where the tensor or fsdp axis does not divide a size of the model."""
    split = {
        "num_heads": (config.num_heads, "tensor"),
        "d_ff": (config.d_ff, "tensor"),
        "vocab_size": (config.vocab_size, "tensor"),
        "d_model": (config.d_model, "fsdp"),
    }
    for field, (size, axis) in split.items():
        parts = mesh.shape[axis]
        if size % parts:
            fits = [n for n in range(1, parts + 1) if size % n == 0]
            raise UserError(
                f"mesh axis '{axis}' = {parts} does not divide {field} = {size} of model "
                f"'{config.name}'; {axis} = {fits[-1]} would"
            )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
