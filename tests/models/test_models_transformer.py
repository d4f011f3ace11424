"""The transformer: caches, masks, causality, and one layer recomputed in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from distillspec_jax.models import cache as caches
from distillspec_jax.models import layers, transformer
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import NEG_INF, relative_buckets
from distillspec_jax.models.transformer import Transformer

# different primes, so that no transposed axis hides
B, S, T = 3, 7, 11
BASE = ModelConfig(
    name="tiny",
    vocab_size=31,
    num_pieces=29,
    d_model=13,
    num_heads=2,
    head_dim=5,
    d_ff=17,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_buckets=8,
    relative_max_distance=10,
)
CONFIGS = {
    "t5_1_1": BASE,
    "t5_1_0": dataclasses.replace(BASE, gated=False, activation="relu", tie_embeddings=True),
    "decoder_only": dataclasses.replace(BASE, num_encoder_layers=0),
}


@pytest.fixture(params=sorted(CONFIGS))
def tiny(request):
    model = Transformer(CONFIGS[request.param])
    params = transformer.init_params(model, jax.random.key(3))
    rng = np.random.default_rng(5)
    inputs = rng.integers(2, 29, (B, S))
    inputs[1, 4:] = 0
    targets = rng.integers(2, 29, (B, T))
    return model, params, jnp.asarray(inputs), jnp.asarray(targets)


def feed_in_blocks(model, params, inputs, targets, blocks):
    cache, pending = transformer.start(model, params, inputs, T)
    tokens = jnp.concatenate([pending[:, None], targets[:, :-1]], axis=1)
    logits, first = [], 0
    for width in blocks:
        block, cache = transformer.extend(model, params, cache, tokens[:, first : first + width])
        logits.append(block)
        first += width
    return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("blocks", [(1,) * T, (T,), (5, 1, 2, 3)])
def test_cached_blocks_equal_one_forward_pass(tiny, blocks):
    model, params, inputs, targets = tiny
    logits, _ = feed_in_blocks(model, params, inputs, targets, blocks)
    expected = transformer.score(model, params, inputs, targets)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_rows_advance_apart_and_rolled_back_tokens_leave_nothing(tiny):
    model, params, inputs, targets = tiny
    expected = transformer.score(model, params, inputs, targets)
    cache, pending = transformer.start(model, params, inputs, T + 6)
    begin = cache.lengths
    tokens = jnp.concatenate([pending[:, None], targets], axis=1)
    wrong = jnp.full((B, 6), 3)
    kept = jnp.asarray([2, 0, 5])  # each row keeps another number of its first tokens
    first = jnp.where(jnp.arange(6)[None] < kept[:, None], tokens[:, :6], wrong)
    _, cache = transformer.extend(model, params, cache, first)
    cache = caches.rollback(cache, begin + kept)
    columns = kept[:, None] + jnp.arange(4)[None]
    block = jnp.take_along_axis(tokens, columns, axis=1)
    logits, cache = transformer.extend(model, params, cache, block)
    rows = jnp.take_along_axis(expected, columns[..., None], axis=1)
    np.testing.assert_allclose(logits, rows, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, begin + kept + 4)


def test_a_row_of_padding_alone_begins_empty(tiny):
    """As a slot that no prompt fills; kernels read at least one line of each row's cache."""
    model, params, inputs, _ = tiny
    cache, pending = transformer.start(model, params, inputs.at[0].set(0), T)
    read = [0] * B if model.config.is_encoder_decoder else [0, 4 - 1, S - 1]
    assert cache.lengths.tolist() == read
    assert pending[0] == 0


def test_nan_past_the_length_changes_nothing(tiny):
    model, params, inputs, targets = tiny
    cache, pending = transformer.start(model, params, inputs, T)
    tokens = jnp.concatenate([pending[:, None], targets[:, :3]], axis=1)
    _, cache = transformer.extend(model, params, cache, tokens)
    clean, _ = transformer.extend(model, params, cache, targets[:, 3:5])
    stale = jnp.arange(cache.room)[None] >= cache.lengths[:, None]

    def poison(layers):
        return tuple(jnp.where(stale[:, None, :, None], jnp.nan, layer) for layer in layers)

    poisoned = cache.replace(keys=poison(cache.keys), values=poison(cache.values))
    logits, _ = transformer.extend(model, params, poisoned, targets[:, 3:5])
    np.testing.assert_array_equal(logits, clean)


def test_feed_fills_the_cache_as_extend_does(tiny):
    model, params, inputs, targets = tiny
    cache, _ = transformer.start(model, params, inputs, T)
    _, extended = transformer.extend(model, params, cache, targets[:, :3])
    fed = transformer.feed(model, params, cache, targets[:, :3])
    jax.tree.map(np.testing.assert_array_equal, fed, extended)


