"""Who writes: Algorithm 1's frequencies, each source's own tokens, and what keys them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.distill import data_sources, recipes
from distillspec_jax.models.transformer import Transformer, hidden_states, score

LENGTH = 5  # of rollouts; the references have 7 columns
SEED = jnp.uint32(17)
EOS = 1
compiled = jax.jit(generate, static_argnums=0, static_argnames=("sampling", "max_new_tokens"))


def make_write(pair, recipe):
    write = data_sources.make_source(pair.draft, pair.target, recipe, rollout_length=LENGTH)
    return jax.jit(write)


def sample(model, params, batch, step, temperature=1.0) -> np.ndarray:
    """What `generate` alone writes for the examples of a step: [B, LENGTH]."""
    settings = {"sampling": Sampling(temperature=temperature), "max_new_tokens": LENGTH}
    key = data_sources.step_key(SEED, "rollout", step)
    output = compiled(model, params, batch.inputs, key, row_ids=batch.example_ids, **settings)
    return np.asarray(output.tokens)


def drawn(recipe, steps=4001) -> np.ndarray:
    """How often each of SOURCES came in many steps."""
    keys = jax.vmap(lambda step: data_sources.step_key(SEED, "source", step))(jnp.arange(steps))
    indices = jax.jit(jax.vmap(lambda key: data_sources.draw_source(key, recipe)))(keys)
    return np.bincount(indices, minlength=3) / steps


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.3, 0.6), (0.5, 0.9)])
def test_frequencies_of_algorithm_1(lambda1, lambda2):
    recipe = recipes.named("distillspec", lambda1=lambda1, lambda2=lambda2)
    expected = [lambda1, (1 - lambda1) * lambda2, (1 - lambda1) * (1 - lambda2)]
    assert list(data_sources.source_probabilities(recipe).values()) == pytest.approx(expected)
    deviation = np.sqrt(np.array(expected) * (1 - np.array(expected)) / 4001)
    assert np.all(np.abs(drawn(recipe) - expected) < 4 * deviation)


@pytest.mark.parametrize(
    ("name", "only"), [("sft", "fixed"), ("gkd", "draft"), ("seqkd", "teacher")]
)
def test_a_source_of_probability_one_always_comes(name, only):
    frequency = dict(zip(data_sources.SOURCES, drawn(recipes.named(name)), strict=True))
    assert frequency[only] == 1.0


def test_every_source_writes_its_own_tokens(pairs, batch):
    pair = pairs["encoder-decoder"]
    write = make_write(pair, recipes.named("distillspec", lambda1=0.4, lambda2=0.5))
    seen = set()
    for step in range(9):
        (tokens, _), source = write(pair.draft_params, pair.target_params, batch, SEED, step)
        name = data_sources.SOURCES[int(source)]
        seen.add(name)
        texts = {
            "draft": sample(pair.draft, pair.draft_params, batch, step),
            "teacher": sample(pair.target, pair.target_params, batch, step),
        }
        texts = {key: np.pad(text, ((0, 0), (0, 2))) for key, text in texts.items()}
        texts["fixed"] = batch.targets
        same = [key for key, text in texts.items() if np.array_equal(text, tokens)]
        assert same == [name]
    assert seen == set(data_sources.SOURCES)


def test_shorter_texts_are_filled_up_with_the_padding_s_id(pairs, batch):
    """Another id would be learnt as a token."""
    pair, pad_id = pairs["encoder-decoder"], 5
    padded = [
        Transformer(dataclasses.replace(model.config, pad_id=pad_id))
        for model in (pair.draft, pair.target)
    ]
    recipe = recipes.named("distillspec", lambda1=0.5)
    write = jax.jit(data_sources.make_source(*padded, recipe, rollout_length=LENGTH))
    written = {}
    for step in range(9):
        (tokens, _), source = write(pair.draft_params, pair.target_params, batch, SEED, step)
        written[data_sources.SOURCES[int(source)]] = np.asarray(tokens)
    assert {"fixed", "draft"} == set(written)
    assert written["draft"].shape == batch.targets.shape
    assert (written["draft"][:, LENGTH:] == pad_id).all()


def test_what_cannot_come_is_not_even_traced(pair, batch):
    """Without its weights a model cannot write: nobody asked it to."""

    def width(name, draft_params, target_params):
        recipe = recipes.named(name)
        write = data_sources.make_source(pair.draft, pair.target, recipe, rollout_length=LENGTH)
        return jax.eval_shape(write, draft_params, target_params, batch, SEED, 0)[0][0].shape[1]

    assert width("sft", None, None) == 7
    assert width("gkd", pair.draft_params, None) == LENGTH
    assert width("seqkd", None, pair.target_params) == LENGTH
    assert width("imitkd", pair.draft_params, None) == 7


def test_a_text_belongs_to_its_example_and_step(pairs, batch):
    pair = pairs["decoder-only"]
    write = make_write(pair, recipes.named("gkd"))

    def tokens(batch, step=3, seed=SEED):
        return np.asarray(write(pair.draft_params, None, batch, seed, step)[0][0])

    order = np.array([4, 2, 0, 5, 1, 3])
    texts, shuffled = tokens(batch), jax.tree.map(lambda x: x[order], batch)
    np.testing.assert_array_equal(tokens(shuffled), texts[order])
    np.testing.assert_array_equal(tokens(batch), texts)
    assert not np.array_equal(tokens(batch, step=4), texts)
    assert not np.array_equal(tokens(batch, seed=jnp.uint32(18)), texts)
    padding = batch.replace(example_ids=np.where(np.arange(6) == 2, -1, batch.example_ids))
    rest = np.arange(6) != 2
    np.testing.assert_array_equal(tokens(padding)[rest], texts[rest])
    assert np.all(tokens(padding)[2] == 0)


def test_greedy_rollouts_and_a_teacher_helped_by_the_draft(pair, batch):
    recipe = recipes.named("seqkd", rollout_temperature=0.0, teacher_gamma=3)
    (tokens, _), _ = make_write(pair, recipe)(pair.draft_params, pair.target_params, batch, SEED, 0)
    greedy = sample(pair.target, pair.target_params, batch, 0, temperature=0.0)
    np.testing.assert_array_equal(tokens, greedy)
    draft_greedy = sample(pair.draft, pair.draft_params, batch, 0, temperature=0.0)
    assert not np.array_equal(tokens, draft_greedy)


def test_text_of_any_source_comes_with_the_targets_states(pairs, batch):
    pair = pairs["decoder-only"]
    mixed = {"lambda1": 0.4, "lambda2": 0.5, "teacher_gamma": 2}
    write = make_write(pair, recipes.named("distillspec", **mixed))
    seen = set()
    for step in range(9):
        text, source = write(pair.draft_params, pair.target_params, batch, SEED, step)
        seen.add(int(source))
        tokens, hidden = map(np.asarray, text)
        expected = hidden_states(pair.target, pair.target_params, batch.inputs, tokens)
        real = tokens != 0
        np.testing.assert_allclose(hidden[real], expected[real], rtol=1e-4, atol=1e-5)
    assert seen == {0, 1, 2}
    for recipe in ({"loss": "nll", **mixed}, {**mixed, "teacher_gamma": 0}, {"teacher_gamma": 2}):
        assert not recipes.named("distillspec", **recipe).keeps_target_hidden


def test_interleaved_greedy_is_one_model_or_the_other_at_the_ends(pair, batch):
    for top_k, model, params in (
        (1, pair.target, pair.target_params),
        (99, pair.draft, pair.draft_params),
    ):
        recipe = recipes.named("skd", rollout_temperature=0.0, interleave_top_k=top_k)
        write = make_write(pair, recipe)
        (tokens, _), _ = write(pair.draft_params, pair.target_params, batch, SEED, 0)
        expected = sample(model, params, batch, 0, temperature=0.0)
        np.testing.assert_array_equal(tokens, expected)


def mixed_law(target_logits: np.ndarray, draft_logits: np.ndarray, top_k: int) -> np.ndarray:
    """q(v) 1[v in top] + q(not in top) p(v), per row."""
    p, q = (
        np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True))
        for z in (target_logits.astype(float), draft_logits.astype(float))
    )
    top = p >= np.sort(p, -1)[:, -top_k, None]
    return q * top + np.sum(q * ~top, -1, keepdims=True) * p


def test_interleaved_has_the_law_of_its_definition(pairs, batch):
    """4,003 texts of two tokens for one prompt against the enumerated probabilities."""
    pair, pieces, top_k, count = pairs["encoder-decoder"], 11, 4, 4003
    prompt = batch.inputs[:1]
    run = functools.partial(
        data_sources.interleaved, pair.draft, top_k=top_k, sampling=Sampling(), max_new_tokens=2
    )
    tokens = jax.jit(run, static_argnums=1)(
        pair.draft_params,
        pair.target,
        pair.target_params,
        np.repeat(prompt, count, 0),
        jax.random.key(23),
        row_ids=jnp.arange(count),
    )
    first, second = np.asarray(tokens).T
    assert np.all(second[first == EOS] == 0)  # nothing after the end

    texts = np.stack([np.arange(pieces), np.full(pieces, 2)], 1).astype(np.int32)
    prompts = np.repeat(prompt, pieces, 0)
    target_logits = np.asarray(score(pair.target, pair.target_params, prompts, texts))
    draft_logits = np.asarray(score(pair.draft, pair.draft_params, prompts, texts))[..., :pieces]
    first_law = mixed_law(target_logits[:1, 0], draft_logits[:1, 0], top_k)[0]
    second_law = mixed_law(target_logits[:, 1], draft_logits[:, 1], top_k)
    law = first_law[:, None] * second_law
    law[EOS] = np.where(np.arange(pieces) == 0, first_law[EOS], 0)
    counts = np.zeros_like(law)
    np.add.at(counts, (first, second), 1)
    expected = law * count
    common = expected > 5
    statistic = np.sum((counts - expected)[common] ** 2 / expected[common])
    freedom = np.sum(common)
    assert freedom > 40
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert np.sum(counts[~common]) == pytest.approx(np.sum(expected[~common]), rel=0.2, abs=20)
