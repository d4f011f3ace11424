"""T5X checkpoints in: one msgpack file, or a folder of it with a zarr array per tensor.

    checkpoint_1000/checkpoint                             msgpack: small arrays, and specs of
    checkpoint_1000/target.encoder.layers_0....kernel/     zarr arrays (version 2) like this one

The layers are apart ("layers_3/...") or scanned, which stacks them along axis 1. Shapes tell the
architecture but for the activation, which a `config.gin` beside the checkpoint may tell; without
one a gated MLP has GELU (T5 1.1) and a plain one ReLU (T5 1.0).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.interop import gin, layout, placing, zarr_folders
from distillspec_jax.interop.folders import contained_file
from distillspec_jax.interop.huggingface_config import num_pieces
from distillspec_jax.interop.layout import Part
from distillspec_jax.interop.msgpack_files import MsgpackFile, Unreadable, flatten
from distillspec_jax.interop.safetensors_files import TensorInfo
from distillspec_jax.interop.tensors import check_tensors
from distillspec_jax.interop.zarr_folders import ZarrArray
from distillspec_jax.models.config import FieldError, ModelConfig

FILE = "checkpoint"
_FLOATS = ("float32", "bfloat16", "float16")
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d{1,9})/(.+)")
_PLACEHOLDER = "PLACEHOLDER://"  # how Orbax's legacy format names an array beside the file


class Checkpoint:
    """The parameters of a T5X checkpoint by name ("encoder/layers_0/mlp/wi_0/kernel")."""

    def __init__(self, path: Path) -> None:
        """`path` is the msgpack file, or the folder that holds it and the arrays."""
        self.path = path
        self._folder = path if path.is_dir() else path.parent
        self._file = MsgpackFile(contained_file(path, FILE) if path.is_dir() else path)
        tree = self._file.tree.get("optimizer", self._file.tree)
        target = tree.get("target") if isinstance(tree, Mapping) else None
        if not isinstance(target, Mapping):
            raise UserError(f"{path} holds no T5X parameters (optimizer/target)")
        self.entries = {
            name: self._located(name, entry) for name, entry in flatten(target, _is_entry).items()
        }
        for name, entry in self.entries.items():
            if entry.dtype.name not in _FLOATS:
                raise UserError(f"tensor '{name}' in {path} has dtype {entry.dtype}, not a float")
        self.is_scanned = any(name.startswith("decoder/decoder/") for name in self.entries)

    def _located(self, name: str, entry: Any) -> TensorInfo | ZarrArray:
        if isinstance(entry, TensorInfo):
            return entry
        if isinstance(entry, Unreadable):
            raise UserError(
                f"tensor '{name}' in {self.path} has dtype {entry.dtype!r:.40}, not a float"
            )
        return zarr_folders.open_array(self._folder, _array_folder(name, entry))

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the names of unscanned layers, as matrices "inputs x outputs"."""
        if not self.is_scanned:
            return {name: _matrix_shape(name, e.shape) for name, e in self.entries.items()}
        shapes = {}
        for name, entry in self.entries.items():
            stack, scanned, rest = name.partition("/")[0], *_scanned(name)
            if not scanned:
                shapes[name] = _matrix_shape(name, entry.shape)
            elif len(entry.shape) < 2:
                raise UserError(f"tensor '{name}' in {self.path} has no axis of layers")
            elif rest == "relpos_bias/rel_embedding":
                shapes[f"{stack}/{rest}"] = _without(entry.shape)
            else:
                for index in range(min(entry.shape[1], layout.MAX_LAYERS)):
                    full = f"{stack}/layers_{index}/{rest}"
                    shapes[full] = _matrix_shape(full, _without(entry.shape))
        return shapes

    def read(self, name: str) -> np.ndarray:
        """A tensor by its unscanned name, in the shape it is stored in but for the scanned axis."""
        match = _LAYER.fullmatch(name)
        if self.is_scanned and match:
            stack, index, rest = match.groups()
            return self._read(f"{stack}/{stack}/{rest}", int(index))
        if self.is_scanned and name.endswith("/relpos_bias/rel_embedding"):
            return self._shared_bias(name)
        return self._read(name, None)

    def _read(self, name: str, layer: int | None) -> np.ndarray:
        entry = self.entries[name]
        if isinstance(entry, ZarrArray):
            return entry.read(layer)
        array = self._file.read(entry)
        return array if layer is None else array[:, layer]

    def _shared_bias(self, name: str) -> np.ndarray:
        stack = name.partition("/")[0]
        stacked = self._read(f"{stack}/{name}", None)
        if (stacked != stacked[:, :1]).any():
            raise UserError(
                f"{self.path}: the layers of the {stack} have relative position biases of their "
                "own (umT5); T5 shares one per stack"
            )
        return stacked[:, 0]


def is_folder(path: Path) -> bool:
    """Whether a folder is a T5X checkpoint, or holds such folders."""
    return (path / FILE).is_file() or any(_steps(path))


