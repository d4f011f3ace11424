"""What every reader says when a checkpoint does not hold the tensors that its config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

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


def _listed(names: list[str]) -> str:
    """`3 tensors (a, b, c)`, cut after some."""
    shown = ", ".join(name[:120] for name in names[:_SHOWN])
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"
