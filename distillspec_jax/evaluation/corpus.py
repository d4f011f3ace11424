"""Runs compiled functions over all prompts of a data set, batch by batch, onto the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.errors import UserError

OnRows = Callable[[int], None]


def over_batches(
    call: Callable[..., Any],
    row_ids: np.ndarray,
    *columns: np.ndarray,
    batch_size: int,
    on_rows: OnRows = lambda done: None,
) -> Any:
    """Calls `call(row_ids [B], *columns [B, ...])` until all rows are done.

    The last batch is filled up with copies of its first row under the id -1, which decoding takes
    for padding; their results are dropped.

    Args:
      call: returns a pytree of arrays with the batch in front.
      row_ids: [P], at least 0: what the randomness of a row depends on.
      columns: arrays [P, ...] that belong to the rows.
      batch_size: B, of every call.
      on_rows: told after each batch how many rows are done.

    Returns:
      The pytree of `call` with numpy arrays [P, ...].
    """
    total = len(row_ids)
    if not total or batch_size < 1:
        raise UserError(f"{total} prompts in batches of {batch_size}: both must be at least 1")
    batch_size = min(batch_size, total)
    results = []
    for begin in range(0, total, batch_size):
        picked = np.arange(begin, begin + batch_size)
        is_real = picked < total
        rows = np.where(is_real, picked, begin)
        ids = np.where(is_real, row_ids[rows], -1)
        batch = (jnp.asarray(column[rows]) for column in columns)
        results.append(jax.device_get(call(jnp.asarray(ids), *batch)))
        on_rows(min(begin + batch_size, total))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *results)
