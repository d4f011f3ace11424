"""Weights in one block of large pages: the same arrays, elsewhere."""

import functools
import gc
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax import zoo
from distillspec_jax.interop import orbax
from distillspec_jax.models.cpu_memory import LINE, PAGE, Room, on_large_pages
from distillspec_jax.models.transformer import Transformer, init_params

KEY = jax.random.key(0)
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tree():
    """More than a page of several dtypes and shapes, one of them empty, one a scalar."""
    return {
        "wide": jax.random.normal(jax.random.key(0), (600, 1024)),
        "half": jnp.arange(77, dtype=jnp.bfloat16).reshape(7, 11),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.float32(3.5),
        "key": jax.random.key(1),
        "count": 7,
    }


def place(array):
    return array.unsafe_buffer_pointer()


def mapping_of(address):
    """What the system says of the mapping that holds an address, or None."""
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        ends = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part)
        if ends and int(ends[1], 16) <= address < int(ends[2], 16):
            return part
    return None


def test_arrays_are_what_they_were():
    before, after = tree(), on_large_pages(tree())
    assert after["count"] == 7
    assert jnp.all(jax.random.key_data(after["key"]) == jax.random.key_data(before["key"]))
    for name in ("wide", "half", "empty", "scalar"):
        assert after[name].dtype == before[name].dtype
        assert after[name].sharding == before[name].sharding
        assert after[name].committed == before[name].committed
        np.testing.assert_array_equal(after[name], before[name])


def test_arrays_lie_in_one_block_from_the_start_of_a_page():
    after = on_large_pages(tree())
    places = sorted(place(after[name]) for name in ("wide", "half", "scalar"))
    assert places[0] % PAGE == 0
    assert all(each % LINE == 0 for each in places)
    assert places[-1] - places[0] < after["wide"].nbytes + 10 * LINE


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no large pages on this host"
)
def test_the_system_gives_large_pages_and_takes_them_back():
    arrays = on_large_pages({"a": jnp.ones((8, PAGE // 4)), "b": jnp.ones(3)})
    address = place(arrays["a"])
    found = re.search(r"AnonHugePages: +(\d+) kB", mapping_of(address))
    assert int(found[1]) * 1024 >= 7 * PAGE
    del arrays["a"]
    assert mapping_of(address), "the block lives as long as one of its arrays"
    arrays.clear()
    gc.collect()  # JAX lets go of what NumPy owns when Python collects
    assert mapping_of(address) is None


def test_a_room_gives_no_more_than_it_has():
    room = Room(2 * PAGE)
    first = room.empty((3, 5), np.dtype(np.float32))
    second = room.empty((PAGE // 4,), np.dtype(np.float32))
    first[...], second[...] = 1, 2
    assert first.sum() == 15
    with pytest.raises(ValueError, match="are left"):
        room.empty((PAGE // 4,), np.dtype(np.float32))


def test_arrays_that_fill_no_page_stay():
    few = {"a": jnp.ones((3, 5)), "b": jnp.ones(7)}
    after = on_large_pages(few)
    assert all(after[name] is few[name] for name in few)


def test_a_placed_array_stays_on_its_device_and_a_split_one_where_it_is():
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), devices=devices[:2])
    wide = jnp.ones((2, PAGE // 4))
    whole = jax.device_put(wide, devices[1])
    alone = jax.make_mesh((1,), ("data",), devices=devices[:1])
    named = jax.device_put(wide, NamedSharding(alone, PartitionSpec("data")))
    split = jax.device_put(wide, NamedSharding(mesh, PartitionSpec("data")))
    after = on_large_pages({"whole": whole, "named": named, "split": split})
    assert after["split"] is split
    for name, before in (("whole", whole), ("named", named)):
        assert after[name].sharding == before.sharding
        assert after[name].committed
        assert place(after[name]) != place(before)
        np.testing.assert_array_equal(after[name], before)


def test_arrays_can_be_given_away():
    """A step that is given its weights to write over must not write into the block."""
    arrays = on_large_pages(tree()["wide"])
    kept = np.array(arrays)
    stepped = jax.jit(lambda x: x + 1, donate_argnums=0)(arrays)
    for _ in range(3):
        stepped = jax.jit(lambda x: x + 1, donate_argnums=0)(stepped)
    np.testing.assert_allclose(stepped, kept + 4, rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    orbax.save(*zoo.load("cpu_target"), workdir, {})
    return str(workdir)


@pytest.mark.parametrize("is_placed", [False, True], ids=["default device", "placed"])
@pytest.mark.parametrize("name", ["stories-target", "cpu_target", "run"])
def test_the_zoo_puts_weights_there(name, is_placed, run):
    """From a folder, a preset's fresh ones and those of a run, also onto a mesh of one device."""
    name = run if name == "run" else name
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])

    def shardings(config):
        shapes = jax.eval_shape(functools.partial(init_params, Transformer(config)), KEY)
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)

    leaves = jax.tree.leaves(zoo.load(name, shardings=shardings if is_placed else None)[1])
    assert all(isinstance(leaf.sharding, NamedSharding) == is_placed for leaf in leaves)
    places = sorted(map(place, leaves))
    assert places[0] % PAGE == 0
    assert places[-1] - places[0] < sum(leaf.nbytes + LINE for leaf in leaves)
