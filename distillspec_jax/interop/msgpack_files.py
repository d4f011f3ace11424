"""Flax's msgpack files, read as an index: where each array lies, without reading the arrays.

Only what such files hold is understood; every length is checked against the size of the file
before anything is allocated, and depth and count are bounded.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.interop.safetensors_files import MAX_RANK, TensorInfo, is_sizes, read_tensor

MAX_DEPTH = 64
MAX_ITEMS = 2**20
MAX_TEXT = 2**16
_NDARRAY, _SCALAR = 1, 3  # Flax's extension types
_DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (ml_dtypes.bfloat16, "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4")
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_WIDTHS = (">B", ">H", ">I")


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An array of a dtype that no parameter has; a bool in an optimizer's state for one."""

    dtype: str


class MsgpackFile:
    """One file; `tree` has a TensorInfo, or an Unreadable, where the file has an array."""

    def __init__(self, path: Path) -> None:
        """Walks the file once; raises UserError if it is not such a file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.tree = _Reader(file).whole()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, struct.error) as error:
            raise UserError(f"{path} is not a Flax msgpack checkpoint: {error}") from error
        if not isinstance(self.tree, dict):
            raise UserError(f"{path} is not a Flax msgpack checkpoint: it holds no mapping")

    def read(self, info: TensorInfo) -> np.ndarray:
        return read_tensor(self.path, info)


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, 2)
        self._items = 0
        file.seek(0)

    def whole(self) -> Any:
        value = self._value(0)
        if self._file.tell() != self._end:
            raise ValueError("something follows its end")
        return value

    def _value(self, depth: int) -> Any:
        self._items += 1
        if depth > MAX_DEPTH or self._items > MAX_ITEMS:
            raise ValueError("it is nested too deeply or has too many entries")
        code = self._bytes(1)[0]
        if code < 0x80:
            return code
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._array(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code >= 0xE0:
            return code - 0x100
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        return self._sized(code, depth)

    def _sized(self, code: int, depth: int) -> Any:
        """The types whose length, or nothing at all, follows the code."""
        plain = {0xC0: None, 0xC2: False, 0xC3: True}
        if code in plain:
            return plain[code]
        if 0xC4 <= code <= 0xC6:
            return self._bytes(self._bounded(self._number(_WIDTHS[code - 0xC4]), MAX_TEXT))
        if 0xC7 <= code <= 0xC9:
            return self._extension(self._number(_WIDTHS[code - 0xC7]), depth)
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << (code - 0xD4), depth)
        if 0xD9 <= code <= 0xDB:
            return self._text(self._number(_WIDTHS[code - 0xD9]))
        if code in (0xDC, 0xDD):
            return self._array(self._number(_WIDTHS[code - 0xDB]), depth)
        if code in (0xDE, 0xDF):
            return self._map(self._number(_WIDTHS[code - 0xDD]), depth)
        raise ValueError(f"byte 0x{code:02x} means nothing")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        found = {}
        for _ in range(self._bounded(count, MAX_ITEMS)):
            key = self._value(depth + 1)
            if not isinstance(key, str | int) or str(key) in found:
                raise ValueError("a key is no text or is repeated")
            found[str(key)] = self._value(depth + 1)
        return found

    def _array(self, count: int, depth: int) -> list[Any]:
        return [self._value(depth + 1) for _ in range(self._bounded(count, MAX_ITEMS))]

    def _text(self, length: int) -> str:
        return self._bytes(self._bounded(length, MAX_TEXT)).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _extension(self, length: int, depth: int) -> Any:
        """An array becomes a TensorInfo, its bytes are jumped over; other kinds become None."""
        (kind,) = struct.unpack(">b", self._bytes(1))
        end = self._file.tell() + self._bounded(length, self._end)
        info = self._tensor(depth) if kind in (_NDARRAY, _SCALAR) else None
        if isinstance(info, TensorInfo) and self._file.tell() != end:
            raise ValueError("an array has another length than it says")
        self._file.seek(end)
        return info

    def _tensor(self, depth: int) -> TensorInfo | Unreadable:
        """The inside of an array's extension: [shape, name of dtype, bytes]."""
        if self._bytes(1)[0] != 0x93:
            raise ValueError("an array is not of the form shape, dtype, bytes")
        shape, name = self._value(depth + 1), self._value(depth + 1)
        name = name.decode() if isinstance(name, bytes) else name
        is_shape = is_sizes(shape) and len(shape) <= MAX_RANK
        if not is_shape or not isinstance(name, str):
            raise ValueError(f"an array has shape {shape!r:.60} and dtype {name!r:.40}")
        if name not in _DTYPES:
            return Unreadable(name)
        code = self._bytes(1)[0]
        if not 0xC4 <= code <= 0xC6:
            raise ValueError("an array has no bytes")
        length = self._bounded(self._number(_WIDTHS[code - 0xC4]), self._end)
        info = TensorInfo(tuple(shape), _DTYPES[name], self._file.tell())
        if info.nbytes != length:
            needs = f"needs {info.nbytes} bytes, has {length}"
            raise ValueError(f"an array of shape {shape!r:.60} {needs}")
        self._file.seek(length, 1)
        return info

    def _bounded(self, count: int, limit: int) -> int:
        if count > limit or self._file.tell() + count > self._end:
            raise ValueError("it claims more than it has (truncated?)")
        return count

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count:
            raise ValueError("it ends too early (truncated?)")
        return found


def flatten(tree: Any, is_leaf: Callable[[Any], bool], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}; anything that is neither mapping nor leaf is dropped."""
    if is_leaf(tree):
        return {prefix: tree}
    if not isinstance(tree, dict):
        return {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, is_leaf, f"{prefix}/{key}" if prefix else key)
    return flat
