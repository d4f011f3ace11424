"""Greedy texts of trained models with a draft are those without one, prompt by prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.models.transformer import Transformer, score

GREEDY = Sampling(temperature=0.0)
LIMIT, GAMMA, BATCH = 56, 7, 100
NEAR = 0.05  # of the largest logit: what bfloat16's 8 bits leave uncertain after eleven layers


@pytest.fixture(scope="module")
def pair():
    return zoo.load("stories-target"), zoo.load("stories-draft")


def texts(pair, count, batch_size):
    """inputs, texts without a draft, texts with one: [count, ...] each."""
    (target, target_params), (draft, draft_params) = pair
    task, rng = load_task(TaskConfig()), jax.random.key(0)
    settings = {"sampling": GREEDY, "max_new_tokens": LIMIT}
    columns = []
    for batch in task.eval_batches("test", batch_size=batch_size, count=count):
        inputs = jnp.asarray(batch.inputs)
        plain = autoregressive_sample(target, target_params, inputs, rng, **settings)
        drafted = speculative_sample(
            target, target_params, draft, draft_params, inputs, rng, gamma=GAMMA, **settings
        )
        columns.append([np.asarray(x) for x in (inputs, plain.tokens, drafted.tokens)])
    return [np.concatenate(each) for each in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [
        (16, 16),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((500, 1), (504, 8))),
        pytest.param(1_000, BATCH, marks=pytest.mark.slow),
    ],
)
def test_float32_texts_are_equal_to_the_last_token(pair, count, batch_size):
    inputs, plain, drafted = texts(pair, count, batch_size)
    assert len(inputs) == count
    assert (plain != 0).sum(axis=1).min() > 1
    np.testing.assert_array_equal(plain, drafted)


@pytest.mark.slow
def test_bfloat16_texts_part_at_near_ties_only(pair, record_property):
    """A block of positions rounds otherwise than one position: close logits may change places."""
    (target, params), (draft, draft_params) = pair
    halves = [
        Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
        for model in (target, draft)
    ]
    inputs, plain, drafted = texts(
        ((halves[0], params), (halves[1], draft_params)), 5 * BATCH, BATCH
    )
    rows = np.flatnonzero((plain != drafted).any(axis=1))
    gaps, largest = gaps_where_they_part(
        halves[0], params, inputs[rows], plain[rows], drafted[rows]
    )
    record_property("texts_that_part_at_near_ties", len(rows))
    print(
        f"{len(rows)} of {len(plain)} texts part from plain decoding, "
        f"largest gap of logits {gaps.max(initial=0):.3g}"
    )
    assert len(rows) < len(plain) / 10
    assert np.all(gaps <= NEAR * largest)


def gaps_where_they_part(target, params, inputs, plain, drafted):
    """Of the logits of the two tokens where texts part, and the largest logit there: [N] each."""
    if not len(inputs):
        return np.zeros(0), np.zeros(0)
    rows, where = np.arange(len(plain)), (plain != drafted).argmax(axis=1)
    run = jax.jit(score, static_argnums=0)
    logits = np.asarray(run(target, params, jnp.asarray(inputs), jnp.asarray(plain)))[rows, where]
    gaps = np.abs(logits[rows, plain[rows, where]] - logits[rows, drafted[rows, where]])
    return gaps, np.abs(logits).max(axis=1, where=logits > -1e8, initial=0)
