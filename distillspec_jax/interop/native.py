"""The project's own folder of a model: one safetensors file, its shape and its card.

model.safetensors   tensors named by the path in the tree ("decoder/layers_0/mlp/wi")
config.json         {"format": "distillspec_jax", "version": 1, "model": fields of ModelConfig}
card.json           what the maker says: command, seed, vocabulary_fingerprint, figures
README.md           the same for people
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import distillspec_jax
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.interop import layout, placing, safetensors_files
from distillspec_jax.interop.folders import (
    contained_file,
    new_folder,
    read_json_object,
    write_json,
)
from distillspec_jax.interop.safetensors_files import SafetensorsFile, TensorInfo
from distillspec_jax.interop.tensors import check_tensors, stored_as
from distillspec_jax.models.config import ModelConfig, check_has_end
from distillspec_jax.models.transformer import Transformer

FORMAT, VERSION = "distillspec_jax", 1
WEIGHTS = "model.safetensors"


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config.json is of this format."""
    return config.get("format") == FORMAT


def save(
    model: Transformer,
    params: Any,
    folder: str | Path,
    card: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
) -> None:
    """Writes a model's folder, whole or not at all.

    Args:
      card: JSON; "vocabulary_fingerprint" in it is what `describe` gives back.
      dtype: of the stored tensors; bfloat16 rounds, float32 keeps every bit.
    """
    check_has_end(model.config.eos_id, f"model '{model.config.name}'")
    table = {leaf.parts[0].t5x: leaf for leaf in layout.own_leaves(model.config)}
    stored = np.dtype(jnp.dtype(dtype))
    infos = {name: TensorInfo(leaf.shape, stored) for name, leaf in table.items()}
    arrays = (
        (name, stored_as(stored, np.asarray(layout.get(params, leaf.path)), name))
        for name, leaf in table.items()
    )
    with new_folder(Path(folder)) as temporary:
        safetensors_files.write(temporary / WEIGHTS, infos, arrays, {"format": FORMAT})
        config = {"format": FORMAT, "version": VERSION, "model": model.config.as_stored()}
        write_json(temporary / "config.json", config)
        card = dict(card) | {"distillspec_jax_version": distillspec_jax.__version__}
        write_json(temporary / "card.json", card)
        (temporary / "README.md").write_text(_readme(model.config, card), "utf-8")


def read_params(
    folder: Path, config: ModelConfig, *, shardings: Any = None, dtype: str = "float32"
) -> Any:
    """The parameters of a folder whose shape is `config`; see `placing.assemble`."""
    file = SafetensorsFile(contained_file(folder, WEIGHTS))
    table = layout.own_leaves(config)
    wanted = {leaf.parts[0].t5x: leaf.shape for leaf in table}
    check_tensors(wanted, file.tensors, str(file.path))
    return placing.assemble(
        table, lambda part: file.read(part.t5x), shardings=shardings, dtype=dtype
    )


def read_config(folder: Path) -> ModelConfig:
    """The shape that the folder's config.json tells."""
    stored = read_json_object(folder, "config.json")
    if stored.get("version") != VERSION:
        raise UserError(
            f"{folder}/config.json is of version {stored.get('version')!r}, this version of "
            f"distillspec_jax reads {VERSION}"
        )
    return model_config(stored.get("model"), f"{folder}/config.json")


def describe(folder: Path) -> dict[str, Any]:
    """What the maker of a folder said about it; empty if nothing."""
    return read_json_object(folder, "card.json") if (folder / "card.json").exists() else {}


def model_config(fields: Any, where: str) -> ModelConfig:
    """ModelConfig from JSON, every field checked by name, type and range."""
    if not isinstance(fields, dict):
        raise UserError(f"{where} has no fields of a model")
    hints = typing.get_type_hints(ModelConfig)
    for name, value in fields.items():
        if name not in hints:
            raise unknown_name("field", name, hints, where)
        allowed = typing.get_args(hints[name]) or (hints[name],)
        allowed = (*allowed, int) if float in allowed else allowed
        if type(value) not in allowed:
            raise UserError(f"{where}: {name} is {value!r}, must be {hints[name]}")
    missing = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.default is dataclasses.MISSING and field.name not in fields
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    check_has_end(fields.get("eos_id", ModelConfig.eos_id), where)
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _readme(config: ModelConfig, card: Mapping[str, Any]) -> str:
    lines = [
        f"# {config.name}",
        "",
        f"{layout.num_parameters(config):,} parameters; `zoo.load` reads this folder.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in card.items()),
    ]
    return "\n".join(lines) + "\n"
