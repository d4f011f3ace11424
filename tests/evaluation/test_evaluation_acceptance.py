"""Acceptance and block efficiency: closed forms, numpy beside it, and exact enumeration."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import ACCEPTED, BONUS, CORRECTED, SpeculativeOutput
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.acceptance import (
    Counts,
    TeacherForced,
    along_texts,
    blocks_along_texts,
    from_blocks,
    iid_block_efficiency,
    token_acceptance,
)
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params, score

EOS = 1


@functools.cache
def tiny(name, seed, **changes):
    sizes = dict(vocab_size=13, d_model=6, num_heads=2, head_dim=5, d_ff=11)
    layers = dict(num_encoder_layers=1, num_decoder_layers=1)
    model = Transformer(ModelConfig(name, **{**sizes, **layers, **changes}))
    params = init_params(model, jax.random.key(seed))
    return model, jax.tree.map(lambda x: 3 * x, params)  # sharper than a fresh model


def test_overlap_is_one_less_total_variation():
    p, q = np.random.default_rng(0).dirichlet(np.ones(7), (2, 3, 5))
    expected = 1 - 0.5 * np.abs(p - q).sum(-1)
    np.testing.assert_allclose(token_acceptance(jnp.array(p), jnp.array(q)), expected, rtol=1e-5)
    one_hot = jnp.eye(3)
    np.testing.assert_array_equal(token_acceptance(one_hot, one_hot[::-1]), [0, 1, 0])


@pytest.mark.parametrize("encoder_layers", [1, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_teacher_forced_acceptance_equals_numpy(encoder_layers, temperature):
    target, target_params = tiny("target", 0, num_encoder_layers=encoder_layers)
    draft, draft_params = tiny("draft", 1, d_model=4, num_encoder_layers=encoder_layers)
    inputs = jnp.array([[5, 9, 3, 0], [7, 2, 8, 12], [4, 0, 0, 0]])
    texts = jnp.array([[6, 3, 1, 0, 0], [2, 11, 0, 9, 4], [1, 0, 0, 0, 0]])  # 0 may be written
    lengths = jnp.array([3, 5, 1])
    models = target, target_params, draft, draft_params
    sampling = Sampling(temperature)
    measured = along_texts(*models, inputs, texts, lengths, sampling=sampling)
    np.testing.assert_array_equal(measured.lengths, lengths)

    def distribution(model, params):
        logits = np.asarray(score(model, params, inputs, texts), np.float64)
        if temperature == 0:
            return np.eye(13)[logits.argmax(-1)]
        weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
        return weights / weights.sum(-1, keepdims=True)

    p, q = distribution(target, target_params), distribution(draft, draft_params)
    for row, length in enumerate([3, 5, 1]):
        for t in range(5):
            if t >= length:
                assert measured.overlap[row, t] == measured.accept[row, t] == 0
                continue
            v = int(texts[row, t])
            overlap = np.minimum(p[row, t], q[row, t]).sum()
            accept = min(1, q[row, t, v] / p[row, t, v]) if p[row, t, v] > 0 else 0
            assert measured.overlap[row, t] == pytest.approx(overlap, abs=1e-5)
            assert measured.accept[row, t] == pytest.approx(accept, abs=1e-4)


def test_padding_rows_of_the_vocabulary_may_differ():
    """Of two T5s one may have 32,128 rows and the other 32,100, with the same pieces."""
    target = tiny("target", 0)
    inputs, texts = jnp.array([[5, 9]]), jnp.array([[6, 3, 1]])
    draft, params = tiny("draft", 1, tie_embeddings=True, vocab_size=16, num_pieces=13)
    cut = Transformer(dataclasses.replace(draft.config, vocab_size=13))
    cut_params = {**params, "embedding": params["embedding"][:13]}
    wide = along_texts(*target, draft, params, inputs, texts, jnp.array([3]))
    narrow = along_texts(*target, cut, cut_params, inputs, texts, jnp.array([3]))
    np.testing.assert_allclose(wide.overlap, narrow.overlap, rtol=1e-5)
    np.testing.assert_allclose(wide.accept, narrow.accept, rtol=1e-5)


def test_a_draft_with_its_own_sampling():
    model, params = tiny("same", 0)
    inputs, texts = jnp.array([[5, 9]]), jnp.array([[6, 3, 1]])
    arguments = model, params, model, params, inputs, texts, jnp.array([3])
    same = along_texts(*arguments)
    np.testing.assert_allclose(same.overlap, 1, atol=1e-6)
    # a draft that takes its argmax is one-hot: it agrees with p at p's largest entry alone
    greedy = along_texts(*arguments, draft_sampling=Sampling(temperature=0))
    largest = np.asarray(jax.nn.softmax(score(model, params, inputs, texts))).max(-1)
    np.testing.assert_allclose(greedy.overlap, largest, rtol=1e-5)


@pytest.mark.parametrize("gamma", [1, 2, 5, 7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
def test_constant_acceptance_gives_the_formula(beta, gamma):
    length = 20000
    tokens, calls = blocks_along_texts(np.full((1, length), beta), np.array([length]), gamma)
    expected = gamma + 1 if beta == 1 else (1 - beta ** (gamma + 1)) / (1 - beta)
    assert iid_block_efficiency(beta, gamma) == pytest.approx(expected)
    assert tokens.sum() / calls.sum() == pytest.approx(expected, rel=1e-3)


def test_certain_acceptances_cut_the_text_into_the_blocks_one_can_count():
    # accepted? y y n y y y n | gamma 2: [y y n] [y y y] [n] ; gamma 1: [yn would skip] see below
    accept = np.array([[1, 1, 0, 1, 1, 1, 0, *[9] * 7]], float)
    lengths = np.array([7])
    assert blocks_along_texts(accept, lengths, 2)[1] == [3]
    # gamma 1: (0 1) (2) (3 4) (5 6): token 6 is a bonus, so its rejection is never asked for
    assert blocks_along_texts(accept, lengths, 1)[1] == [4]
    # gamma 3: (0 1 2) (3 4 5 6), gamma 7 the same
    assert blocks_along_texts(accept, lengths, 3)[1] == [2]
    assert blocks_along_texts(accept, lengths, 7)[1] == [2]
    assert blocks_along_texts(accept, lengths, 7)[0] == [7]


def test_an_accepted_end_closes_the_text_and_empty_rows_cost_nothing():
    accept = np.ones((3, 4))
    tokens, calls = blocks_along_texts(accept, np.array([4, 2, 0]), 4)
    np.testing.assert_array_equal(tokens, [4, 2, 0])
    np.testing.assert_array_equal(calls, [1, 1, 0])


def test_hard_and_easy_texts_are_weighted_by_their_blocks():
    # half of the texts 0.5, half 0.95, gamma 7: harmonic mean of the formula's two values
    accept = np.repeat([[0.5], [0.95]], 9001, axis=1)
    tokens, calls = blocks_along_texts(accept, np.array([9001, 9001]), 7)
    each = [iid_block_efficiency(beta, 7) for beta in (0.5, 0.95)]
    assert each == pytest.approx([1.992, 6.732], abs=1e-3)
    assert tokens.sum() / calls.sum() == pytest.approx(2 / (1 / each[0] + 1 / each[1]), rel=1e-3)


class Chain:
    """Target and draft as Markov chains over 3 tokens, one of which is the end-of-sequence."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.p, self.q = rng.dirichlet(np.ones(3), (2, 3))

    def rows(self, text):
        last = text[-1] if text else 0
        return self.p[last], self.q[last]

    def texts(self, limit):
        """Every text up to the limit, which cuts some, with its probability under the target."""
        for text in itertools.product(range(3), repeat=limit):
            length = text.index(EOS) + 1 if EOS in text else limit
            if not any(text[length:]):  # each text once, however it would be padded
                laws = [self.rows(text[:t])[0] for t in range(length)]
                drawn = np.prod([law[v] for law, v in zip(laws, text[:length], strict=True)])
                yield text[:length], drawn

    def expected(self, text, gamma, before):
        """Tokens and calls of the blocks from `text` on that start before a position, uncut.

        By every draft token, acceptance and correction.
        """
        if EOS in text or len(text) >= before:
            return np.zeros(2)

        def walk(drafted):
            whole = text + drafted
            if EOS in whole:
                return np.array([len(drafted), 0])
            p, q = self.rows(whole)
            block = np.array([len(drafted) + 1, 0])
            last = [block + self.expected((*whole, v), gamma, before) for v in range(3)]
            if len(drafted) == gamma:
                return p @ last
            accepted = np.minimum(p, q)
            further = [walk((*drafted, v)) for v in range(3)]
            return accepted @ further + (p - accepted) @ last  # of what is left: P(rejected)

        return np.array([0, 1]) + walk(())


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_along_target_texts_are_those_of_speculative_decoding(seed, gamma):
    """Also where the limit cuts texts: blocks are counted that it cannot cut."""
    chain, limit = Chain(seed), 5
    total, blocks = 0.0, np.zeros(2)
    for text, probability in chain.texts(limit):
        accept = np.zeros((1, limit))
        for t, token in enumerate(text):
            p, q = chain.rows(text[:t])
            accept[0, t] = min(1, q[token] / p[token])
        along = blocks_along_texts(accept, np.array([len(text)]), gamma)
        blocks += probability * np.concatenate(along)
        total += probability
    assert total == pytest.approx(1)
    np.testing.assert_allclose(blocks, chain.expected((), gamma, limit - gamma), atol=1e-12)


