"""Hugging Face folders in and out: safetensors, one file or an index with shards, no torch.

Reading trusts nothing: names, shapes and places are checked against config.json before a tensor is
read, and files that could run code (pickles) are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.interop import huggingface_config, layout, placing, safetensors_files
from distillspec_jax.interop.folders import (
    contained_file,
    new_folder,
    read_json_object,
    write_json,
)
from distillspec_jax.interop.layout import Part
from distillspec_jax.interop.safetensors_files import SafetensorsFile, TensorInfo
from distillspec_jax.interop.tensors import check_tensors, stored_as
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "spiece.model",
    "sentencepiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CODE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
_METADATA = {"format": "pt"}  # transformers refuses a file without it
_CHUNK = 16 * 2**20  # bytes compared at a time
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# in T5 1.0 files though no model ever used it; transformers drops it too
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class Weights:
    """The tensors of a folder by name, wherever they lie."""

    def __init__(self, folder: Path) -> None:
        """Reads the index and all headers; raises UserError if a part of them is not sound."""
        self.folder = folder
        if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
            file = SafetensorsFile(contained_file(folder, WEIGHTS))
            self._files = dict.fromkeys(file.tensors, file)
        elif (folder / INDEX).exists():
            self._files = _indexed(folder)
        else:
            raise UserError(_no_weights(folder))

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: file.tensors[name] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same bits."""
        first, second = self.tensors[name], self.tensors[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        one, two = (self.read(each).reshape(-1).view(np.uint8) for each in (name, other))
        starts = range(0, len(one), _CHUNK)
        return all(np.array_equal(one[i : i + _CHUNK], two[i : i + _CHUNK]) for i in starts)


def _indexed(folder: Path) -> dict[str, SafetensorsFile]:
    index = read_json_object(folder, INDEX).get("weight_map")
    where = folder / INDEX
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise UserError(f"{where} has no weight_map from tensors to files")
    shards = sorted(set(index.values()))
    # os.path, for Path.exists raises where a name is too long for a file
    absent = [shard[:120] for shard in shards if not os.path.exists(folder / Path(shard).name)]
    if absent:
        raise UserError(f"{where} names shards that are not there: {', '.join(absent[:8])}")
    files = {shard: SafetensorsFile(contained_file(folder, shard)) for shard in shards}
    found = {name: shard for shard, file in files.items() for name in file.tensors}
    if sum(len(file.tensors) for file in files.values()) != len(found):
        raise UserError(f"{folder}: the same tensor lies in two shards")
    if found != index:
        odd = sorted(set(found.items()) ^ set(index.items()))[0][0]
        raise UserError(f"{where} and the shards disagree about where tensor '{odd[:120]}' lies")
    return {name: files[shard] for name, shard in index.items()}


def _no_weights(folder: Path) -> str:
    for name in _CODE:
        if (folder / name).exists():
            return (
                f"{folder} has only {name}, which is not read here (pickles can run code); where "
                "you trust it, convert it once with transformers: T5ForConditionalGeneration"
                f".from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
            )
    return f"{folder} has neither {WEIGHTS} nor {INDEX}"


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder; opens the headers of its weights too."""
    config = read_json_object(folder, "config.json")
    where = f"{folder}/config.json"
    has_generation = (folder / "generation_config.json").exists()
    generation = read_json_object(folder, "generation_config.json") if has_generation else {}
    # first without the weights: what is refused by config.json is said before they are opened
    arguments = {"name": folder.name, "where": where}
    huggingface_config.read(config, generation, tie_embeddings=True, **arguments)
    weights = Weights(folder)
    tied = huggingface_config.is_tied_by_flag(config)
    if tied and _HEAD in weights:
        tied = weights.equal(_HEAD, _embedding(weights, tied))
    return huggingface_config.read(config, generation, tie_embeddings=tied, **arguments)


def read_params(
    folder: Path, config: ModelConfig, *, shardings: Any = None, dtype: str = "float32"
) -> Any:
    """The parameters of a folder whose shape is `config`; see `placing.assemble`."""
    weights = Weights(folder)
    table = layout.leaves(config)
    parts = [part for leaf in table for part in leaf.parts]
    wanted = {part.huggingface: part.huggingface_shape for part in parts}
    source = _embedding(weights, config.tie_embeddings)
    wanted[source] = wanted.pop(_EMBEDDING)
    copies = _copies(weights, source, config)
    found = {name: info for name, info in weights.tensors.items() if name not in copies}
    check_tensors(wanted, found, str(folder))
    for name in copies:
        if name != _UNUSED and not weights.equal(name, source):
            raise UserError(f"{folder}: {name} differs from {source}; T5 has one embedding")

    def read(part: Part) -> np.ndarray:
        array = weights.read(source if part.huggingface == _EMBEDDING else part.huggingface)
        return array.T if part.transposed else array

    return placing.assemble(table, read, shardings=shardings, dtype=dtype)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a folder by name; UserError if one leads out of it."""
    there = [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    return {name: contained_file(folder, name) for name in there}


def describe(folder: Path) -> dict[str, Any]:
    """What the folder says beside its shape: nothing that transformers defines."""
    return {}


def _embedding(weights: Weights, tied: bool) -> str:
    """The name that the embedding goes by in this file; the output matrix is it only if tied."""
    names = (_EMBEDDING, *_COPIES, *([_HEAD] if tied else []))
    return next((name for name in names if name in weights), _EMBEDDING)


def _copies(weights: Weights, source: str, config: ModelConfig) -> list[str]:
    names = [*_COPIES, _UNUSED, *([_HEAD] if config.tie_embeddings else [])]
    return [name for name in names if name in weights and name != source]


def save(
    model: Transformer,
    params: Any,
    folder: str | Path,
    *,
    dtype: str = "float32",
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder for transformers' T5ForConditionalGeneration, whole or not at all.

    A model that ties but does not scale its logits, or scales but does not tie, is written as one
    that transformers 4 knows too: the factor D**0.5 or D**-0.5 goes into the last norm's scale.

    Args:
      dtype: of the stored tensors; float32 keeps every bit.
      extra_files: what else belongs there by name, a tokenizer for one.
      max_shard_bytes: a file of weights is begun anew past this size.
    """
    shape, params = _scaled_if_tied(model.config, params)
    config, generation = huggingface_config.write(shape, dtype)
    stored = np.dtype(jnp.dtype(dtype))
    infos = {
        part.huggingface: TensorInfo(part.huggingface_shape, stored)
        for leaf in layout.leaves(shape)
        for part in leaf.parts
    }
    shards = split_into_shards(infos, max_shard_bytes)
    arrays = _arrays(shape, params, stored)
    with new_folder(Path(folder)) as temporary:
        for name, shard in shards.items():
            # the shards follow the order in which the arrays come
            mine = itertools.islice(arrays, len(shard))
            safetensors_files.write(temporary / name, shard, mine, _METADATA)
        if len(shards) > 1:
            write_json(temporary / INDEX, _index(shards))
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", generation)
        for name, content in (extra_files or {}).items():
            (temporary / name).write_bytes(content)


def _scaled_if_tied(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model, to one rounding of D numbers, with its logits scaled just if tied."""
    if config.scale_logits == config.tie_embeddings:
        return config, params
    factor = config.d_model ** (0.5 if config.tie_embeddings else -0.5)
    decoder = params["decoder"]
    scale = np.asarray(decoder["final_norm"]["scale"], np.float64) * factor
    decoder = {**decoder, "final_norm": {"scale": scale}}
    same = dataclasses.replace(config, scale_logits=config.tie_embeddings)
    return same, {**params, "decoder": decoder}


def _arrays(config: ModelConfig, params: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for leaf in layout.leaves(config):
        array = np.asarray(layout.get(params, leaf.path))
        for index, part in enumerate(leaf.parts):
            matrix = layout.split(leaf, array, index)
            matrix = matrix.T if part.transposed else matrix
            yield part.huggingface, stored_as(dtype, matrix, part.huggingface)


def split_into_shards(
    infos: Mapping[str, TensorInfo], limit: int
) -> dict[str, dict[str, TensorInfo]]:
    """File name -> its tensors: in order, each file of at most `limit` bytes (or one tensor)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups)
    }


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    total = sum(info.nbytes for shard in shards.values() for info in shard.values())
    places = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": places}
