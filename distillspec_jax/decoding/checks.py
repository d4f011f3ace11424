"""What decoding refuses: settings and prompts before it starts, NaN after it ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig

Array = jax.Array | np.ndarray

ROW_IDS = np.iinfo(np.int32)


def check_request(
    inputs: Array,
    row_ids: Array | None,
    configs: Sequence[ModelConfig],
    *,
    rng: object,
    lowest_id: int = ROW_IDS.min,
) -> None:
    """Raises UserError unless inputs [B, S] are right-padded prompts and row_ids [B] fit int32.

    configs: of the models that read the prompts. Rows with a negative id are never read, so they
    may hold anything. Weights are not looked at: to walk through hundreds of arrays would take
    longer than all the rest. If they are traced `check_finite` tells it.
    """
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        raise UserError("JAX_ENABLE_X64 is set, and decoding computes in 32 bits; unset it")
    for name, argument in (("inputs", inputs), ("rng", rng), ("row_ids", row_ids)):
        _check_untraced(name, argument)
    _check_key(rng)
    expected = "expected an integer array [batch, length], both >= 1"
    if not hasattr(inputs, "dtype"):
        raise UserError(f"inputs are a {type(inputs).__name__}; {expected}")
    if inputs.ndim != 2 or 0 in inputs.shape or not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise UserError(f"inputs have shape {inputs.shape} of {inputs.dtype}; {expected}")
    if not getattr(inputs, "is_fully_addressable", True):
        return  # rows of other hosts; each host checks its own where it reads them
    prompts = np.asarray(inputs)
    is_read = np.ones(len(prompts), bool)
    if row_ids is not None:
        ids = np.asarray(row_ids)
        _check_row_ids(ids, len(prompts), lowest_id)
        is_read = ids >= 0
    _check_prompts(prompts, is_read, configs[0].pad_id, min(c.vocab_size for c in configs))


def check_finite(finite: Array, who: str) -> None:
    """Raises UserError if a row's flag [B] says that `who` gave NaN."""
    _check_untraced("weights", finite)
    is_here = getattr(finite, "is_fully_addressable", True)  # or with other hosts
    if not bool(np.asarray(finite).all() if is_here else jnp.all(finite)):
        raise UserError(f"{who} gave NaN logits; its weights are broken (NaN or far too large)")


def _check_untraced(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        are = "is" if name == "rng" else "are"
        raise UserError(
            f"{name} {are} traced, so what comes of them cannot be checked; inside a jitted "
            "function use `generate` or `speculate`"
        )


def _check_key(rng: Any) -> None:
    """Refuses what is neither a key nor the words of a raw one."""
    dtype, dims = getattr(rng, "dtype", None), getattr(rng, "ndim", None)
    is_new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and dims == 0
    is_raw = dtype == np.uint32 and dims == 1
    if is_raw:
        is_raw = rng.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not is_new and not is_raw:
        found = f"{rng!r}" if dims is None else f"an array of shape {rng.shape} of {dtype}"
        raise UserError(f"rng is {found}; it must be one key: jax.random.key(seed)")


def _check_row_ids(ids: np.ndarray, count: int, lowest: int) -> None:
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"row_ids have shape {ids.shape} of {ids.dtype}; expected one integer for each of "
            f"the {count} prompts"
        )
    outside = (ids < lowest) | (ids > ROW_IDS.max)
    if outside.any():
        raise UserError(
            f"row id {ids[outside][0]} in row {_rows(outside)} is outside "
            f"{lowest} <= id <= {ROW_IDS.max}"
        )


def _check_prompts(prompts: np.ndarray, is_read: np.ndarray, pad_id: int, vocab_size: int) -> None:
    """Refuses rows of prompts [B, S] where is_read [B], each kind of fault in one sentence."""
    is_pad = prompts == pad_id
    empty = is_read & is_pad.all(axis=1)
    if empty.any():
        raise UserError(
            f"empty prompt in row {_rows(empty)}: every prompt needs at least one token"
        )
    holed = is_read & (is_pad[:, :-1] & ~is_pad[:, 1:]).any(axis=1)
    if holed.any():
        raise UserError(f"padding before a token in row {_rows(holed)}: right-pad the prompts")
    outside = is_read[:, None] & ((prompts < 0) | (prompts >= vocab_size))
    if outside.any():
        raise UserError(
            f"id {prompts[outside][0]} in row {_rows(np.asarray(outside.any(axis=1)))} is outside "
            f"0 <= id < {vocab_size}, the vocabulary of the model"
        )


def _rows(chosen: np.ndarray) -> str:
    """The first few indices of chosen [B], for a sentence."""
    return ", ".join(map(str, np.flatnonzero(chosen)[:5]))
