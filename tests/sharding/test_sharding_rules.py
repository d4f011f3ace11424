"""The mesh, the table of axes, and the whole step on eight virtual devices against one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from distillspec_jax.data.batch import Batch
from distillspec_jax.distill.step import make_finetune_step
from distillspec_jax.errors import UserError
from distillspec_jax.models import transformer
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import PRESETS, preset
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.sharding import mesh as meshes
from distillspec_jax.sharding import rules
from distillspec_jax.sharding.mesh import MeshConfig, make_mesh
from distillspec_jax.training.state import TrainState

TINY = ModelConfig(
    name="tiny",
    vocab_size=40,
    num_pieces=37,
    d_model=16,
    num_heads=8,
    head_dim=5,
    d_ff=24,
    num_encoder_layers=1,
    num_decoder_layers=2,
)
SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


def test_one_axis_takes_what_the_others_leave():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize("config", [MeshConfig(3), MeshConfig(-1, -1), MeshConfig(8, 2)])
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(UserError, match="mesh data"):
        make_mesh(config)


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    meshes.check_divides(TINY, mesh)
    with pytest.raises(UserError, match=r"'tensor' = 8 does not divide num_heads = 6.*tensor = 6"):
        meshes.check_divides(dataclasses.replace(TINY, num_heads=6), mesh)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_mesh_axis_splits_one_parameter_twice(name):
    for spec in jax.tree.leaves(
        rules.partition_specs(Transformer(preset(name))),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    ):
        used = [axis for axis in spec if axis is not None]
        assert len(used) == len(set(used))


def test_every_matrix_of_a_large_preset_is_split():
    model = Transformer(preset("t5_1_1_xxl"))
    shapes = jax.eval_shape(lambda key: transformer.init_params(model, key), jax.random.key(0))
    specs = rules.partition_specs(model)

    def check(leaf, spec):
        if leaf.size > 1_000_000:
            assert set(spec) >= {"fsdp", "tensor"}

    jax.tree.map(check, shapes, specs)


def run_steps(mesh_shape):
    model, optimizer = Transformer(TINY), optax.adam(1e-2)
    step = make_finetune_step(model, optimizer)

    def create(key):
        return TrainState.create(transformer.init_params(model, key), optimizer, seed=7)

    key = jax.random.key(0)
    place = jnp.asarray
    if mesh_shape is None:
        state = jax.jit(create)(key)
    else:
        mesh = make_mesh(MeshConfig(*mesh_shape))
        split = rules.param_shardings(model, mesh)
        shardings = rules.like_params(jax.eval_shape(create, key), split, mesh)
        state = jax.jit(create, out_shardings=shardings)(key)

        def place(x):
            return jax.device_put(x, rules.batch_sharding(mesh))

    rng = np.random.default_rng(1)
    for _ in range(3):
        inputs, targets = rng.integers(2, 37, (16, 5)), rng.integers(2, 37, (16, 7))
        batch = Batch(place(inputs), place(targets), place(np.arange(16)))
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("mesh_shape", SHAPES)
def test_every_mesh_takes_the_same_steps_as_one_device(mesh_shape):
    expected, expected_metrics = run_steps(None)
    state, metrics = run_steps(mesh_shape)
    kernel = state.params["decoder"]["layers_0"]["mlp"]["wi"]
    parts = mesh_shape[1] * mesh_shape[2]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    np.testing.assert_allclose(metrics["loss"][0], expected_metrics["loss"][0], rtol=1e-5)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=2e-5)

    jax.tree.map(close, state.params, expected.params)
