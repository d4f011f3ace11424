"""One name for every model: presets, packaged models, folders and checkpoints of all kinds.

model, params = zoo.load("cpu_draft")            # a preset: fresh parameters
model, params = zoo.load("stories-target")       # a trained model that comes with the package
model, params = zoo.load("runs/distill")         # a run: its best or newest checkpoint
model, params = zoo.load("path/to/folder")       # a folder that `save_native` wrote
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.interop import native, orbax
from distillspec_jax.interop.folders import read_json_object
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import PRESETS
from distillspec_jax.models.transformer import Params, Transformer, init_params
from distillspec_jax.training.checkpoints import chosen_step

PRETRAINED = Path(__file__).parent / "pretrained"

# each has read_config(path), read_params(path, config, shardings=, dtype=) and describe(path)
READERS: dict[str, ModuleType] = {"native": native, "run": orbax}

save_native = native.save


@dataclasses.dataclass(frozen=True)
class Found:
    """What a name or path turned out to be.

    Attributes:
      kind: "preset" or a key of READERS.
      name: of the preset or of the folder.
      path: where the weights are; None for a preset.
    """

    kind: str
    name: str
    path: Path | None = None


def model(config: ModelConfig) -> Transformer:
    """The model of a shape; it holds no parameters."""
    return Transformer(config)


def packaged() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike[str],
    *,
    seed: int = 0,
    shardings: Callable[[ModelConfig], Any] | None = None,
    dtype: str = "float32",
) -> tuple[Transformer, Params]:
    """Loads a model, or makes a fresh one: (model, parameters).

    Args:
      name_or_path: a preset, a packaged model, or the path of a native folder, of a run's workdir
        or of one of its checkpoints.
      seed: of a preset's fresh parameters.
      shardings: gives a tree of shardings like the parameters; each tensor then goes straight to
        its devices. None: the default device.
      dtype: of the parameters, float32 or bfloat16.
    """
    found = find(name_or_path)
    if found.path is None:
        return _fresh(PRESETS[found.name], seed, shardings, dtype)
    reader = READERS[found.kind]
    config = reader.read_config(found.path)
    places = None if shardings is None else shardings(config)
    return Transformer(config), reader.read_params(
        found.path, config, shardings=places, dtype=dtype
    )


def describe(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a model without reading its weights.

    Keys: "kind", "name", "path" (or None), "model" (fields of ModelConfig), and what its maker
    stored with it, "vocabulary_fingerprint" for one.
    """
    found = find(name_or_path)
    own = {"kind": found.kind, "name": found.name, "path": found.path and str(found.path)}
    if found.path is None:
        return own | {"model": dataclasses.asdict(PRESETS[found.name])}
    reader = READERS[found.kind]
    config = reader.read_config(found.path)
    return reader.describe(found.path) | own | {"model": dataclasses.asdict(config)}


def find(name_or_path: str | os.PathLike[str]) -> Found:
    """Tells what `name_or_path` is; raises UserError if it is nothing known, or two things."""
    name = os.fspath(name_or_path)
    path = Path(name)
    known = sorted([*PRESETS, *packaged()])
    if name in known and path.exists():
        raise UserError(f"'{name}' is a model of the zoo and a path here; write './{name}' for it")
    if name in PRESETS:
        return Found("preset", name)
    if name in known:
        return Found("native", name, PRETRAINED / name)
    if path.exists():
        return _identify(path.resolve())
    if len(path.parts) > 1:
        raise UserError(f"no model at '{name}': there is no such file or folder")
    raise unknown_name("model", name, known)


def _identify(path: Path) -> Found:
    if orbax.is_step(path):
        return Found("run", path.name, path)
    if (path / orbax.FOLDER).is_dir():
        return Found("run", path.name, path / orbax.FOLDER / str(chosen_step(path)))
    if (path / "config.json").exists() and native.is_native(read_json_object(path, "config.json")):
        return Found("native", path.name, path)
    raise UserError(
        f"no model in '{path}': expected a run's workdir (checkpoints/) or a native folder "
        "(config.json with model.safetensors)"
    )


def _fresh(
    config: ModelConfig, seed: int, shardings: Callable[[ModelConfig], Any] | None, dtype: str
) -> tuple[Transformer, Params]:
    fresh = Transformer(config)

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(fresh, key))

    places = None if shardings is None else shardings(config)
    return fresh, jax.jit(init, out_shardings=places)(jax.random.key(seed))
