"""The mesh and the table of axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distillspec_jax.errors import UserError
from distillspec_jax.models import layers, transformer
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.sharding import mesh as meshes
from distillspec_jax.sharding import rules
from distillspec_jax.sharding.mesh import MeshConfig, make_mesh
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
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


def test_one_axis_takes_what_the_others_leave():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(-1, -1), "-1 at most once"),
        (MeshConfig(0), "must be positive"),
        (MeshConfig(8, 2), "data 8 x fsdp 2 x tensor 1 needs 16 devices, there are 8"),
        (MeshConfig(-1, 3, 3), "needs 9 devices, there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        make_mesh(config)


@pytest.mark.parametrize(
    ("config", "rows", "expected"),
    [
        (MeshConfig(), 12, (6, 1, 1)),  # 8 does not divide 12 rows
        (MeshConfig(fsdp=2), 4, (2, 2, 1)),
        (MeshConfig(tensor=4), 3, (1, 1, 4)),
        (MeshConfig(1, 1, -1), 3, (1, 1, 8)),
        (MeshConfig(3), 0, (3, 1, 1)),
    ],
)
def test_one_process_may_leave_devices_idle(config, rows, expected):
    assert tuple(make_mesh(config, rows=rows).shape.values()) == expected


def test_several_hosts_leave_no_device_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="takes 3 of the 8 devices of 2 hosts"):
        make_mesh(MeshConfig(3))


@pytest.mark.parametrize(
    ("axis", "sizes", "fits"),
    [
        ("tensor", {"num_heads": 6}, 6),
        ("tensor", {"d_ff": 20}, 5),
        ("tensor", {"vocab_size": 44}, 4),
        ("fsdp", {"d_model": 12}, 6),
    ],
)
def test_a_mesh_that_does_not_divide_a_size_is_refused(axis, sizes, fits):
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: 8}))
    meshes.check_divides(TINY, mesh)
    [(field, size)] = sizes.items()
    words = f"'{axis}' = 8 does not divide {field} = {size} .*{axis} = {fits} would"
    with pytest.raises(UserError, match=words):
        meshes.check_divides(dataclasses.replace(TINY, **sizes), mesh)


# FLAN-T5 has the shapes of T5 1.1, and depth adds no other kind of parameter
@pytest.mark.parametrize("name", ["t5_small", "t5_1_1_small", "lm1b_33m", "cpu_target"])
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


def test_state_is_split_as_its_parameters_are():
    """Adafactor leaves a single number at the path of each vector that it does not factor."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    model = Transformer(dataclasses.replace(TINY, d_model=256, d_ff=128))
    places = rules.param_shardings(model, mesh)
    shapes = jax.eval_shape(lambda key: transformer.init_params(model, key), jax.random.key(0))
    for name in ("adamw", "adafactor"):
        state = jax.eval_shape(
            lambda params, name=name: TrainState.create(
                params, make_optimizer(OptimizerConfig(name=name), 9), average_decay=0.9
            ),
            shapes,
        )
        split = rules.like_params(state, places, mesh)
        jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), state, split)  # divides
        assert split.average == split.params == places
    assert split.step.spec == PartitionSpec()


@pytest.mark.parametrize("outputs", [(3, 4, 16), (2, 64)])
def test_a_product_leaves_heads_and_features_where_the_kernel_has_them(outputs):
    """Merged into one axis with those in front they could not stay split over `tensor`."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = PartitionSpec(("data", "fsdp"))
    split = PartitionSpec("fsdp", None, "tensor")

    def shape(sizes, spec):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        lowered = jax.jit(layers.multiply).lower(
            shape((8, 16, 48), rows), shape((48, *outputs), split)
        )
    place = lowered.compile().output_shardings
    rows_of_a_device, _, count, features, *_ = place.shard_shape((8, 16, *outputs))
    assert (rows_of_a_device, count, features) == (2, outputs[0], outputs[1] // 2)


@pytest.mark.parametrize(
    "names", [("x",), ("data",), ("data", "model"), ("data", "fsdp", "tensor")]
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_the_callers_own_is_let_be(names, kind):
    """Rows are split over the axes that it has, and over none whose layout the caller chooses."""
    model = Transformer(TINY)
    params = transformer.init_params(model, jax.random.key(0))
    tokens = jnp.arange(2, 26).reshape(4, 6)
    score = jax.jit(lambda params: transformer.score(model, params, tokens, tokens))
    expected = score(params)
    with jax.set_mesh(jax.make_mesh((2,) * len(names), names, axis_types=(kind,) * len(names))):
        np.testing.assert_allclose(score(params), expected, atol=1e-4)