def test_padding_of_the_source_changes_nothing(tiny):
    model, params, inputs, targets = tiny
    wider = jnp.pad(inputs, ((0, 0), (0, 5)))
    expected = transformer.score(model, params, inputs, targets)
    np.testing.assert_allclose(
        transformer.score(model, params, wider, targets), expected, atol=2e-5
    )
    alone = transformer.score(model, params, inputs[1:2, :4], targets[1:2])
    np.testing.assert_allclose(alone, expected[1:2], atol=2e-5)


def test_rows_of_the_vocabulary_without_a_piece_are_never_likely(tiny):
    model, params, inputs, targets = tiny
    logits = transformer.score(model, params, inputs, targets)
    assert logits.shape == (B, T, 31)
    assert logits.dtype == jnp.float32
    assert (logits[..., 29:] == NEG_INF).all()
    assert (logits[..., :29] > NEG_INF / 2).all()


def test_no_logit_depends_on_a_later_token(tiny):
    """Gradients that must be exactly zero: position t sees targets before t only."""
    model, params, inputs, targets = tiny

    def logit_sum(offset, position):
        class Shifted(Transformer):
            def embed(self, tokens):
                shift = offset if tokens.shape == offset.shape[:2] else 0
                return self.embedding[tokens] + shift

        shifted = Shifted(model.config)
        return transformer.score(shifted, params, inputs, targets)[:, position].sum()

    length = T if model.config.is_encoder_decoder else S + T
    offset = jnp.zeros((B, length, model.config.d_model))
    gradient = jax.grad(logit_sum)(offset, 4)
    reached = np.flatnonzero(np.abs(np.asarray(gradient)[0]).sum(-1))
    # row 0 has a full source: its last prompt token (or the start token) predicts targets[:, 0]
    first = 0 if model.config.is_encoder_decoder else S - 1
    assert reached.max() == first + 4
    assert reached.min() == 0


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_fresh_weights_have_the_laws_of_their_layers_and_no_two_the_same_numbers(name):
    config = dataclasses.replace(CONFIGS[name], d_ff=31)  # `wo` has the shape of the embedding
    model, tokens = Transformer(config), jnp.ones((1, 2), jnp.int32)
    found = transformer.init_params(model, jax.random.key(3))
    known = nn.unbox(jax.jit(model.init)(jax.random.key(4), tokens, tokens)["params"])
    assert jax.tree.structure(found) == jax.tree.structure(known)
    numbers = []
    for (path, weight), like in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(known), strict=True
    ):
        assert weight.shape == like.shape
        assert weight.dtype == like.dtype == jnp.float32
        if "scale" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(weight, like)
        else:
            np.testing.assert_allclose(jnp.std(weight), jnp.std(like), rtol=6 / like.size**0.5)
            numbers.append(np.ravel(weight / jnp.std(weight))[:8])
    together = np.abs(np.corrcoef(numbers)) - np.eye(len(numbers))
    assert len(numbers) >= 15
    assert together.max() < 0.999
    assert not np.allclose(
        found["embedding"], transformer.init_params(model, jax.random.key(4))["embedding"]
    )


def test_layers_share_the_generators_of_their_weights():
    """XLA takes seconds to compile one, for a GPU above all; each is a loop over its weights."""

    def loops(depth):
        config = dataclasses.replace(BASE, num_encoder_layers=depth, num_decoder_layers=depth)
        lowered = transformer.init_params.lower(Transformer(config), jax.random.key(0))
        return lowered.as_text().count("stablehlo.while")

    assert loops(2) == loops(5) > 5


def test_tied_embeddings_are_one_leaf_and_untied_are_two():
    for name, has_head in (("t5_1_0", False), ("t5_1_1", True)):
        model = Transformer(CONFIGS[name])
        params = transformer.init_params(model, jax.random.key(0))
        assert ("head" in params) == has_head


def test_dropout_needs_its_key_and_changes_the_scores():
    model = Transformer(dataclasses.replace(BASE, dropout_rate=0.5))
    params = transformer.init_params(model, jax.random.key(3))
    inputs, targets = jnp.full((1, 3), 5), jnp.full((1, 2), 7)
    plain = transformer.score(model, params, inputs, targets)
    dropped = transformer.score(model, params, inputs, targets, dropout_rng=jax.random.key(1))
    again = transformer.score(model, params, inputs, targets, dropout_rng=jax.random.key(1))
    assert jnp.abs(plain - dropped)[..., :29].max() > 0.1
    np.testing.assert_array_equal(dropped, again)