def test_gamma_below_one_is_refused():
    with pytest.raises(UserError, match="gamma is 0"):
        blocks_along_texts(np.ones((1, 2)), np.array([2]), 0)


def output_of(blocks, gamma):
    """What the sampler would return of rows of blocks, each (accepted, ended by)."""
    width = 20
    origins = np.zeros((len(blocks), width), np.int8)
    histogram = np.zeros((len(blocks), gamma + 1), int)
    columns = {key: [] for key in ("accepted", "tested", "emitted", "target_calls")}
    for row, line in enumerate(blocks):
        written = []
        for accepted, end in line:
            written += [ACCEPTED] * accepted + ([end] if end else [])
            histogram[row, accepted] += 1
        origins[row, : len(written)] = written
        columns["accepted"].append(sum(accepted for accepted, _ in line))
        columns["tested"].append(sum(accepted + (end == CORRECTED) for accepted, end in line))
        columns["emitted"].append(len(written))
        columns["target_calls"].append(len(line))
    statistics = SimpleNamespace(
        **{key: np.array(column) for key, column in columns.items()}, accepted_histogram=histogram
    )
    lengths = np.array(columns["emitted"])
    return SpeculativeOutput(np.zeros_like(origins), lengths, origins, statistics, None, True)


# accepted tokens and what follows them; the last block ends in an accepted end-of-sequence
ROWS = [
    [(3, BONUS), (1, CORRECTED), (2, None)],
    [(0, CORRECTED), (0, CORRECTED)],
    [(3, BONUS)],
]