def chosen_folder(path: Path) -> Path:
    """The checkpoint itself: the folder, or the one of the largest step in it."""
    if (path / FILE).is_file():
        return path
    return path / max(_steps(path))[1]


def _steps(path: Path) -> list[tuple[int, str]]:
    """The step and the name of each checkpoint in a folder."""
    found = (re.fullmatch(r"checkpoint_(\d+)", each.name) for each in path.iterdir())
    return [(int(m[1]), m[0]) for m in found if m and (path / m[0] / FILE).is_file()]


def read_config(path: Path) -> ModelConfig:
    """The shape of the model, from the shapes of its tensors and `config.gin` if there is one."""
    return _config(Checkpoint(path))


def read_params(
    path: Path, config: ModelConfig, *, shardings: Any = None, dtype: str = "float32"
) -> Any:
    """The parameters of a checkpoint whose shape is `config`; see `placing.assemble`."""
    checkpoint = Checkpoint(path)
    table = layout.leaves(config)
    wanted = {part.t5x: part.shape for leaf in table for part in leaf.parts}
    found = {name: TensorInfo(s, np.dtype("f4")) for name, s in checkpoint.tensors.items()}
    check_tensors(wanted, found, str(path))

    def read(part: Part) -> np.ndarray:
        return checkpoint.read(part.t5x).reshape(part.shape)

    return placing.assemble(table, read, shardings=shardings, dtype=dtype)


def describe(path: Path) -> dict[str, Any]:
    """What the checkpoint says beside its shape: nothing that T5X defines."""
    return {}


def _config(checkpoint: Checkpoint) -> ModelConfig:
    shapes, where = checkpoint.tensors, checkpoint.path

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{where} does not hold '{name}', which a T5 has")
        if len(shapes[name]) != 2:
            raise UserError(f"tensor '{name}' in {where} has shape {shapes[name]}, not two axes")
        return shapes[name]

    vocab_size, d_model = shape("token_embedder/embedding")
    num_heads, buckets = shape("decoder/relpos_bias/rel_embedding")
    joint = shape("decoder/layers_0/self_attention/query/kernel")[1]
    gated = "decoder/layers_0/mlp/wi_0/kernel" in shapes
    d_ff = shape(f"decoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")[1]
    if num_heads < 1 or joint % num_heads:
        raise UserError(f"{where} has {num_heads} heads for queries of width {joint}")
    tied = "decoder/logits_dense/kernel" not in shapes
    stated = gin.read(where if where.is_dir() else where.parent)
    try:
        config = ModelConfig(
            name=where.name,
            vocab_size=vocab_size,
            num_pieces=num_pieces(vocab_size),
            d_model=d_model,
            num_heads=num_heads,
            head_dim=joint // num_heads,
            d_ff=d_ff,
            num_encoder_layers=_depth(shapes, "encoder"),
            num_decoder_layers=_depth(shapes, "decoder"),
            activation="gelu_new" if gated else "relu",
            gated=gated,
            tie_embeddings=tied,
            relative_buckets=buckets,
        )
        return dataclasses.replace(config, **gin.checked(stated, config, str(where)))
    except FieldError as error:
        raise UserError(f"{where}: {error}") from error


def _depth(shapes: Mapping[str, Any], stack: str) -> int:
    found = (_LAYER.fullmatch(name) for name in shapes)
    return 1 + max((int(m[2]) for m in found if m and m[1] == stack), default=-1)


def _is_entry(value: Any) -> bool:
    """An array, a spec of TensorStore's, or the name of an array beside the file."""
    if isinstance(value, Mapping):
        return {"driver", "kvstore"} <= set(value)
    return isinstance(value, TensorInfo | Unreadable) or (
        isinstance(value, str) and value.startswith(_PLACEHOLDER)
    )


def _array_folder(name: str, entry: Any) -> str:
    """The folder of an array; of a spec, which may point anywhere, only that name is used."""
    if isinstance(entry, str):
        return entry.removeprefix(_PLACEHOLDER)
    store = entry["kvstore"]
    path = store.get("path") if isinstance(store, Mapping) else None
    path = path or entry.get("path") or f"target.{name.replace('/', '.')}"
    return str(path).rstrip("/")


def _scanned(name: str) -> tuple[bool, str]:
    """("encoder/encoder/mlp/wo/kernel") -> (True, "mlp/wo/kernel")."""
    stack, _, rest = name.partition("/")
    inner, _, rest = rest.partition("/")
    return inner == stack, rest


def _without(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:])


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernels that keep heads and their size apart, (D, N, H) or (N, H, D), as matrices."""
    if len(shape) != 3 or not name.endswith("/kernel"):
        return shape
    if name.endswith("/out/kernel"):
        return (shape[0] * shape[1], shape[2])
    return (shape[0], shape[1] * shape[2])
