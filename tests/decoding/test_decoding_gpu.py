"""Decoding on a GPU: the same texts, the same law, and XLA's own products."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding.autoregressive import autoregressive_sample, generate
from distillspec_jax.decoding.sampling import Sampling, process
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.models.layers import multiply
from distillspec_jax.models.transformer import Transformer, score

pytestmark = pytest.mark.gpu

GREEDY = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 56}
NEAR = 0.05  # of the largest logit, as in test_decoding_greedy


def greedy_texts(dtype, count, device, in_batches_of=None):
    """The target, its weights, inputs, texts without the draft and with it: [count, ...] each.

    Texts without the draft come in batches of that many; None: of all, as those with it.
    """
    models = []
    for name in ("stories-target", "stories-draft"):
        model, params = zoo.load(name)
        models += [Transformer(dataclasses.replace(model.config, dtype=dtype)), params]
    [batch] = load_task(TaskConfig()).eval_batches("test", batch_size=count, count=count)
    inputs, rng = jnp.asarray(batch.inputs), jax.random.key(0)
    drafted = speculative_sample(*models, inputs, rng, gamma=7, **GREEDY).tokens
    plain = [
        autoregressive_sample(*models[:2], part, rng, **GREEDY).tokens
        for part in np.split(inputs, count // (in_batches_of or count))
    ]
    assert plain[0].devices() == drafted.devices() == {device}
    return *models[:2], inputs, np.concatenate(plain), np.asarray(drafted)


def test_float32_texts_are_equal_to_the_last_token(device):
    *_, plain, drafted = greedy_texts("float32", 32, device)
    assert (plain != 0).sum(axis=1).min() > 1
    np.testing.assert_array_equal(plain, drafted)


def test_bfloat16_texts_part_at_near_ties_only(device):
    """Few of them, and no more than plain decoding parts from itself in smaller batches."""
    target, params, inputs, plain, drafted = greedy_texts("bfloat16", 64, device)
    parted = np.flatnonzero((plain != drafted).any(axis=1))
    logits = np.asarray(jax.jit(score, static_argnums=0)(target, params, inputs, plain))
    for row in parted:
        column = (plain != drafted)[row].argmax()
        here = logits[row, column]
        gap = abs(here[plain[row, column]] - here[drafted[row, column]])
        assert gap <= NEAR * np.abs(here[here > -1e8]).max()

    *_, batches_of_8, _ = greedy_texts("bfloat16", 64, device, in_batches_of=8)
    count, control = len(parted), (plain != batches_of_8).any(axis=1).sum()
    print(f"parted: {count} of {len(plain)} texts by the draft, {control} by the size of the batch")
    assert count + control == 0 or (
        stats.binomtest(count, count + control, 0.5, alternative="greater").pvalue > 1e-3
    )
    assert count < len(plain) / 10


def test_a_single_row_is_multiplied_and_not_summed(device):
    """Where XLA made a sum of it, it wrote the whole product: as large as the weights."""
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 1, 2048), (2048, 2048)))
    product = jax.jit(lambda x, kernel: multiply(jnp.tanh(x), kernel) + 1)
    compiled = product.lower(x, kernel).compile()
    if device.platform == "gpu":
        assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 4
    np.testing.assert_allclose(compiled(x, kernel), 1 + 2048 * np.tanh(1.0), rtol=0.01)


@pytest.mark.parametrize(
    ("kind", "verification"), [("encoder-decoder", "token"), ("decoder-only", "block")]
)
def test_sampled_texts_have_the_law_of_the_target(pairs, device, kind, verification):
    """Chi-square of 1e5 texts of three tokens; behind an end there is padding."""
    pair = pairs[kind]
    size, eos, samples = pair.target.config.num_pieces, pair.target.config.eos_id, 100_000
    prompt, sampling = np.array([[3, 6, 2]], np.int32), Sampling(0.8)
    texts = np.array(list(itertools.product(range(size), repeat=3)), np.int32)
    logits = score(pair.target, pair.target_params, np.repeat(prompt, len(texts), 0), texts)
    each = np.take_along_axis(np.asarray(process(logits, sampling)), texts[..., None], 2)[..., 0]
    ended = np.cumsum(texts == eos, axis=1) - (texts == eos) > 0
    law = np.where(ended, texts == 0, each).prod(axis=1, dtype=np.float64)

    output = speculative_sample(
        *pair,
        np.repeat(prompt, samples, 0),
        jax.random.key(8),
        gamma=2,
        max_new_tokens=3,
        sampling=sampling,
        verification=verification,
    )
    assert output.tokens.devices() == {device}
    numbers = np.asarray(output.tokens) @ size ** np.arange(3)[::-1]
    found, expected = np.bincount(numbers, minlength=size**3), law / law.sum() * samples
    rare = expected < 10
    assert (~rare).sum() > 100
    found, expected = (np.append(x[~rare], x[rare].sum()) for x in (found, expected))
    assert stats.chisquare(found, expected).pvalue > 1e-3


def test_the_kernel_of_the_cpu_serves_a_cpu_alone(device):
    pytest.importorskip("llvmlite")
    model, params = zoo.load("stories-target")
    compiled = jax.jit(generate, static_argnums=0, static_argnames=tuple(GREEDY)).lower(
        model, params, jnp.ones((2, 5), jnp.int32), jax.random.key(0), **GREEDY
    )
    assert ("distillspec_product" in compiled.as_text()) == (device.platform == "cpu")
