"""Big models: what loading costs beside the parameters, and the plan for 11B on eight devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.interop import huggingface, layout, safetensors_files
from distillspec_jax.interop.safetensors_files import TensorInfo
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.sharding.mesh import MeshConfig, make_mesh
from distillspec_jax.sharding.rules import param_shardings

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SLACK = 24 * 2**20  # bytes of allocators and thread stacks that come and go

# Peak resident memory while loading, less what was there before and the parameters themselves.
MEASURE = """
import sys
import jax
from distillspec_jax import zoo
from distillspec_jax.sharding.mesh import MeshConfig, make_mesh
from distillspec_jax.sharding.rules import param_shardings
from distillspec_jax.models.transformer import Transformer

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

shardings = None
if sys.argv[3] == "sharded":
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    shardings = lambda config: param_shardings(Transformer(config), mesh)
zoo.load(sys.argv[1], shardings=shardings)  # a small one, so that all code is in memory
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = status("VmRSS")
model, params = zoo.load(sys.argv[2], shardings=shardings)
jax.block_until_ready(params)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
print(status("VmHWM") - before - held)
"""


def measure(small, large, how):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), how],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def config_of(d_model, vocab_size, depth=2):
    return ModelConfig(
        name="big",
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=8,
        head_dim=d_model // 8,
        d_ff=2 * d_model,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
    )


def write_folder(folder, config, max_shard_bytes):
    """A Hugging Face folder of random weights, made tensor by tensor; returns the infos."""
    folder.mkdir(parents=True)
    infos = {
        part.huggingface: TensorInfo(part.huggingface_shape, np.dtype(np.float32))
        for leaf in layout.leaves(config)
        for part in leaf.parts
    }
    rng = np.random.default_rng(0)
    shards = huggingface.split_into_shards(infos, max_shard_bytes)
    for name, shard in shards.items():
        arrays = ((key, rng.standard_normal(info.shape, np.float32)) for key, info in shard.items())
        safetensors_files.write(folder / name, shard, arrays, {"format": "pt"})
    if len(shards) > 1:
        index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
        (folder / huggingface.INDEX).write_text(json.dumps(index))
    written, _ = huggingface.huggingface_config.write(config, "float32")
    (folder / "config.json").write_text(json.dumps(written))
    return infos


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "t5"
    write_folder(folder, config_of(16, 24), 2**40)
    return folder


@pytest.mark.parametrize("how", ["sharded", "one device"])
def test_loading_costs_at_most_two_tensors(tmp_path, small, how):
    infos = write_folder(tmp_path / "t5", config_of(1024, 24_000), 60 * 2**20)
    largest = max(info.nbytes for info in infos.values())
    assert sum(info.nbytes for info in infos.values()) > 4 * largest
    extra = measure(small, tmp_path / "t5", how)
    print(f"{how}: {extra / 2**20:.0f} MiB beside the parameters, largest {largest / 2**20:.0f}")
    assert extra <= 2 * largest + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "one device"])
def test_gigabytes_are_really_loaded(tmp_path, small, how):
    infos = write_folder(tmp_path / "t5", config_of(2048, 100_000, depth=6), 500 * 2**20)
    assert sum(info.nbytes for info in infos.values()) > 3 * 10**9
    largest = max(info.nbytes for info in infos.values())
    extra = measure(small, tmp_path / "t5", how)
    print(f"{how}: {extra / 2**20:.0f} MiB beside the parameters, largest {largest / 2**20:.0f}")
    assert extra <= 2 * largest + SLACK


def test_sharded_and_whole_are_the_same_bits(tmp_path):
    write_folder(tmp_path / "t5", config_of(32, 40), 2**40)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))

    def shardings(config):
        return param_shardings(Transformer(config), mesh)

    model, whole = zoo.load(tmp_path / "t5")
    _, split = zoo.load(tmp_path / "t5", shardings=shardings)
    wanted = shardings(model.config)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    jax.tree.map(
        lambda leaf, sharding: (
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            or pytest.fail(f"{leaf.shape} lies at {leaf.sharding}")
        ),
        split,
        wanted,
    )
    assert split["embedding"].addressable_shards[0].data.shape == (10, 16)


@pytest.fixture(scope="module")
def xxl_folder(tmp_path_factory):
    """T5 1.1 XXL as transformers names it: true headers, and files whose data takes no disk."""
    folder = tmp_path_factory.mktemp("xxl") / "flan-t5-xxl"
    folder.mkdir()
    shapes = json.loads((GOLDEN / "huggingface_xxl.json").read_text())
    infos = {name: TensorInfo(tuple(s), np.dtype(np.float32)) for name, s in shapes.items()}
    shards = huggingface.split_into_shards(infos, huggingface.MAX_SHARD_BYTES)
    for file, shard in shards.items():
        safetensors_files.write(folder / file, shard, None, {"format": "pt"})
    places = {name: file for file, shard in shards.items() for name in shard}
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": places}))
    written, _ = huggingface.huggingface_config.write(preset("flan_t5_xxl"), "float32")
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_the_plan_of_11b_on_eight_devices(xxl_folder):
    shapes = json.loads((GOLDEN / "huggingface_xxl.json").read_text())
    assert sum(math.prod(shape) for shape in shapes.values()) == 11_135_332_352
    size = sum(path.stat().st_size for path in xxl_folder.glob("*.safetensors"))
    assert size > 4 * 11_135_332_352
    disk = sum(path.stat().st_blocks * 512 for path in xxl_folder.glob("*.safetensors"))
    assert disk < 2**24

    config = huggingface.read_config(xxl_folder)
    assert config == ModelConfig(**vars(preset("flan_t5_xxl")) | {"name": "flan-t5-xxl"})
    weights = huggingface.Weights(xxl_folder)
    model = Transformer(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    leaves, shardings = layout.leaves(config), param_shardings(model, mesh)

    names = [part.huggingface for leaf in leaves for part in leaf.parts]
    assert sorted(names) == sorted(shapes)
    for leaf in leaves:
        for part in leaf.parts:
            stored = weights.tensors[part.huggingface].shape
            assert stored == part.huggingface_shape == tuple(shapes[part.huggingface])
    abstract = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    by_path = {leaf.path: leaf.shape for leaf in leaves}
    found = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    assert by_path == found
    sizes = {
        leaf.path: math.prod(layout.get(shardings, leaf.path).shard_shape(leaf.shape))
        for leaf in leaves
    }
    # only norms and biases are copies
    assert 1 <= 8 * sum(sizes.values()) / 11_135_332_352 < 1.001
    for leaf in leaves:
        if leaf.path[-1] in ("qkv", "out", "wi", "wo", "query", "key_value"):
            assert math.prod(leaf.shape) == 8 * sizes[leaf.path], leaf.path
