"""A short name for the exact weights of a model, to tell what was made with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import numpy as np

from distillspec_jax.models.transformer import Params, Transformer


def fingerprint(model: Transformer, params: Params) -> str:
    """Hex sha256 of shape and weights: every bit of every parameter counts, the name does not."""
    digest = hashlib.sha256()
    config = dataclasses.replace(model.config, name="")
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
