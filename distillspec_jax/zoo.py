"""One name for every model: presets, packaged models, folders and checkpoints of all kinds.

model, params = zoo.load("cpu_draft")            # a preset: fresh parameters
model, params = zoo.load("stories-target")       # a trained model that comes with the package
model, params = zoo.load("runs/distill")         # a run: its best or newest checkpoint
model, params = zoo.load("path/to/folder")       # a folder that `save_native` wrote
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from distillspec_jax.data.vocabulary import ForeignVocabulary, Vocabulary, load_vocabulary
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.interop import huggingface, huggingface_config, native, orbax, t5x
from distillspec_jax.interop.folders import read_json_object
from distillspec_jax.interop.placing import checked_dtype
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.cpu_memory import on_large_pages
from distillspec_jax.models.presets import PRESETS
from distillspec_jax.models.transformer import Params, Transformer, init_params
from distillspec_jax.run_folders import FOLDER, chosen_step, drop_unfinished_reads

PRETRAINED = Path(__file__).parent / "pretrained"

# each has read_config(path), read_params(path, config, shardings=, dtype=) and describe(path)
READERS: dict[str, ModuleType] = {
    "native": native,
    "run": orbax,
    "huggingface": huggingface,
    "t5x": t5x,
}

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
      name_or_path: a preset, a packaged model, or the path of a native folder, a Hugging Face
        folder, a T5X checkpoint, a run's workdir or one of its checkpoints.
      seed: of a preset's fresh parameters.
      shardings: gives a tree of shardings like the parameters; each tensor then goes straight to
        its devices. None: the default device.
      dtype: of the parameters, float32 or bfloat16.
    """
    found = find(name_or_path)
    if found.path is None:
        return _fresh(PRESETS[found.name], seed, shardings, dtype)
    config = _read_config(found)
    places = None if shardings is None else shardings(config)
    read_params = READERS[found.kind].read_params
    try:
        params = read_params(found.path, config, shardings=places, dtype=dtype)
    except UserError:
        drop_unfinished_reads()
        raise
    return Transformer(config), params


def describe(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of a model without reading its weights.

    Keys: "kind", "name", "path" (or None), "model" (fields of ModelConfig), the special ids, and
    what its maker stored with it: "vocabulary_fingerprint" and "vocabulary_size" if known, which
    is what `data.vocabulary.check_same` compares.
    """
    found = find(name_or_path)
    own = {"kind": found.kind, "name": found.name, "path": found.path and str(found.path)}
    if found.path is None:
        config, stored = PRESETS[found.name], {}
    else:
        config, stored = _read_config(found), READERS[found.kind].describe(found.path)
        vocabulary = vocabulary_of(found)
        stored |= {} if vocabulary is None else vocabulary.describe()
    return stored | own | config.special_ids | {"model": dataclasses.asdict(config)}


def vocabulary_of(found: Found) -> Vocabulary | None:
    """The vocabulary that lies beside a model's weights, if one does that this project reads."""
    if found.kind != "huggingface" or found.path is None:
        return None
    huggingface.tokenizer_files(found.path)  # refuses links out of the folder
    try:
        return load_vocabulary(found.path)
    except ForeignVocabulary:  # no tokenizer, or of a kind that only transformers knows
        return None


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
    if os.path.exists(path):
        return _identify(path.resolve())
    if os.sep in name:
        raise UserError(f"no model at '{name}': there is no such file or folder")
    told = unknown_name("model", name, known)
    raise UserError(f"{told} (no such folder is here, and presets have fresh weights)")


def _identify(path: Path) -> Found:
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".bin"):
            raise UserError(f"'{path}' is a file of a model; give its folder, '{path.parent}'")
        return Found("t5x", path.name, path)
    if not path.is_dir():
        raise UserError(f"no model at '{path}': it is neither a file nor a folder")
    if orbax.is_step(path):
        return Found("run", path.name, path)
    if (path / FOLDER).is_dir():
        return Found("run", path.name, path / FOLDER / str(chosen_step(path)))
    if t5x.is_folder(path):
        return Found("t5x", path.name, t5x.chosen_folder(path))
    if (path / "config.json").exists():
        config = read_json_object(path, "config.json")
        for kind, is_kind in (
            ("native", native.is_native),
            ("huggingface", huggingface_config.is_huggingface),
        ):
            if is_kind(config):
                return Found(kind, path.name, path)
    raise UserError(
        f"no model in '{path}': expected a run's workdir (checkpoints/), a Hugging Face or native "
        "folder (config.json with model.safetensors) or a T5X checkpoint (a file 'checkpoint')"
    )


def _read_config(found: Found) -> ModelConfig:
    """The shape of what was found; a vocabulary beside it says which rows are padding."""
    config = READERS[found.kind].read_config(found.path)
    vocabulary = vocabulary_of(found)
    if vocabulary is None:
        return config
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"the vocabulary in '{found.path}' has {vocabulary.size} pieces, the model only "
            f"{config.vocab_size} rows"
        )
    return dataclasses.replace(config, num_pieces=vocabulary.size)


def _fresh(
    config: ModelConfig, seed: int, shardings: Callable[[ModelConfig], Any] | None, dtype: str
) -> tuple[Transformer, Params]:
    fresh, key, stored = Transformer(config), jax.random.key(seed), checked_dtype(dtype)
    if shardings is None:
        return fresh, on_large_pages(_initialized(key, fresh, stored))
    init = functools.partial(_initialized, model=fresh, dtype=stored)
    return fresh, on_large_pages(jax.jit(init, out_shardings=shardings(config))(key))


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def _initialized(key: jax.Array, model: Transformer, dtype: np.dtype) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(model, key))
