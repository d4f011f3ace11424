"""Drafts cut from targets: what is dead goes first, and cutting it changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.interop.slim import slim
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import score

D, N, H, F, V = 14, 5, 3, 11, 23


@pytest.fixture
def make(random_model):
    return functools.partial(scaled, random_model)


def scaled(random_model, tied=True, encoder=3, decoder=4, **fields):
    config = ModelConfig(
        name="whole",
        vocab_size=V,
        d_model=D,
        num_heads=N,
        head_dim=H,
        d_ff=F,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        tie_embeddings=tied,
        layer_norm_epsilon=1e-12,
        **fields,
    )
    model, params = random_model(config)
    return model, jax.tree.map(lambda x: 0.4 * x, params)


def zeroed(params, dead):
    """The parameters with `dead(path, axis names)` entries set to zero."""

    def change(path, leaf):
        names = tuple(key.key for key in path)
        axes = {"out": "ohd", "wo": "fd", "qkv": "dcoh", "query": "dcoh", "key_value": "dcoh"}
        axes |= {"wi": "dcf", "embedding": "vd", "head": "dv", "scale": "d"}
        letters = "ob" if "relative_bias" in names else axes[names[-1]]
        for letter, indices in dead.items():
            if letter in letters and not (letter == "o" and letters == "ob"):
                at = [slice(None)] * leaf.ndim
                at[letters.index(letter)] = jnp.asarray(indices)
                leaf = leaf.at[tuple(at)].set(0.0)
        return leaf

    return jax.tree_util.tree_map_with_path(change, params)


def logits(model, params):
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(2, V, (2, 9)), rng.integers(2, V, (2, 7))
    return jax.jit(functools.partial(score, model))(params, inputs, targets)


def assert_same_function(whole, small):
    np.testing.assert_allclose(logits(*small), logits(*whole), rtol=2e-5, atol=2e-5)


def test_keeping_everything_keeps_every_bit(make):
    model, params = make()
    same, same_params = slim(model, params, name="whole")
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, same_params)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("encoder", [3, 0])
def test_dead_heads_and_units_go_first_and_change_nothing(make, encoder, gated):
    model, params = make(encoder=encoder, gated=gated)
    params = zeroed(params, {"o": [1, 3], "f": [0, 4, 5]})
    small = slim(model, params, name="small", num_heads=N - 2, d_ff=F - 3)
    assert (small[0].config.num_heads, small[0].config.d_ff) == (3, 8)
    assert_same_function((model, params), small)
    smaller = slim(model, params, name="small", num_heads=N - 3, d_ff=F - 3)
    assert np.abs(logits(*smaller) - logits(model, params)).max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_positions_that_are_always_zero_go_first_and_change_nothing(make, tied):
    model, params = make(tied)
    params = zeroed(params, {"d": [2, 3, 7, 13]})
    small = slim(model, params, name="small", d_model=D - 4)
    assert_same_function((model, params), small)


def test_layers_are_those_that_were_chosen(make):
    model, params = make()
    small, cut = slim(model, params, name="s", encoder_layers=[1], decoder_layers=[0, 3])
    assert (small.config.num_encoder_layers, small.config.num_decoder_layers) == (1, 2)
    wanted = {("encoder", 0): 1, ("decoder", 0): 0, ("decoder", 1): 3}
    for (stack, now), before in wanted.items():
        ours, theirs = cut[stack][f"layers_{now}"], params[stack][f"layers_{before}"]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(cut["embedding"], params["embedding"])
    logits(small, cut)


def test_a_layer_named_again_computes_the_same_and_learns(make):
    model, params = make()
    deeper, new = slim(
        model, params, name="x", encoder_layers=[0, 0, 1, 2], decoder_layers=[0, 1, 1, 2, 3, 3]
    )
    assert (deeper.config.num_encoder_layers, deeper.config.num_decoder_layers) == (4, 6)
    np.testing.assert_allclose(logits(deeper, new), logits(model, params), rtol=1e-5, atol=1e-5)
    tokens = jnp.asarray([[3, 4, 5, 6]])
    grads = jax.grad(lambda p: jnp.sum(score(deeper, p, tokens, tokens)[..., 7]))(new)
    for leaf in ("self_attention", "out"), ("cross_attention", "out"), ("mlp", "wo"):
        copy = functools.reduce(dict.__getitem__, leaf, new["decoder"]["layers_2"])
        slope = functools.reduce(dict.__getitem__, leaf, grads["decoder"]["layers_2"])
        assert not np.any(copy)
        assert np.any(slope)


def test_heads_of_a_stack_stay_with_their_relative_biases(make):
    model, params = make()
    params = zeroed(params, {"o": [0, 2]})
    _, cut = slim(model, params, name="s", num_heads=3)
    for stack in ("encoder", "decoder"):
        found = cut[stack]["relative_bias"]["embedding"]
        np.testing.assert_array_equal(
            found, params[stack]["relative_bias"]["embedding"][jnp.asarray([1, 3, 4])]
        )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"decoder_layers": [4]}, r"decoder_layers \[4\] must be numbers in order within 0 and 3"),
        ({"encoder_layers": [2, 0]}, "must be numbers in order"),
        ({"encoder_layers": []}, "encoder_layers is empty"),
        ({"d_model": 15}, "d_model 15 must be within 1 and the model's 14"),
        ({"num_heads": 0}, "num_heads 0 must be within"),
        ({"d_ff": -1}, "d_ff -1 must be within"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, asked, message):
    model, params = make()
    with pytest.raises(UserError, match=message):
        slim(model, params, name="s", **asked)
