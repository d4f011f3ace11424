"""bfloat16: what is rounded and where, and what loops and gradients read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax.data.batch import Batch
from distillspec_jax.decoding import slots
from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculate
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.distill.data_sources import interleaved
from distillspec_jax.distill.recipes import named
from distillspec_jax.distill.step import make_update
from distillspec_jax.evaluation import latency
from distillspec_jax.models import layers, transformer
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.training.state import TrainState

HALF = ModelConfig(
    name="half",
    vocab_size=31,
    num_pieces=29,
    d_model=13,
    num_heads=2,
    head_dim=5,
    d_ff=17,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dtype="bfloat16",
)
KINDS = {
    "encoder-decoder": HALF,
    "decoder-only, tied": dataclasses.replace(HALF, num_encoder_layers=0, tie_embeddings=True),
}
INPUTS = np.array([[3, 6, 2, 9], [5, 4, 0, 0]], np.int32)
MOVES = ("reshape", "transpose", "slice", "squeeze", "broadcast_in_dim", "select_n", "concatenate")
MOVES += ("dynamic_update_slice", "scatter", "gather")


@pytest.fixture(params=KINDS)
def model(request):
    return Transformer(KINDS[request.param])


@pytest.fixture
def params(model):
    return transformer.init_params(model, jax.random.key(3))


def is_narrowing(equation) -> bool:
    return (
        equation.primitive.name == "convert_element_type"
        and equation.invars[0].aval.dtype == jnp.float32
        and equation.outvars[0].aval.dtype == jnp.bfloat16
    )


def count_narrowed(found, shapes) -> int:
    return sum(is_narrowing(e) and e.invars[0].aval.shape in shapes for e in found)


def taken_back(jaxpr, of_inputs) -> tuple[list[bool], int]:
    """Whether each output was just rounded to bfloat16, and how often that is reckoned with.

    Of each input it is given; a value that is only moved stays one that was rounded.
    """
    rounded, count = dict(zip(jaxpr.invars, of_inputs, strict=True)), 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        read = [not hasattr(v, "val") and rounded.get(v, False) for v in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner:
            outputs, found = taken_back(inner.jaxpr, read)
        else:
            rounds = name not in MOVES or any(read)
            outputs = [rounds and v.aval.dtype == jnp.bfloat16 for v in equation.outvars]
            found = any(read) and name not in (*MOVES, "dot_general")
        rounded |= dict(zip(equation.outvars, outputs, strict=True))
        count += found
    return [not hasattr(v, "val") and rounded[v] for v in jaxpr.outvars], count


def test_a_step_rounds_only_what_products_and_caches_read(model, params):
    """A compiler may leave out a rounding that is taken back, in one program and not in another."""
    params = transformer.in_compute_dtype(model, params)
    cache, _ = transformer.start(model, params, INPUTS, 8)
    counts = {}
    for name, *arguments in ("extend", cache, INPUTS[:, :2]), ("score", INPUTS, INPUTS):
        function = functools.partial(getattr(transformer, name), model, params)
        traced = jax.make_jaxpr(function)(*arguments).jaxpr
        counts[name] = taken_back(traced, [False] * len(traced.invars))[1]
    assert counts["score"] >= 2 * 2  # before all norms but the first: what `extend` avoids
    assert counts["extend"] == 0


def test_products_of_a_gradient_read_bfloat16(model, params, equations):
    targets = np.ones((2, 3), np.int32)

    def loss(params):
        return jnp.sum(jnp.sin(transformer.score(model, params, INPUTS, targets)))

    read = [
        {v.aval.dtype.name for v in equation.invars}
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(params))
        if equation.primitive.name == "dot_general"
    ]
    assert len(read) > 3 * 2 * 4
    assert all(dtypes == {"bfloat16"} for dtypes in read)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_through_a_wider_product(transposed):
    rng = np.random.default_rng(5)
    x, kernel = rng.normal(size=(3, 2, 8)), rng.normal(size=(7, 8) if transposed else (8, 7))
    weights = jnp.asarray(rng.normal(size=(3, 2, 7)), jnp.float32)

    def loss(multiply, x, kernel):
        return jnp.sum(weights * jnp.sin(multiply(x, kernel)))

    def in_float32(x, kernel):
        return x @ (kernel.T if transposed else kernel)

    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    ours = functools.partial(layers.multiply, transposed=transposed, dtype=jnp.float32)
    assert ours(x, kernel).dtype == jnp.float32
    grads = jax.grad(functools.partial(loss, ours), argnums=(0, 1))(x, kernel)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    expected = jax.grad(functools.partial(loss, in_float32), argnums=(0, 1))(*wide)
    for grad, wide_grad in zip(grads, expected, strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(grad.astype(jnp.float32), wide_grad, rtol=0.02, atol=0.02)


def test_weights_are_narrowed_but_for_what_is_read_in_float32(model, params):
    narrow = dict(jax.tree.leaves_with_path(transformer.in_compute_dtype(model, params)))
    for path, leaf in jax.tree.leaves_with_path(params):
        wide = "scale" in jax.tree_util.keystr(path) or "bias" in jax.tree_util.keystr(path)
        assert narrow[path].dtype == (jnp.float32 if wide else jnp.bfloat16)
        np.testing.assert_array_equal(narrow[path], leaf.astype(narrow[path].dtype))
    scores = [
        transformer.score(model, weights, INPUTS, INPUTS)
        for weights in (params, transformer.in_compute_dtype(model, params))
    ]
    np.testing.assert_array_equal(*scores)
    single = Transformer(dataclasses.replace(model.config, dtype="float32"))
    for stored in (params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)):
        kept = transformer.in_compute_dtype(single, stored)
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (kept, stored)), strict=True))


def test_held_weights_are_those_that_products_read(model, params):
    given = jax.tree.map(jnp.copy, params)
    held = transformer.hold_in_compute_dtype(model, given)
    expected = transformer.in_compute_dtype(model, params)
    for (path, leaf), like, old in zip(
        jax.tree.leaves_with_path(held), *map(jax.tree.leaves, (expected, given)), strict=True
    ):
        assert leaf.dtype == like.dtype, path
        np.testing.assert_array_equal(leaf, like)
        assert old.is_deleted() == (leaf is not old) == (leaf.dtype == jnp.bfloat16), path


def plain(model, params):
    return generate(model, params, INPUTS, jax.random.key(0), max_new_tokens=5)


def drafted(model, params):
    speculation = Speculation(model, model, gamma=2, max_new_tokens=5)
    return speculate(speculation, params, params, INPUTS, jax.random.key(0))


def in_slots(model, params):
    speculation = Speculation(model, model, gamma=2, max_new_tokens=5)
    rows = jnp.arange(2)
    state = slots._begin(speculation, params, params, INPUTS, jax.random.key(0), rows)
    return slots._run(speculation, params, params, state, jnp.int32(1))


def in_turns(model, params):
    settings = {"sampling": Sampling(), "max_new_tokens": 5, "row_ids": jnp.arange(2)}
    return interleaved(model, params, model, params, INPUTS, jax.random.key(0), **settings)


def timed(model, params):
    cache, pending = transformer.start(model, params, INPUTS, 9)
    return latency._steps(model, params, cache, pending, 2, 3)


def test_a_step_narrows_a_frozen_model_once(model, params, equations):
    draft = Transformer(dataclasses.replace(model.config, d_model=11, d_ff=7))
    rule = optax.sgd(0.1)
    state = TrainState.create(transformer.init_params(draft, jax.random.key(1)), rule, seed=0)
    batch = Batch(INPUTS, INPUTS, np.arange(2, dtype=np.int32))
    update = make_update(draft, model, named("supkd"), rule, chunk=3, micro_batches=2)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    shapes -= {leaf.shape for leaf in jax.tree.leaves(state.params)}
    everything = list(equations(jax.make_jaxpr(update)(state, params, batch)))
    loops = [e for e in everything if e.primitive.name in ("while", "scan")]
    assert len(loops) >= 2
    assert count_narrowed(everything, shapes) >= len(shapes) - 1  # biases by distance stay
    assert all(count_narrowed(equations(loop.params), shapes) == 0 for loop in loops)


@pytest.mark.parametrize("decode", [plain, drafted, in_slots, in_turns, timed])
def test_no_loop_narrows_weights(model, params, equations, decode):
    """There each token would read them as float32 and write them once more."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    everything = list(equations(jax.make_jaxpr(functools.partial(decode, model))(params)))
    loops = [e for e in everything if e.primitive.name in ("while", "scan")]
    assert loops
    assert count_narrowed(everything, shapes) > len(shapes) / 2
    assert all(count_narrowed(equations(loop.params), shapes) == 0 for loop in loops)
