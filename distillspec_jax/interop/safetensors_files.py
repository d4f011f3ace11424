"""Safetensors files, read with suspicion and written one tensor at a time.

Format: 8 bytes little-endian header size, a JSON header {name: {dtype, shape, data_offsets}},
then the data without holes. The header is checked against the true size of the file before
anything is allocated for a tensor, so a hostile file costs no more than its own size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.interop.folders import parse_json_object

MAX_HEADER_BYTES = 8 * 2**20  # the 11B models need about 0.1 MB
MAX_RANK = 8
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says about one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int = 0  # byte in the file, where the tensor lies in one piece

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One `.safetensors` file; `tensors` is known at once, data is read on demand."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header; raises UserError naming the file and what is wrong."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_begin = _read_header(file, size)
                self.tensors = _check(header, data_begin, size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a sound safetensors file: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, in its stored dtype; nothing else of the file is touched."""
        return read_tensor(self.path, self.tensors[name])


def read_tensor(path: Path, info: TensorInfo) -> np.ndarray:
    """The tensor that lies at `info` of a file; nothing else of the file is touched."""
    array = np.empty(info.shape, info.dtype)
    target = memoryview(array.reshape(-1).view(np.uint8).data)
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        done = 0
        while done < info.nbytes:
            count = file.readinto(target[done:])
            if not count:
                raise UserError(f"{path} ends within a tensor")
            done += count
    return array


def _read_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"it has {size} bytes, not even the 8 of the header's size")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise ValueError(f"its header claims {length:,} bytes, the file has {size:,} (truncated?)")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"its header claims {length:,} bytes, at most {MAX_HEADER_BYTES:,} is sane"
        )
    header = parse_json_object(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of strings")
    return header, 8 + length


def _check(header: dict[str, Any], data_begin: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor's place; raises ValueError unless they fill the data exactly once."""
    infos = {name: _tensor_info(name, entry, data_begin) for name, entry in header.items()}
    end = data_begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != end:
            what = (
                "overlaps the tensor before it" if info.begin < end else "leaves a hole before it"
            )
            raise ValueError(f"tensor '{name}' {what}")
        end += info.nbytes
    if end != size:
        what = "truncated" if end > size else "followed by something else"
        raise ValueError(f"its tensors need {end:,} bytes, the file has {size:,} ({what})")
    return infos


def _tensor_info(name: str, entry: Any, data_begin: int) -> TensorInfo:
    label = f"tensor '{name[:80]}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{label} has dtype {dtype!r:.40}, supported are {', '.join(DTYPES)}")
    if not is_sizes(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"{label} has no sound shape")
    if not is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{label} has no sound data_offsets")
    begin, end = offsets
    info = TensorInfo(tuple(shape), DTYPES[dtype], data_begin + begin)
    if info.nbytes != end - begin:
        raise ValueError(f"{label} of shape {shape} needs {info.nbytes} bytes, has {end - begin}")
    return info


def is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a value from a file is a list of sizes or offsets."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def write(
    path: Path,
    infos: Mapping[str, TensorInfo],
    arrays: Iterable[tuple[str, np.ndarray]] | None,
    metadata: Mapping[str, str],
) -> None:
    """Writes a file, one tensor at a time.

    Args:
      infos: name, shape and dtype of every tensor, in the order in which they are stored.
      arrays: the same names with their values; None leaves the data a hole that reads as zeros and
        takes no disk, to try out sizes.
      metadata: strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in infos.items():
        entry = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape)}
        header[name] = entry | {"data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned data can be mapped into memory
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if arrays is None:
            file.truncate(8 + len(text) + end)
            return
        for (name, array), (expected, info) in zip(arrays, infos.items(), strict=True):
            if (name, array.shape, array.dtype) != (expected, info.shape, info.dtype):
                raise ValueError(f"tensor {name} is not what the header promised")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
