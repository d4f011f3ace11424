"""The mesh of devices: three axes, of which any may be 1.

    data    rows of the batch; parameters are copies
    fsdp    rows of the batch, and parameters split along the model size D
    tensor  parameters and activations split along heads, MLP width and vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; -1 on one axis takes the devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (or of those given), shaped by `config`.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {_shape(sizes)}: sizes must be positive, -1 at most once")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if np.prod(sizes) != len(devices):
        asked = _shape([config.data, config.fsdp, config.tensor])
        raise UserError(f"mesh {asked} does not fit {len(devices)} devices: the product must match")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


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