def test_blocks_tell_accepted_and_tested_without_the_counters():
    output = output_of(ROWS, gamma=3)
    accepted, tested = from_blocks(output.origins)
    np.testing.assert_array_equal(accepted, [6, 0, 3])
    np.testing.assert_array_equal(tested, [7, 2, 3])  # a bonus was never tested
    np.testing.assert_array_equal(tested, output.statistics.tested)


def counts(rows, gamma=3):
    output = output_of(rows, gamma)
    limit = int(output.lengths.max()) + gamma  # which cuts nothing
    overlap = np.full((len(rows), limit), 0.5) * (np.arange(limit) < output.lengths[:, None])
    return Counts.of(output, TeacherForced(overlap, overlap, output.lengths), gamma)


def test_keys_of_a_draft_by_hand():
    keys = counts(ROWS).keys()
    assert keys["acceptance_rate"] == keys["acceptance_rate_blocks"] == pytest.approx(9 / 12)
    assert keys["acceptance_rate_overlap"] == pytest.approx(0.5)
    assert keys["block_efficiency"] == pytest.approx(14 / 6)
    # calls along texts of 8, 2 and 4 tokens, each of which is accepted with probability 1/2
    assert keys["block_efficiency_path"] == pytest.approx(14 / (4.65625 + 1.5 + 2.5))
    assert keys["block_efficiency_iid"] == pytest.approx(1 + 0.75 + 0.75**2 + 0.75**3)
    assert keys["accepted_histogram"] == [2, 1, 1, 2]
    assert keys["num_prompts"] == 3
    low, high = keys["block_efficiency_ci95"]
    assert low < keys["block_efficiency"] < high


def test_the_block_that_the_limit_cuts_is_left_out_of_the_path():
    accept = np.ones((1, 4))  # blocks of 3 tokens: a whole one, and one token of the next
    along = TeacherForced(accept, accept, np.array([4]))
    keys = Counts.of(output_of([[(2, BONUS)]], 2), along, gamma=2).keys()
    assert keys["block_efficiency_path"] == 3
    assert keys["acceptance_rate_overlap"] == 1


def test_seeds_are_stacked_in_front_of_prompts():
    both = Counts.stack([counts(ROWS), counts(ROWS[::-1])])
    assert both.emitted.shape == (2, 3)
    assert both.keys()["block_efficiency"] == pytest.approx(14 / 6)
    assert both.keys()["accepted_histogram"] == [4, 2, 2, 4]
    assert both.keys()["num_prompts"] == 3


def test_intervals_of_seeds_that_differ_end_where_rates_do():
    """Student's interval of two seeds, one of them perfect, would go on."""
    perfect, other = [[(3, BONUS)]] * 3, [[(3, BONUS)], [(3, BONUS)], [(2, CORRECTED)]]
    keys = Counts.stack([counts(perfect), counts(other)]).keys()
    for name, highest in (("acceptance_rate", 1), ("block_efficiency", 4)):
        low, high = keys[f"{name}_ci95"]
        assert low < keys[name] < high == highest
    none = [[(0, CORRECTED)]] * 3
    keys = Counts.stack([counts(none), counts(other)]).keys()
    for name, lowest, highest in (("acceptance_rate", 0, 1), ("block_efficiency", 1, 4)):
        assert keys[f"{name}_ci95"] == [lowest, highest]


def test_gain_pairs_prompts():
    better = [[(3, BONUS)] * 3, [(3, BONUS)] * 2, [(3, BONUS)]]
    worse = [[(1, CORRECTED)] * 3, [(1, CORRECTED)] * 2, [(1, CORRECTED)]]
    gain = counts(better).gain(counts(worse))
    assert (gain.value, gain.low, gain.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_encoder_layers": 0}, "both must be of one kind"),
        ({"eos_id": 2}, "id of the end of sequence 1 and 2"),
    ],
)
def test_models_that_cannot_decode_together_are_refused(changes, words):
    draft = tiny("draft", 1, **changes)
    with pytest.raises(UserError, match=words):
        along_texts(*tiny("target", 0), *draft, jnp.array([[5]]), jnp.array([[6]]), jnp.array([1]))
