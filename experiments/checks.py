"""Numbers of a config that are too small, or no seeds: told with their key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distillspec_jax.errors import UserError


def check_least(config: Any, least: int, *fields: str, where: str = "config") -> None:
    """Refuses numbers, or tuples with one, below `least`."""
    for field in fields:
        given = getattr(config, field)
        for value in given if isinstance(given, tuple) else (given,):
            if value < least:
                raise UserError(f"{where}.{field} is {value}, must be at least {least}")


def check_seeds(where: str, *seeds: int) -> None:
    """Refuses seeds that are no uint32, as the state of a run holds them."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"{where} is {seed}, must be within 0 and 2**32 - 1")


def check_entries(key: str, values: Sequence[float | str]) -> None:
    """Refuses a list that is empty, or has an entry twice as rows and figures are told apart."""
    if not values:
        raise UserError(f"{key} is empty, must have at least one entry")
    labels = [value if isinstance(value, str) else f"{value:g}" for value in values]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise UserError(f"{key} has {repeated[0]} more than once; give each entry once")
