"""Folders of other libraries, written as those libraries write them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
