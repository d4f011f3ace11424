"""The CPU's own product: values, gradients, what it is used for, and that nothing leaks into it."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from distillspec_jax import models
from distillspec_jax.models import cache as caches
from distillspec_jax.models import cpu_product, transformer
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer

cpu_kernel = pytest.importorskip("distillspec_jax.models.cpu_kernel")

PRODUCT = jax.jit(cpu_product.product, static_argnums=2)
LANES = cpu_kernel.LANES
CONFIG = ModelConfig(
    name="vectors",
    vocab_size=6 * LANES,
    d_model=2 * LANES,
    num_heads=3,
    head_dim=LANES,
    d_ff=5 * LANES,
    num_encoder_layers=1,
    num_decoder_layers=2,
)


def arrays(products, rows, inputs, outputs, transposed):
    rng = np.random.default_rng([products, rows, inputs, outputs])
    shape = (products, *((outputs, inputs) if transposed else (inputs, outputs)))
    return (
        rng.normal(size=(products, rows, inputs)).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
    )


def exact(x, weights, transposed):
    weights = weights.swapaxes(1, 2) if transposed else weights
    return x.astype(np.float64) @ weights.astype(np.float64)


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "lines"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 21, 40, 64])
@pytest.mark.parametrize(
    ("products", "inputs", "outputs"),
    [
        (1, LANES, LANES),  # one vector
        (1, 7 * LANES, 13 * LANES),  # strips and tiles with rests
        (1, 16 * LANES, 67 * LANES),  # shared by threads
        (5, 2 * LANES, 3 * LANES),
        (37, 8 * LANES, 20 * LANES),  # threads share whole products
    ],
)
def test_values(products, rows, inputs, outputs, transposed):
    x, weights = arrays(products, rows, inputs, outputs, transposed)
    found = PRODUCT(x, weights, transposed)
    np.testing.assert_allclose(found, exact(x, weights, transposed), atol=2e-4)


def test_sides_that_are_no_vectors_need_not_be():
    """Inputs of columns, outputs of lines and rows may have any size."""
    for transposed, inputs, outputs in ((False, 13, 3 * LANES), (True, 3 * LANES, 13)):
        x, weights = arrays(2, 5, inputs, outputs, transposed)
        found = PRODUCT(x, weights, transposed)
        np.testing.assert_allclose(found, exact(x, weights, transposed), atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "lines"])
def test_a_row_has_the_same_bits_in_any_company(transposed):
    x, weights = arrays(1, 21, 16 * LANES, 67 * LANES, transposed)
    whole = np.asarray(PRODUCT(x, weights, transposed))
    for rows in (slice(0, 1), slice(3, 8), slice(8, 17), slice(20, 21)):
        np.testing.assert_array_equal(PRODUCT(x[:, rows], weights, transposed), whole[:, rows])


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "lines"])
def test_nan_stays_in_its_row(transposed):
    x, weights = arrays(1, 9, 2 * LANES, 4 * LANES, transposed)
    x[0, 4, 3] = np.nan
    broken = np.isnan(PRODUCT(x, weights, transposed)).all(axis=(0, 2))
    assert broken.tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "lines"])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_lines_behind_the_end_are_not_looked_at(rows, transposed):
    """Ends before, at and behind the edges of tiles and strips, small and shared by threads."""
    sizes = (2 * LANES, 91) if transposed else (91, 2 * LANES)
    for ends in ([1, 2, 3, 31, 32, 33, 64, 91], [*range(1, 91), 200]):
        x, weights = arrays(len(ends), rows, *sizes, transposed)
        for product, end in enumerate(ends):
            weights[product, end:] = np.nan
        found = np.asarray(PRODUCT(x, weights, transposed, jnp.asarray(ends, jnp.int32)))
        for product, end in enumerate(ends):
            one = x[product : product + 1], weights[product : product + 1, :end]
            if transposed:
                mine = found[product, :, :end]
            else:
                one, mine = (one[0][..., :end], one[1]), found[product]
            np.testing.assert_allclose(mine, exact(*one, transposed)[0], atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "lines"])
def test_gradients_are_those_of_the_plain_product(transposed):
    x, weights = arrays(2, 5, 2 * LANES, 3 * LANES, transposed)

    def loss(product, x, weights):
        return jnp.sum(jnp.sin(product(x, weights)))

    ours = functools.partial(cpu_product.product, transposed=transposed)
    plain = functools.partial(
        jnp.einsum, "gmk,gfk->gmf" if transposed else "gmk,gkf->gmf", precision="highest"
    )
    found = jax.grad(loss, argnums=(1, 2))(ours, x, weights)
    wanted = jax.grad(loss, argnums=(1, 2))(plain, x, weights)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_many_callers_at_once():
    """More callers than cores: threads come late, and jobs must outlive their callers."""
    x, weights = arrays(1, 8, 16 * LANES, 67 * LANES, False)
    wanted = np.asarray(PRODUCT(x, weights, False))
    devices = jax.devices()

    def call(i):
        placed = jax.device_put((x, weights), devices[i % len(devices)])
        return [np.array_equal(PRODUCT(*placed, False), wanted) for _ in range(50)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(all(each) for each in pool.map(call, range(8)))


@pytest.mark.parametrize("threads", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_more_threads_than_two_share_lines_and_outputs(threads):
    """NPROC is how many threads XLA's pool has; a row's bits do not depend on the other rows."""
    check = """