@pytest.mark.parametrize("encoder_layers", [2, 0], ids=["encoder-decoder", "decoder-only"])
def test_dropout_falls_on_both_ends_of_a_stack_on_each_branch_and_inside_the_mlp(
    encoder_layers, equations
):
    config = dataclasses.replace(
        BASE, dropout_rate=0.1, num_encoder_layers=encoder_layers, num_decoder_layers=3
    )
    model = Transformer(config)
    params = transformer.init_params(model, jax.random.key(3))
    tokens = jnp.full((1, 3), 5)

    def score(rng):
        return transformer.score(model, params, tokens, tokens, dropout_rng=rng)

    traced = equations(jax.make_jaxpr(score)(jax.random.key(1)))
    drawn = [each.outvars[0].aval.shape for each in traced if "bits" in each.primitive.name]
    ends, branches = 2, 2 + bool(encoder_layers)  # of the decoder
    expected = ends + 3 * (branches + 1)
    if encoder_layers:
        expected += ends + 2 * (2 + 1)
    assert len(drawn) == expected
    assert sum(shape[-1] == config.d_ff for shape in drawn) == encoder_layers + 3


def naive_bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    share = np.log(distance / exact) / np.log(max_distance / exact)
    return offset + min(exact + int(share * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (32, 100)])
def test_relative_buckets(bidirectional, num_buckets, max_distance):
    settings = {
        "num_buckets": num_buckets,
        "max_distance": max_distance,
        "bidirectional": bidirectional,
    }
    distances = np.arange(-150, 150)
    expected = [naive_bucket(int(d), **settings) for d in distances]
    np.testing.assert_array_equal(relative_buckets(distances, **settings), expected)


def test_a_decoder_layer_in_plain_numpy(tiny):
    model, params, inputs, targets = tiny
    if model.config.is_encoder_decoder:
        pytest.skip("the plain layer below has no cross-attention")
    c = model.config
    shallow = Transformer(dataclasses.replace(c, num_decoder_layers=1))
    layer = jax.tree.map(np.asarray, params["decoder"]["layers_0"])

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.layer_norm_epsilon) * scale

    row = np.concatenate([np.asarray(inputs)[0], np.asarray(targets)[0]])
    x = np.asarray(params["embedding"])[row]
    normed = norm(x, layer["self_attention_norm"]["scale"])
    context = np.zeros((len(row), c.num_heads, c.head_dim))
    table = np.asarray(params["decoder"]["relative_bias"]["embedding"])
    for n in range(c.num_heads):
        q, k, v = (normed @ layer["self_attention"]["qkv"][:, i, n] for i in range(3))
        for t in range(len(row)):
            bias = [table[n, naive_bucket(s - t, 8, 10, False)] for s in range(t + 1)]
            weights = np.exp(k[: t + 1] @ q[t] + np.array(bias))
            context[t, n] = weights / weights.sum() @ v[: t + 1]
    x = x + np.einsum("tnh,nhd->td", context, layer["self_attention"]["out"])
    normed = norm(x, layer["mlp_norm"]["scale"])
    gates = np.einsum("td,dcf->tcf", normed, layer["mlp"]["wi"])
    hidden = np.asarray(jax.nn.gelu(gates[:, 0], approximate=True)) * gates[:, 1]
    x = norm(x + hidden @ layer["mlp"]["wo"], np.asarray(params["decoder"]["final_norm"]["scale"]))
    expected = x[S - 1 : S + T - 1] @ np.asarray(params["head"])
    logits = transformer.score(shallow, params, inputs[:1], targets[:1])[0]
    np.testing.assert_allclose(logits[:, :29], expected[:, :29], atol=1e-4)


def test_gradients_of_fused_kernels_are_not_turned_round():
    """Turned round they are read across by the optimiser: 8 ns a weight on a CPU."""
    x, kernel = jnp.ones((8, 64, 48)), jnp.ones((48, 3, 4, 16))

    def updated(kernel, x, average):
        grads = jax.grad(lambda kernel: jnp.sum(jnp.sin(layers.multiply(x, kernel))))(kernel)
        return kernel - 0.1 * (0.9 * average + grads)

    compiled = jax.jit(updated).lower(kernel, x, kernel).compile().as_text()
    assert " dot(" in compiled or "__ynn_fusion" in compiled
    assert " transpose(" not in compiled


@pytest.mark.parametrize("transposed", [False, True])
def test_a_single_row_takes_zeros_along_on_a_gpu(monkeypatch, transposed):
    """Of 8 rows XLA makes a product there, of one a sum; several rows come as they are."""
    shapes = []
    tensordot = jnp.tensordot

    def watched(rows, *arguments, **named):
        shapes.append(rows.shape)
        return tensordot(rows, *arguments, **named)

    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(7, 3) if transposed else (3, 7)).astype(np.float32)
    expected = kernel.T if transposed else kernel
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jnp, "tensordot", watched)
    for shape in ((1, 1, 3), (1, 2, 3), (2, 1, 3)):
        x = rng.normal(size=shape).astype(np.float32)
        y = layers.multiply(jnp.asarray(x), jnp.asarray(kernel), transposed)
        np.testing.assert_allclose(y, x @ expected, rtol=1e-5, atol=1e-6)
    assert shapes == [(8, 3), (2, 3), (2, 3)]
