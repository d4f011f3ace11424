"""1e5 texts through the whole compiled sampler against the law of a real, tiny target."""

import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.block_length import FIXED, BlockLength
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import STANDARD, Sampling, process
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.models.transformer import score

pytestmark = pytest.mark.samples

SAMPLES, LENGTH = 100_000, 4
PROMPT = np.array([[3, 6, 2]], np.int32)
NARROW, WIDE = Sampling(0.8, top_k=5), Sampling(1.2, top_p=0.9)


def target_law(pair, sampling):
    """Probability of every text of 4 tokens, cut after its end-of-sequence: [7^4]."""
    size, eos = pair.target.config.num_pieces, pair.target.config.eos_id
    texts = np.array(list(itertools.product(range(size), repeat=LENGTH)), np.int32)
    inputs = np.repeat(PROMPT, len(texts), axis=0)
    run = jax.jit(lambda params: process(score(pair.target, params, inputs, texts), sampling))
    probs = np.asarray(run(pair.target_params), np.float64)
    each = np.take_along_axis(probs, texts[..., None], axis=2)[..., 0]
    ended = np.cumsum(texts == eos, axis=1) - (texts == eos) > 0
    law = np.where(ended, texts == 0, each).prod(axis=1)  # behind the end: padding
    assert law.sum() == pytest.approx(1, abs=1e-5)
    return law / law.sum()


def p_value(tokens, law, size):
    """Chi-square of texts [n, 4] against `law`, rare texts taken together."""
    found = np.bincount(np.asarray(tokens) @ size ** np.arange(LENGTH)[::-1], minlength=len(law))
    assert found[law == 0].sum() == 0
    expected = law * len(tokens)
    rare = expected < 10
    found, expected = (np.append(x[~rare], x[rare].sum()) for x in (found, expected))
    kept = expected > 0
    assert kept.sum() > 100
    return stats.chisquare(found[kept], expected[kept]).pvalue


def check(pair, sampling, tokens, *, holds=True):
    size = pair.target.config.num_pieces
    p = p_value(tokens[:, :LENGTH], target_law(pair, sampling), size)
    assert (p > 1e-3) if holds else (p < 1e-9)


def speculate(pair, limit=LENGTH, seed=0, **settings):
    inputs = np.repeat(PROMPT, SAMPLES, axis=0)
    arguments = (*pair, inputs, jax.random.key(seed))
    return speculative_sample(*arguments, max_new_tokens=limit, **settings)


def test_plain_sampling(pair):
    inputs = np.repeat(PROMPT, SAMPLES, axis=0)
    model = (pair.target, pair.target_params, inputs, jax.random.key(1))
    out = autoregressive_sample(*model, sampling=NARROW, max_new_tokens=LENGTH)
    check(pair, NARROW, out.tokens)


@pytest.mark.parametrize(
    ("kind", "verification"), [("encoder-decoder", "token"), ("decoder-only", "block")]
)
def test_speculative_sampling(pairs, kind, verification):
    pair = pairs[kind]
    out = speculate(pair, gamma=2, verification=verification)
    check(pair, STANDARD, out.tokens)
    alpha = out.statistics.accepted.sum() / out.statistics.tested.sum()
    assert 0.2 < alpha < 0.9  # the draft is no copy


def test_different_settings_for_draft_and_target(pairs):
    pair = pairs["encoder-decoder"]
    out = speculate(pair, gamma=3, sampling=NARROW, draft_sampling=WIDE, verification="block")
    check(pair, NARROW, out.tokens)


@pytest.mark.parametrize(
    "block_length", [FIXED, BlockLength(min_confidence=0.3)], ids=["whole", "confidence"]
)
def test_greedy_draft_of_a_sampling_target(pairs, block_length):
    pair, greedy = pairs["decoder-only"], Sampling(temperature=0)
    settings = {"draft_sampling": greedy, "sampling": WIDE, "block_length": block_length}
    out = speculate(pair, gamma=2, **settings)
    check(pair, WIDE, out.tokens)


@pytest.mark.parametrize(
    "block_length",
    [BlockLength(min_confidence=0.3, schedule_start=1), BlockLength(max_entropy=1.5)],
    ids=["confidence and schedule", "entropy"],
)
def test_adaptive_blocks(pairs, block_length):
    pair = pairs["encoder-decoder"]
    out = speculate(pair, gamma=3, block_length=block_length, verification="block")
    drafted, calls = out.statistics.drafted.sum(), out.statistics.target_calls.sum()
    assert 1 < drafted / calls < 2.5
    check(pair, STANDARD, out.tokens)


def test_several_drafts(pairs):
    pair = pairs["encoder-decoder"]
    single, several = (speculate(pair, gamma=2, num_drafts=k) for k in (1, 2))
    check(pair, STANDARD, several.tokens)
    assert several.statistics.accepted.sum() > single.statistics.accepted.sum()


def test_several_drafts_of_adaptive_blocks(pairs):
    pair, block_length = pairs["decoder-only"], BlockLength(min_confidence=0.3, schedule_start=1)
    out = speculate(pair, gamma=2, num_drafts=2, block_length=block_length)
    drafted, calls = out.statistics.drafted.sum(), out.statistics.target_calls.sum()
    assert 1 < drafted / calls < 1.8
    check(pair, STANDARD, out.tokens)


def test_the_test_sees_a_lossy_law(pairs):
    pair = pairs["encoder-decoder"]
    out = speculate(pair, gamma=2, lenience=Lenience("linear", 0.8))
    check(pair, STANDARD, out.tokens, holds=False)


def test_later_blocks(pairs):
    """The last 4 of 6 tokens, begun and ended by blocks anywhere, against plain sampling."""
    pair = pairs["decoder-only"]
    inputs = np.repeat(PROMPT, SAMPLES, axis=0)
    model = (pair.target, pair.target_params, inputs, jax.random.key(5))
    plain = autoregressive_sample(*model, max_new_tokens=6)
    ours = speculate(pair, limit=6, gamma=2, verification="block", seed=4)
    size = pair.target.config.num_pieces
    counts = [
        np.bincount(
            np.asarray(out.tokens)[:, -LENGTH:] @ size ** np.arange(LENGTH)[::-1],
            minlength=size**LENGTH,
        )
        for out in (ours, plain)
    ]
    common = np.sum(counts, axis=0) >= 20
    assert stats.chi2_contingency(np.stack(counts)[:, common]).pvalue > 1e-3