import jax, numpy as np
from distillspec_jax.models import cpu_product
product = jax.jit(cpu_product.product)
for inputs, outputs in ((768, 2304), (31, 4096), (70, 2048), (1000, 80)):
    rng = np.random.default_rng(inputs)
    weights = rng.normal(size=(inputs, outputs)).astype(np.float32)
    x = rng.normal(size=(21, inputs)).astype(np.float32)
    whole = np.asarray(product(x, weights))
    np.testing.assert_allclose(whole, x.astype(np.float64) @ weights, atol=1e-3)
    for rows in (slice(0, 1), slice(3, 11)):
        np.testing.assert_array_equal(product(x[rows], weights), whole[rows])
    several = np.stack([weights, -weights])  # fewer than the threads
    found = np.asarray(product(np.stack([x, x]), several))
    np.testing.assert_allclose(found, np.stack([whole, -whole]), atol=1e-3)
"""
    environment = os.environ | {"NPROC": str(threads)}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)


def test_what_it_serves(monkeypatch):
    x, weights = map(jnp.asarray, arrays(1, 4, 2 * LANES, 4 * LANES, False))
    assert cpu_product.serves(x, weights)
    assert not cpu_product.serves(x.astype(jnp.bfloat16), weights)
    assert not cpu_product.serves(x, weights[..., 1:])
    assert not cpu_product.serves(x[:, :1], weights), "one row of few weights is XLA's"
    many = jnp.zeros((1, cpu_product.MAX_ROWS + 1, 2 * LANES))
    assert not cpu_product.serves(many, weights)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert not cpu_product.serves(x, weights), "XLA splits its own products only"
    monkeypatch.setenv(cpu_product.OFF, "1")
    assert not cpu_product.serves(x, weights)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_a_model_says_the_same_with_and_without_it(monkeypatch, kind, tied):
    layers = 1 if kind == "encoder-decoder" else 0
    config = dataclasses.replace(CONFIG, num_encoder_layers=layers, tie_embeddings=tied)
    model = Transformer(config)
    params = transformer.init_params(model, jax.random.key(0))
    inputs = jnp.arange(2, 14).reshape(2, 6)
    blocks = jnp.arange(14, 24).reshape(2, 5)

    def logits(params):
        cache, _ = transformer.start(model, params, inputs, 8)
        first, cache = transformer.extend(model, params, cache, blocks)
        return first, transformer.extend(model, params, cache, blocks[:, :1])[0]

    def compiled():
        return jax.jit(lambda params: logits(params)).lower(params).compile()

    with_it = compiled()
    monkeypatch.setenv(cpu_product.OFF, "1")
    without = compiled()
    assert "distillspec_product" in with_it.as_text()
    assert "distillspec_product" not in without.as_text()
    for found, wanted in zip(with_it(params), without(params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_poison_behind_the_caches_lengths_changes_nothing(batch_size):
    model = Transformer(CONFIG)
    params = transformer.init_params(model, jax.random.key(0))
    inputs = jnp.arange(2, 2 + 6 * batch_size).reshape(batch_size, 6)
    cache, _ = transformer.start(model, params, inputs, 24)
    _, cache = transformer.extend(model, params, cache, inputs[:, :4])
    cache = caches.rollback(cache, jnp.arange(batch_size) + 1)
    stale = jnp.arange(cache.room)[None] >= cache.lengths[:, None]

    def poison(buffer):
        return jnp.where(stale[:, None, :, None], jnp.nan, buffer)

    poisoned = cache.replace(
        keys=tuple(map(poison, cache.keys)), values=tuple(map(poison, cache.values))
    )
    block = inputs[:, :5]
    step = jax.jit(lambda cache: transformer.extend(model, params, cache, block)[0])
    assert "_ends" in step.lower(cache).compile().as_text()
    np.testing.assert_array_equal(step(poisoned), step(cache))


@pytest.mark.parametrize("width", [1, 4])
def test_a_step_does_not_copy_the_cache(width):
    """The write of one row and the kernel that reads it share a buffer; see also the decoders'."""
    model, room = Transformer(CONFIG), 2**16 // LANES
    params = jax.eval_shape(lambda key: transformer.init_params(model, key), jax.random.key(0))
    cache = jax.eval_shape(lambda: caches.empty(CONFIG, 1, room))
    memory = tuple(jax.ShapeDtypeStruct((1, 3, 6, LANES), jnp.float32) for _ in cache.keys)
    bias = jax.ShapeDtypeStruct((1, 1, 1, 6), jnp.float32)
    cache = cache.replace(cross_keys=memory, cross_values=memory, source_bias=bias)

    def loop(params, cache, block):
        def step(_, carry):
            cache, block = carry
            logits, cache = transformer.extend(model, params, cache, block)
            return cache, jnp.argmax(logits, axis=-1)

        return jax.lax.fori_loop(0, 9, step, (cache, block))

    block = jax.ShapeDtypeStruct((1, width), jnp.int32)
    inside, _ = jax.jit(loop).lower(params, cache, block).compile().as_text().split("\nENTRY ")
    buffer = rf"f32\[1,3,{room},{LANES}\]"
    assert re.search(rf"custom-call\(.*{buffer}", inside)
    assert re.search(rf"= {buffer}\S* fusion\(", inside)
    assert not re.search(rf"= {buffer}\S* copy\(", inside)


