"""Folders of other libraries, written as those libraries write them."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from distillspec_jax import zoo
from distillspec_jax.interop import layout

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_model():
    """(config, seed) -> a model and random parameters, without compiling anything."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)
        shapes = {leaf.path: leaf.shape for leaf in layout.leaves(config)}
        params = {path: rng.standard_normal(s, np.float32) for path, s in shapes.items()}
        return zoo.model(config), jax.tree.map(jnp.asarray, layout.nested(params))

    return make


@pytest.fixture(scope="session")
def cases():
    return load_module(GOLDEN / "huggingface_cases.py")


@pytest.fixture(scope="session")
def golden():
    return np.load(GOLDEN / "huggingface.npz")


@pytest.fixture(scope="session")
def make_folder(cases, golden):
    """(folder, case index) -> a Hugging Face folder of that golden case, and its tensors."""

    def make(folder, index):
        described = json.loads(str(golden[f"{index}/case"]))
        tensors = cases.weights(described["shapes"], described["seed"])
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(described["config"]))
        return described, tensors

    return make
