"""What every reader and writer says of tensors: missing, too many, misshapen, too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from distillspec_jax.errors import UserError

_SHOWN = 8


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape], where: str
) -> None:
    """Raises UserError that lists tensors missing, too many, or of another shape than `wanted`."""
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    complaints = []
    if missing:
        complaints.append(f"lacks {_listed(missing)}")
    if surplus:
        complaints.append(f"holds {_listed(surplus)} too many")
    if complaints:
        raise UserError(f"{where} does not fit its config: it {' and '.join(complaints)}")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != tuple(shape):
            raise UserError(
                f"tensor '{name}' in {where} has shape {tuple(found[name].shape)}, its config "
                f"asks for {tuple(shape)}"
            )


def stored_as(dtype: np.dtype, array: np.ndarray, name: str) -> np.ndarray:
    """The tensor `name` in the dtype of a file; UserError if a number becomes infinite."""
    with np.errstate(over="ignore"):
        stored = array.astype(dtype)
    if stored.dtype != array.dtype and (np.isfinite(array) & ~np.isfinite(stored)).any():
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise UserError(
            f"tensor '{name}' holds {largest:.3g}, more than {dtype} can hold; store the model in "
            "another dtype"
        )
    return stored


def _listed(names: list[str]) -> str:
    """`3 tensors (a, b, c)`, cut after some."""
    shown = ", ".join(name[:120] for name in names[:_SHOWN])
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"
