"""Plain decoding of tiny models of both kinds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding import autoregressive
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.keys import position_uniforms, row_keys
from distillspec_jax.decoding.sampling import Sampling, inverse_cdf, process
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.errors import UserError
from distillspec_jax.models.transformer import score

LIMIT = 11
RNG = jax.random.key(3)
SAMPLING = Sampling(0.8, top_k=6)


def sample(pair, inputs, **settings):
    settings = {"sampling": SAMPLING, "max_new_tokens": LIMIT, **settings}
    out = autoregressive_sample(pair.target, pair.target_params, inputs, RNG, **settings)
    return jax.tree.map(np.asarray, out)


@functools.partial(jax.jit, static_argnums=(0, 4))
def full_forward(model, params, inputs, targets, sampling):
    """The token that each position's uniform picks, teacher-forced."""
    probs = process(score(model, params, inputs, targets), sampling)
    keys = row_keys(RNG, jnp.arange(len(inputs)))
    return inverse_cdf(probs, position_uniforms(keys, LIMIT))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLING], ids=["greedy", "sampled"])
def test_every_token_is_what_the_full_forward_pass_gives(pair, prompts, sampling):
    out = sample(pair, prompts, sampling=sampling)
    arguments = (pair.target, pair.target_params, prompts, out.tokens, sampling)
    is_text = np.arange(LIMIT) < out.lengths[:, None]
    assert (out.tokens == np.asarray(full_forward(*arguments)))[is_text].all()


def test_texts_end_with_their_end_of_sequence(pair, prompts):
    out = sample(pair, prompts)
    tokens, lengths, finished = out.tokens, out.lengths, out.finished
    eos = tokens == pair.target.config.eos_id
    assert (finished == eos.any(axis=1)).all()
    assert finished.any()
    assert not finished.all()
    assert (lengths == np.where(finished, eos.argmax(axis=1) + 1, LIMIT)).all()
    assert (tokens[np.arange(LIMIT) >= lengths[:, None]] == pair.target.config.pad_id).all()


def test_a_row_does_not_depend_on_its_batch(pair, prompts):
    whole = sample(pair, prompts)
    rows = np.array([17, 4, 29])
    padded = np.pad(prompts[rows], ((0, 0), (0, 3)))
    part = sample(pair, padded, row_ids=rows)
    np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
    alone = sample(pair, prompts[4:5, :5], row_ids=np.array([4]))
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[4])


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_row_does_not_depend_on_its_batch_with_keys_of_any_kind(pairs, prompts, impl):
    """Under `vmap` such a key draws by its place in the batch."""
    pair, rng = pairs["decoder-only"], jax.random.key(5, impl=impl)
    settings = {"sampling": SAMPLING, "max_new_tokens": LIMIT}
    rows = np.array([17, 4, 29])
    for draw in (
        lambda inputs, ids: autoregressive_sample(*pair[:2], inputs, rng, row_ids=ids, **settings),
        lambda inputs, ids: speculative_sample(
            *pair, inputs, rng, row_ids=ids, gamma=2, **settings
        ),
    ):
        whole, part = draw(prompts, np.arange(len(prompts))), draw(prompts[rows], rows)
        np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
    words = jax.random.key_data(rng)
    assert words.shape == (4,)
    for word in range(4):
        other = jax.random.wrap_key_data(words.at[word].add(1), impl=impl)
        drawn = [position_uniforms(row_keys(key, jnp.arange(2)), 3) for key in (rng, other)]
        assert np.abs(drawn[0] - drawn[1]).min() > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_ids_of_any_integer_type_are_prompts(pairs, prompts, dtype):
    for pair in pairs.values():
        expected = sample(pair, prompts[:3])
        np.testing.assert_array_equal(
            sample(pair, prompts[:3].astype(dtype)).tokens, expected.tokens
        )
        settings = {"gamma": 2, "max_new_tokens": 3}
        found, wanted = (
            speculative_sample(*pair, prompts[:3].astype(kind), RNG, **settings).tokens
            for kind in (dtype, np.int32)
        )
        np.testing.assert_array_equal(found, wanted)


def test_numbers_of_64_bits_are_refused(pair, prompts):
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is set, and"):
        sample(pair, prompts)


def test_a_longer_limit_continues_the_same_text(pair, prompts):
    short, long = sample(pair, prompts, max_new_tokens=5), sample(pair, prompts)
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :5])


def test_rows_with_a_negative_id_stay_empty(pair, prompts):
    inputs = np.where(np.arange(5)[:, None] == 3, 0, prompts[:5])
    out = sample(pair, inputs, row_ids=np.array([0, 1, 2, -1, 4]))
    assert int(out.lengths[3]) == 0
    assert not out.tokens[3].any()
    np.testing.assert_array_equal(out.tokens[4], sample(pair, prompts).tokens[4])


def test_calls_of_equal_shape_compile_once(pair, prompts):
    before = autoregressive._compiled_generate._cache_size()
    for seed in range(3):
        inputs, ids = np.roll(prompts, seed, axis=0), np.arange(len(prompts)) + seed
        sample(pair, inputs, row_ids=ids, max_new_tokens=7)
    assert autoregressive._compiled_generate._cache_size() == before + 1


