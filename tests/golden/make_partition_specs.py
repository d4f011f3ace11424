"""Writes partition_specs.json: how every parameter of every preset is split, on some meshes.

    python tests/golden/make_partition_specs.py

A change of this file is a change of where weights lie on a pod; the diff is the review. Layers of
a stack are alike, and stand as `layers_*`.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from distillspec_jax.errors import UserError
from distillspec_jax.models.presets import PRESETS
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.sharding.mesh import AXES, check_divides
from distillspec_jax.sharding.rules import partition_specs

FILE = Path(__file__).with_name("partition_specs.json")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 4, 4)]  # data, fsdp, tensor


def splits(most_layers=None):
    """{preset: {"parameters": {path: [spec, whole shape]}, "meshes": {mesh: {path: shard}}}}.

    `most_layers` of each stack are looked at, all without it.
    """
    return {name: _of_preset(PRESETS[name], most_layers) for name in sorted(PRESETS)}


def _of_preset(config, most_layers):
    model = Transformer(config if most_layers is None else _shortened(config, most_layers))
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    specs = jax.tree.leaves(partition_specs(model), is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = {}
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        name = re.sub(r"layers_\d+", "layers_*", "/".join(key.key for key in path))
        found.setdefault(name, (leaf.shape, spec))
        assert found[name] == (leaf.shape, spec)
    parameters = {
        name: f"{' '.join(str(axis or '-') for axis in spec)} of {'x'.join(map(str, shape))}"
        for name, (shape, spec) in found.items()
    }
    meshes = {"x".join(map(str, sizes)): _on_mesh(config, found, sizes) for sizes in MESHES}
    return {"parameters": parameters, "meshes": meshes}


def _shortened(config, most_layers):
    depths = {name: getattr(config, name) for name in ("num_encoder_layers", "num_decoder_layers")}
    depths = {name: min(most_layers, depth) for name, depth in depths.items()}
    return dataclasses.replace(config, **depths)


def _on_mesh(config, found, sizes):
    """Numbers that one device holds, in all, or why the mesh is refused."""
    mesh = AbstractMesh(sizes, AXES)
    try:
        check_divides(config, mesh)
    except UserError as error:
        return str(error)
    shards = {}
    for name, (shape, spec) in found.items():
        parts = [mesh.shape[axis] if axis else 1 for axis in spec]
        shards[name] = "x".join(str(n // p) for n, p in zip(shape, parts, strict=True))
    return shards


if __name__ == "__main__":
    FILE.write_text(json.dumps(splits(), indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
