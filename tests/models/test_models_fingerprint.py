"""Fingerprints: the same for the same weights, another for any other weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.fingerprint import checksums, fingerprint
from distillspec_jax.models.transformer import Transformer

MODEL = Transformer(ModelConfig("one", 11, 7, 2, 3, 13, 1, num_decoder_layers=1))


def params(**changes):
    rng = np.random.default_rng(2)
    tree = {"a": rng.normal(size=(8, 3)), "b": rng.normal(size=5), "c": np.zeros((2, 2))}
    tree["d"] = np.ones((2, 2))
    return {name: np.float32(value) for name, value in (tree | changes).items()}


def test_every_bit_and_every_place_counts():
    same = fingerprint(MODEL, params())
    assert fingerprint(MODEL, jax.tree.map(jnp.asarray, params())) == same
    assert len(same) == 64
    a, b = params()["a"], params()["b"]
    nudged = a.copy()
    nudged[5, 1] = np.nextafter(nudged[5, 1], np.float32(9))
    others = [
        {"a": nudged},
        {"a": a[::-1]},
        {"a": a[:, [1, 0, 2]]},
        {"b": -b},
        {"c": np.full((2, 2), -0.0)},
        {"c": np.zeros(4)},
        {"c": params()["d"], "d": params()["c"]},
    ]
    found = {fingerprint(MODEL, params(**other)) for other in others}
    assert len(found | {same}) == len(others) + 1


def test_shape_counts_and_neither_name_nor_dtype_of_compute_does():
    config = MODEL.config
    renamed = Transformer(dataclasses.replace(config, name="other", dtype="bfloat16"))
    other = Transformer(dataclasses.replace(config, eos_id=2))
    assert fingerprint(renamed, params()) == fingerprint(MODEL, params())
    assert fingerprint(other, params()) != fingerprint(MODEL, params())


def test_where_the_weights_lie_does_not_count():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    places = {"a": PartitionSpec("x"), "b": PartitionSpec(), "c": PartitionSpec(None, "x")}
    places["d"] = PartitionSpec()
    spread = {
        name: jax.device_put(value, NamedSharding(mesh, places[name]))
        for name, value in params().items()
    }
    assert fingerprint(MODEL, spread) == fingerprint(MODEL, params())


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "bool", "uint32", "uint8"])
def test_checksums_see_each_bit_and_the_order(dtype):
    values = np.arange(13) % 2 == 0 if dtype == "bool" else np.arange(13)
    array = jnp.asarray(values, dtype)
    base = np.asarray(checksums({"a": array}))
    for index in range(13):
        raw = np.array(array)
        raw.view(np.uint8).reshape(13, -1)[index, 0] ^= 1
        assert np.asarray(checksums({"a": jnp.asarray(raw)})) != base
    if dtype != "bool":
        assert np.asarray(checksums({"a": array[::-1]})) != base


@pytest.mark.parametrize("size", [2, 24, 512])
def test_checksums_see_what_keeps_other_sums(size):
    """Signs turned, two and all of them, and numbers that change places."""
    array = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    first = array.copy()
    first[:2] *= -1
    swapped = array.copy()
    swapped[0], swapped[size // 2] = 1.0, 2.0
    back = swapped.copy()
    back[0], back[size // 2] = 2.0, 1.0
    found = {int(checksums([x])[0]) for x in (array, -array, first, swapped, back, np.sort(array))}
    assert len(found) == 6 - (size == 2)  # of two numbers all signs are two


def test_checksums_do_not_depend_on_the_layout():
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    array = jax.random.normal(jax.random.key(0), (24, 5))
    spread = jax.device_put(array, split)
    np.testing.assert_array_equal(checksums([array]), checksums([spread]))