def test_a_step_does_not_copy_the_cache(pair, prompts):
    """Each layer's buffers are written in place: their copies would make long texts slow."""
    arguments = (pair.target, pair.target_params, prompts[:1], RNG)
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": LIMIT}
    compiled = autoregressive._compiled_generate.lower(*arguments, **settings).compile().as_text()
    config = pair.target.config
    room = LIMIT if config.is_encoder_decoder else LIMIT + prompts.shape[1]
    buffer = rf"f32\[1,{config.num_heads},{room},{config.head_dim}\]"
    loop, _ = compiled.split("\nENTRY ")
    assert re.search(rf"= {buffer}\S* fusion\(", loop)
    assert not re.search(rf"= {buffer}\S* copy\(", loop)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLING], ids=["greedy", "sampled"])
def test_nan_in_the_weights_is_an_error_at_once(pair, prompts, spoil, sampling):
    broken = pair._replace(target_params=spoil(pair.target_params))
    with pytest.raises(UserError, match="'target' gave NaN logits"):
        sample(broken, prompts, sampling=sampling)


def test_bad_requests_are_refused(pair, prompts):
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        sample(pair, prompts, max_new_tokens=0)
    with pytest.raises(UserError, match=r"max_new_tokens is 2\.0; it must be an integer"):
        sample(pair, prompts, max_new_tokens=2.0)
    with pytest.raises(UserError, match=r"sampling is 1\.0; it must be a Sampling"):
        sample(pair, prompts, sampling=1.0)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (np.array([[3, 4], [0, 0], [0, 0]]), "empty prompt in row 1, 2"),
        (np.array([[3, 4, 0], [0, 3, 4]]), "padding before a token in row 1: right-pad"),
        (np.array([[3, 0, 4], [3, 4, 0]]), "padding before a token in row 0: right-pad"),
        (np.array([[3, 4], [3, 7]]), "id 7 in row 1 is outside 0 <= id < 7"),
        (np.array([[3, -1], [3, 4]]), "id -1 in row 0 is outside"),
        (np.array([[3, 2**32 + 3]]), "id 4294967299 in row 0 is outside"),
        (
            np.array([3, 4, 5]),
            r"shape \(3,\) of int64; expected an integer array \[batch, length\]",
        ),
        (np.zeros((2, 0), np.int32), r"shape \(2, 0\)"),
        (np.array([[3.0, 4.0]]), "of float64"),
        ([[3, 4]], "inputs are a list"),
    ],
)
def test_prompts_that_the_model_would_misread_are_refused(pairs, inputs, named):
    with pytest.raises(UserError, match=named):
        sample(pairs["decoder-only"], inputs)


@pytest.mark.parametrize(
    ("row_ids", "named"),
    [
        (np.arange(2), r"shape \(2,\) of int64; expected one integer for each of the 3 prompts"),
        (np.arange(3)[None], r"shape \(1, 3\)"),
        (np.array([0.0, 1.0, 2.0]), "of float64"),
        (np.array([0, 2**31, 1]), "row id 2147483648 in row 1 is outside"),
    ],
)
def test_row_ids_that_do_not_fit_are_refused(pairs, prompts, row_ids, named):
    with pytest.raises(UserError, match=named):
        sample(pairs["decoder-only"], prompts[:3], row_ids=row_ids)


def test_checks_are_not_for_jitted_functions(pairs, prompts):
    with pytest.raises(UserError, match="inside a jitted function use `generate` or `speculate`"):
        jax.jit(functools.partial(sample, pairs["decoder-only"]))(prompts)


@pytest.mark.parametrize("traced", ["params", "rng", "row_ids"])
def test_a_jitted_caller_is_told_whatever_it_traces(pairs, prompts, traced):
    model, params = pairs["decoder-only"][:2]
    given = {"params": params, "rng": RNG, "row_ids": np.arange(len(prompts))}

    def call(value):
        return autoregressive_sample(
            model, inputs=prompts, max_new_tokens=2, **given | {traced: value}
        )

    with pytest.raises(UserError, match="inside a jitted function use `generate` or `speculate`"):
        jax.jit(call)(given[traced])


@pytest.mark.parametrize(
    "rng",
    [
        *(0, None, np.uint32(3), jax.random.split(RNG)),
        *(np.zeros(shape, np.uint32) for shape in ((2, 2), (3,), (4,), (0,))),
    ],
)
def test_what_is_no_random_key_is_refused(pairs, prompts, rng):
    model, params = pairs["decoder-only"][:2]
    with pytest.raises(UserError, match=r"rng is .*; it must be one key: jax\.random\.key\(seed\)"):
        autoregressive_sample(model, params, prompts, rng, max_new_tokens=2)


def test_a_raw_key_draws_what_its_new_kind_draws(pairs, prompts):
    model, params = pairs["decoder-only"][:2]
    words = jax.random.key_data(RNG)
    with jax.legacy_prng_key("allow"):
        new, raw, numpy = (
            autoregressive_sample(model, params, prompts, rng, max_new_tokens=5).tokens
            for rng in (RNG, words, np.asarray(words))
        )
    np.testing.assert_array_equal(new, raw)
    np.testing.assert_array_equal(new, numpy)
