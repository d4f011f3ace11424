"""Zarr arrays (version 2) in a folder, checked before TensorStore opens them.

TensorStore fills a missing chunk with zeros and follows any path that a spec names. Here an array
is a plain subfolder whose chunks are all there, as files and no links.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from distillspec_jax.errors import UserError, first_line
from distillspec_jax.interop.folders import read_json_object
from distillspec_jax.interop.safetensors_files import MAX_RANK, is_sizes

MAX_CHUNK_BYTES = 4 * 2**30
MAX_CHUNKS = 2**20
_DTYPES = {
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class ZarrArray:
    """One array; data is read on demand."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, layer: int | None = None) -> np.ndarray:
        """The whole array, or index `layer` of its axis 1 (only those chunks are read)."""
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{self.folder}/"}}
        try:
            store = tensorstore.open(spec, open=True, read=True).result()
            view = store if layer is None else store[:, layer]
            return np.asarray(view.read().result())
        except (ValueError, OSError) as error:
            raise UserError(
                f"the array {self.folder} cannot be read: {first_line(error)}"
            ) from error


def open_array(parent: Path, name: str) -> ZarrArray:
    """Checks the array in subfolder `name` of `parent`; raises UserError if it is not sound."""
    folder = parent / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{parent} names an array '{name[:120]}' that is not a plain folder in it")
    # os.path, for Path raises where a name is too long for a file
    if os.path.islink(folder) or not os.path.isdir(folder):
        raise UserError(f"{parent} names the array '{name[:120]}', which is not there as a folder")
    metadata = read_json_object(folder, ".zarray")
    shape, chunks, dtype = metadata.get("shape"), metadata.get("chunks"), metadata.get("dtype")
    if not is_sizes(shape) or not is_sizes(chunks) or len(shape) != len(chunks):
        raise UserError(f"{folder}/.zarray has no sound shape and chunks")
    if len(shape) > MAX_RANK or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(
            f"{folder}/.zarray has dtype {dtype!r:.40}, supported are {', '.join(_DTYPES)}"
        )
    _check_chunks(folder, shape, chunks, _DTYPES[dtype], metadata)
    return ZarrArray(folder, tuple(shape), _DTYPES[dtype])


def _check_chunks(
    folder: Path, shape: list[int], chunks: list[int], dtype: np.dtype, metadata: dict[str, Any]
) -> None:
    if 0 in shape:
        raise UserError(f"{folder}/.zarray has shape {shape}, which holds nothing")
    if 0 in chunks or math.prod(chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise UserError(f"{folder}/.zarray has chunks of {chunks}, which is absurd")
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if math.prod(counts) > MAX_CHUNKS:
        raise UserError(f"{folder}/.zarray has {math.prod(counts):,} chunks, which is absurd")
    separator = metadata.get("dimension_separator", ".")
    if separator != ".":
        raise UserError(f"{folder}/.zarray separates chunks by {separator!r:.9}, T5X does by '.'")
    there = {each.name for each in folder.iterdir() if each.is_file() and not each.is_symlink()}
    names = (".".join(map(str, index)) or "0" for index in itertools.product(*map(range, counts)))
    absent = [name for name in names if name not in there]
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of its {math.prod(counts)} chunks ({absent[0]} for one)"
        )