OTHER_HOST = """
import sys
import llvmlite.binding as llvm
import pytest

features = llvm.get_host_cpu_features()
for name in features:
    features[name] = features[name] and not name.startswith(("amx", *sys.argv[1].split(",")))
llvm.get_host_cpu_features = lambda: features
from distillspec_jax.models import cpu_kernel

assert cpu_kernel.LANES == int(sys.argv[2])
sys.exit(pytest.main([sys.argv[3], "-k", sys.argv[4], "-p", "no:cacheprovider"]))
"""


@pytest.mark.skipif(LANES < 16, reason="the host has no wider registers than these")
@pytest.mark.parametrize(("dropped", "lanes"), [("avx512", "8"), ("avx512,avx2", "4")])
@pytest.mark.parametrize(
    "tests", ["test_values and 21 or ends", pytest.param("not host", marks=pytest.mark.slow)]
)
def test_narrower_registers_of_another_host(tests, dropped, lanes):
    command = [sys.executable, "-c", OTHER_HOST, dropped, lanes, __file__, tests]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d\d passed", run.stdout)


@pytest.mark.parametrize("broken", ["llvmlite absent", "llvmlite that does not know the host"])
def test_a_host_without_the_kernel_keeps_xlas_products(monkeypatch, broken):
    def unknown():
        raise RuntimeError("no features")

    if broken == "llvmlite absent":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
    else:
        monkeypatch.setattr(cpu_kernel.llvm, "get_host_cpu_features", unknown)
    monkeypatch.delitem(sys.modules, cpu_kernel.__name__)
    monkeypatch.delattr(models, "cpu_kernel")
    spec = importlib.util.spec_from_file_location("another_cpu_product", cpu_product.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    x, weights = map(jnp.asarray, arrays(1, 4, 2 * LANES, 4 * LANES, False))
    assert cpu_product.serves(x, weights)
    assert not another.serves(x, weights)
