"""The whole speculative sampler on tiny models of both kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding import speculative
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.block_length import FIXED, BlockLength, efficiency_by_gamma
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculate_checked, speculative_sample
from distillspec_jax.decoding.state import ACCEPTED, BONUS, CORRECTED, Speculation, Verdict
from distillspec_jax.errors import UserError
from distillspec_jax.models.transformer import Transformer, extend, hidden_states, score

GAMMA, LIMIT = 3, 17
GREEDY = Sampling(temperature=0)
RNG = jax.random.key(3)
ADAPTIVE = BlockLength(min_confidence=0.3, schedule_start=2)


def sample(pair, inputs, **settings):
    settings = {"gamma": GAMMA, "max_new_tokens": LIMIT, **settings}
    return jax.tree.map(np.asarray, speculative_sample(*pair, inputs, RNG, **settings))


MODES = {
    "token": {},
    "block": {"verification": "block"},
    "adaptive": {"block_length": ADAPTIVE, "verification": "block"},
    "drafts": {"num_drafts": 2},
    "greedy draft": {"draft_sampling": GREEDY},
}


ENCODER_DECODER, DECODER_ONLY = "encoder-decoder", "decoder-only"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ENCODER_DECODER, {}),
        (DECODER_ONLY, {"verification": "greedy"}),
        (DECODER_ONLY, {"draft_sampling": Sampling()}),
        (ENCODER_DECODER, {"num_drafts": 2}),
    ],
    ids=["as is", "by name", "sampled draft", "drafts"],
)
def test_greedy_output_is_plain_greedy_output(pairs, prompts, kind, settings):
    pair = pairs[kind]
    plain = autoregressive_sample(
        pair.target, pair.target_params, prompts, RNG, sampling=GREEDY, max_new_tokens=LIMIT
    )
    out = sample(pair, prompts, sampling=GREEDY, **settings)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    np.testing.assert_array_equal(out.statistics.finished, plain.finished)
    assert int(out.statistics.accepted.sum()) > 0


@pytest.mark.parametrize(
    "rule",
    [BlockLength(min_confidence=0.34), BlockLength(max_entropy=1.65)],
    ids=["confidence", "entropy"],
)
def test_a_greedy_draft_stops_by_its_softmax(pairs, prompts, rule):
    """Its q is one-hot: certain of every token."""
    pair = pairs[DECODER_ONLY]
    speculation = Speculation(
        pair.target, pair.draft, GAMMA, LIMIT, sampling=GREEDY, block_length=rule
    )
    params = pair.target_params, pair.draft_params
    state = speculative.begin(speculation, *params, prompts, RNG, np.arange(len(prompts)))
    uniforms = speculative._block_uniforms(speculation, state)
    found = speculative.draft_block(speculation, pair.draft_params, state, uniforms)

    logits = score(pair.draft, pair.draft_params, prompts, found.tokens)
    probs = np.asarray(jax.nn.softmax(logits[..., : pair.draft.config.num_pieces]))
    tokens = np.asarray(found.tokens)
    confidence = np.take_along_axis(probs, tokens[..., None], axis=2)[..., 0]
    entropy = -(probs * np.log(probs)).sum(axis=2)
    stops = confidence < rule.min_confidence if rule.min_confidence else entropy > rule.max_entropy
    stops |= tokens == pair.draft.config.eos_id
    stops[:, -1] = True
    np.testing.assert_array_equal(found.lengths, stops.argmax(axis=1) + 1)
    assert len(np.unique(found.lengths)) == GAMMA


@pytest.mark.parametrize(
    "rule",
    [BlockLength(min_confidence=0.3), BlockLength(max_entropy=1.5)],
    ids=["confidence", "entropy"],
)
def test_greedy_blocks_that_stop_early_leave_the_text_alone(pairs, prompts, rule):
    pair = pairs[ENCODER_DECODER]
    twin = pair._replace(draft=pair.target, draft_params=pair.target_params)
    plain = autoregressive_sample(
        pair.target, pair.target_params, prompts, RNG, sampling=GREEDY, max_new_tokens=LIMIT
    )
    for drafted in (pair, twin):
        whole, short = (
            sample(drafted, prompts, sampling=GREEDY, block_length=each) for each in (FIXED, rule)
        )
        np.testing.assert_array_equal(short.tokens, plain.tokens)
        assert short.statistics.drafted.sum() < whole.statistics.drafted.sum()
    assert short.statistics.target_calls.sum() > whole.statistics.target_calls.sum()


def test_one_token_after_a_prompt_that_fills_its_row(pair, prompts):
    """There is room for an answer behind any prompt, however short the limit."""
    full = prompts[(prompts != 0).all(axis=1)]
    arguments = pair.target, pair.target_params, full, RNG
    plain = [autoregressive_sample(*arguments, sampling=GREEDY, max_new_tokens=n) for n in (1, 4)]
    out = sample(pair, full, sampling=GREEDY, max_new_tokens=1)
    assert out.tokens.shape == (len(full), 1)
    for tokens in (out.tokens, plain[0].tokens):
        np.testing.assert_array_equal(tokens, plain[1].tokens[:, :1])
    assert out.lengths.tolist() == [1] * len(full)
    assert (out.statistics.target_calls == 1).all()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(ENCODER_DECODER, "token"), (DECODER_ONLY, "adaptive"), (ENCODER_DECODER, "drafts")],
)
def test_a_row_does_not_depend_on_its_batch(pairs, prompts, kind, mode):
    pair = pairs[kind]
    whole = sample(pair, prompts, **MODES[mode])
    rows = np.array([17, 4, 29])
    padded = np.pad(prompts[rows], ((0, 0), (0, 3)))
    part = sample(pair, padded, row_ids=rows, **MODES[mode])
    np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
    np.testing.assert_array_equal(part.statistics.tested, whole.statistics.tested[rows])
    alone = sample(pair, prompts[4:5], row_ids=np.array([4]), **MODES[mode])
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[4])
    np.testing.assert_array_equal(alone.origins[0], whole.origins[4])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (ENCODER_DECODER, "token"),
        (DECODER_ONLY, "block"),
        (DECODER_ONLY, "adaptive"),
        (ENCODER_DECODER, "drafts"),
        (DECODER_ONLY, "greedy draft"),
    ],
)
def test_statistics_agree_with_the_text(pairs, prompts, kind, mode):
    pair = pairs[kind]
    out = sample(pair, prompts, **MODES[mode])
    tokens, lengths, origins, s = out.tokens, out.lengths, out.origins, out.statistics
    eos = tokens == pair.target.config.eos_id
    assert (s.finished == eos.any(axis=1)).all()
    assert 0 < s.finished.sum() < len(tokens)
    assert (lengths == np.where(s.finished, eos.argmax(axis=1) + 1, LIMIT)).all()
    assert (tokens[np.arange(LIMIT) >= lengths[:, None]] == pair.target.config.pad_id).all()
    assert ((origins > 0) == (np.arange(LIMIT) < lengths[:, None])).all()

    ends_by_draft = origins[np.arange(len(tokens)), lengths - 1] == ACCEPTED
    cut = s.emitted - lengths
    assert (cut[s.finished] == 0).all()
    assert ((cut >= 0) & (cut <= GAMMA)).all()
    no_cut = cut == 0
    last_tokens = (origins == CORRECTED).sum(axis=1) + (origins == BONUS).sum(axis=1)
    blocks = last_tokens + (ends_by_draft & s.finished)
    assert (blocks == s.target_calls)[no_cut].all()
    assert ((origins == ACCEPTED).sum(axis=1) == s.accepted)[no_cut].all()
    corrected = (origins == CORRECTED).sum(axis=1)
    assert (s.accepted + corrected == s.tested)[no_cut].all()  # what was tested stayed or was not
    behind = sample(pair, prompts, **MODES[mode], max_new_tokens=LIMIT + GAMMA + 1)
    ends_by_draft = behind.origins[np.arange(len(tokens)), s.emitted - 1] == ACCEPTED
    assert (s.emitted == s.accepted + s.target_calls - ends_by_draft).all()  # those cut off, too

    histogram = s.accepted_histogram
    assert (histogram.sum(axis=1) == s.target_calls).all()
    assert (histogram @ np.arange(GAMMA + 1) == s.accepted).all()
    assert (s.emitted_histogram.sum(axis=1) == s.target_calls).all()
    assert (s.emitted_histogram @ np.arange(1, GAMMA + 2) == s.emitted).all()
    at_least = histogram[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    assert (s.accepted_per_position == at_least).all()
    assert (s.accepted_per_position.sum(axis=1) == s.accepted).all()
    assert (s.tested_per_position.sum(axis=1) == s.tested).all()
    assert (s.tested_per_position >= s.accepted_per_position).all()
    assert (s.accepted <= s.tested).all()
    assert (s.tested <= s.drafted).all()
    assert (s.drafted <= s.draft_steps).all()
    assert (s.draft_steps <= GAMMA * s.target_calls).all()
    if mode == "adaptive":
        assert s.drafted.sum() < 0.8 * GAMMA * s.target_calls.sum()


@pytest.mark.parametrize("own_draft", [True, False])
def test_blocks_are_as_long_as_the_schedule_allows(pairs, prompts, own_draft):
    """Two more behind a block that was kept whole, else one less, from the first block on."""
    pair = pairs[DECODER_ONLY]
    endless = [dataclasses.replace(m.config, eos_id=-1) for m in (pair.target, pair.draft)]
    target, draft = map(Transformer, endless)
    params = pair.target_params, pair.draft_params
    if own_draft:
        draft, params = target, (pair.target_params, pair.target_params)
    gamma = 4
    speculation = Speculation(target, draft, gamma, 40, block_length=BlockLength(schedule_start=1))
    state = speculative.begin(speculation, *params, prompts, RNG, jnp.arange(len(prompts)))
    advance = jax.jit(speculative.advance, static_argnums=0)
    allowance, before = np.ones(len(prompts)), state.statistics
    for _ in range(5):
        state = advance(speculation, *params, state)
        s = state.statistics
        drafted, accepted = s.drafted - before.drafted, s.accepted - before.accepted
        np.testing.assert_array_equal(drafted, allowance)
        change = np.where(accepted == drafted, 2, -1)
        allowance, before = np.clip(allowance + change, 1, gamma), s
    assert (allowance == gamma).all() == own_draft


def test_nan_in_a_row_stops_that_row_alone(pairs, prompts):
    pair, rows = pairs[DECODER_ONLY], len(prompts)
    speculation = Speculation(pair.target, pair.draft, GAMMA, LIMIT)
    models = pair.target_params, pair.draft_params
    state = speculative.begin(speculation, *models, prompts, RNG, jnp.arange(rows))
    is_finite = np.arange(rows) != 7
    verdict = Verdict(
        path=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, GAMMA), 5),
        lengths=jnp.full(rows, GAMMA),
        num_accepted=jnp.ones(rows, jnp.int32),
        next_token=jnp.full(rows, 6),
        finite=jnp.asarray(is_finite),
    )
    after = speculative.emit(speculation, state, verdict, jnp.int32(GAMMA))
    np.testing.assert_array_equal(after.lengths, np.where(is_finite, 2, 0))
    np.testing.assert_array_equal(after.active, is_finite)
    np.testing.assert_array_equal(after.statistics.finite, is_finite)


def test_efficiency_at_the_gamma_that_was_decoded_is_the_measured_one(pairs, prompts):
    """Blocks that end in an accepted end-of-sequence have no token behind it."""
    pair = pairs[ENCODER_DECODER]
    out = sample(pair._replace(draft=pair.target, draft_params=pair.target_params), prompts)
    s = out.statistics
    assert (s.emitted < s.accepted + s.target_calls).any()
    measured = s.emitted.sum() / s.target_calls.sum()
    assert efficiency_by_gamma(s.emitted_histogram.sum(axis=0))[GAMMA] == pytest.approx(measured)


def test_rates_of_rows(pairs, prompts):
    pair, ids = pairs[DECODER_ONLY], np.where(np.arange(53) == 3, -1, np.arange(53))
    s = sample(pair, prompts, row_ids=ids).statistics
    for rate, count, out_of in (
        (s.block_efficiency, s.emitted, s.target_calls),
        (s.acceptance_rate, s.accepted, s.tested),
    ):
        assert np.flatnonzero(np.isnan(rate)).tolist() == [3]
        np.testing.assert_allclose(np.delete(rate, 3), np.delete(count, 3) / np.delete(out_of, 3))


def test_kept_states_are_those_of_scoring_the_text(pairs, prompts):
    target, target_params, draft, draft_params = pair = pairs[ENCODER_DECODER]
    mode = MODES["drafts"]
    speculation = Speculation(target, draft, GAMMA, LIMIT, keeps_hidden=True, **mode)
    out = speculate_checked(speculation, target_params, draft_params, prompts, RNG)
    without = sample(pair, prompts, **mode)
    np.testing.assert_array_equal(out.tokens, without.tokens)
    scored = hidden_states(target, target_params, prompts, out.tokens)
    written = np.arange(LIMIT) < np.asarray(out.lengths)[:, None]
    np.testing.assert_allclose(
        np.asarray(out.hidden)[written], np.asarray(scored)[written], rtol=1e-4, atol=1e-5
    )
    assert (out.hidden.shape, out.hidden.dtype) == (scored.shape, scored.dtype)
    assert np.all(np.isfinite(out.hidden))  # a masked NaN is a NaN all the same
    assert without.hidden is None


def test_a_perfect_draft_is_always_accepted(pairs, prompts):
    pair = pairs[DECODER_ONLY]
    twin = pair._replace(draft=pair.target, draft_params=pair.target_params)
    out = sample(twin, prompts)
    s = out.statistics
    np.testing.assert_array_equal(s.accepted, s.tested)
    assert not (out.origins == CORRECTED).any()
    behind = sample(twin, prompts, max_new_tokens=LIMIT + GAMMA + 1)
    ends_by_draft = behind.origins[np.arange(len(prompts)), s.emitted - 1] == ACCEPTED
    assert 0 < ends_by_draft.sum() < len(prompts)
    assert (s.emitted == (GAMMA + 1) * s.target_calls)[~ends_by_draft].all()


def test_rows_with_a_negative_id_stay_empty(pairs, prompts):
    pair = pairs[DECODER_ONLY]
    inputs = np.where(np.arange(5)[:, None] == 3, 0, prompts[:5])
    out = sample(pair, inputs, row_ids=np.array([0, 1, 2, -1, 4]))
    assert not any(x[3].any() for x in (out.tokens, out.lengths, out.origins))
    assert int(out.statistics.target_calls[3]) == int(out.statistics.draft_steps[3]) == 0
    np.testing.assert_array_equal(out.tokens[4], sample(pair, prompts).tokens[4])


@pytest.mark.parametrize(("kind", "mode"), [(ENCODER_DECODER, "drafts"), (DECODER_ONLY, "token")])
def test_poison_behind_the_caches_lengths_changes_nothing(pairs, prompts, kind, mode):
    pair = pairs[kind]
    speculation = Speculation(pair.target, pair.draft, GAMMA, LIMIT, **MODES[mode])
    params = pair.target_params, pair.draft_params
    advance = jax.jit(functools.partial(speculative.advance, speculation))

    @jax.jit
    def poison(cache):
        stale = jnp.arange(cache.room)[None] >= cache.lengths[:, None]
        stale = stale[:, None, :, None]
        keys, values = (
            [jnp.where(stale, jnp.nan, x) for x in xs] for xs in (cache.keys, cache.values)
        )
        return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))

    begin = jax.jit(functools.partial(speculative.begin, speculation))
    state = begin(*params, prompts, RNG, np.arange(len(prompts)))
    while state.active.any():
        caches = {name: poison(getattr(state, name)) for name in ("target_cache", "draft_cache")}
        state = advance(*params, state.replace(**caches))
    clean = sample(pair, prompts, **MODES[mode])
    np.testing.assert_array_equal(state.tokens[:, :LIMIT], clean.tokens)
    assert state.statistics.finite.all()


@pytest.mark.parametrize(("kind", "mode"), [(ENCODER_DECODER, "drafts"), (DECODER_ONLY, "token")])
def test_caches_hold_the_text_but_for_what_is_still_to_be_read(pairs, prompts, kind, mode):
    """Rolled back and caught up: logits after any block are those of a fresh pass.

    The target's lacks the pending token, the draft's the one before it, too.
    """
    pair = pairs[kind]
    speculation = Speculation(pair.target, pair.draft, GAMMA, LIMIT, **MODES[mode])
    params = pair.target_params, pair.draft_params
    begin = jax.jit(functools.partial(speculative.begin, speculation))
    state = begin(*params, prompts, RNG, np.arange(len(prompts)))
    advance = jax.jit(functools.partial(speculative.advance, speculation))
    for _ in range(4):
        state = advance(*params, state)
    rows = np.flatnonzero(state.active)
    assert len(rows) > 3
    previous, pending = state.previous[:, None], state.pending[:, None]
    for model, weights, cache, unread in (
        (pair.target, params[0], state.target_cache, pending),
        (pair.draft, params[1], state.draft_cache, np.concatenate([previous, pending], axis=1)),
    ):
        fed = np.repeat(unread, speculation.num_drafts, axis=0)
        after = np.asarray(jax.jit(extend, static_argnums=0)(model, weights, cache, fed)[0])
        whole = jax.jit(score, static_argnums=0)(model, weights, prompts, state.tokens)
        expected = np.asarray(whole)[rows, np.asarray(state.lengths)[rows]]
        for j in range(speculation.num_drafts):
            got = after[rows * speculation.num_drafts + j, -1]
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_calls_of_equal_shape_compile_once(pairs, prompts):
    before = speculative._compiled._cache_size()
    for seed in range(3):
        inputs, ids = np.roll(prompts, seed, axis=0), np.arange(len(prompts)) + seed
        sample(pairs[ENCODER_DECODER], inputs, row_ids=ids, gamma=2)
    assert speculative._compiled._cache_size() == before + 1


def test_lossy_output_says_so(pairs, prompts):
    pair = pairs[ENCODER_DECODER]

    def rate(epsilon):
        out = sample(pair, prompts, lenience=Lenience("exponential", epsilon))
        return out, int(out.statistics.accepted.sum()) / int(out.statistics.tested.sum())

    exact = sample(pair, prompts)
    same, low = rate(1.0)
    lossy, high = rate(0.3)
    assert exact.lossless
    assert same.lossless
    assert not lossy.lossless
    np.testing.assert_array_equal(same.tokens, exact.tokens)
    assert high > low + 0.05


def test_greedy_output_is_lossless_whatever_the_lenience(pairs, prompts):
    pair, lenience = pairs[ENCODER_DECODER], Lenience("linear", 0.3)
    exact = sample(pair, prompts, sampling=GREEDY)
    lenient = sample(pair, prompts, sampling=GREEDY, lenience=lenience)
    np.testing.assert_array_equal(lenient.tokens, exact.tokens)
    assert lenient.lossless


@pytest.mark.parametrize("which", ["target", "draft"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_nan_in_the_weights_is_an_error_at_once(pairs, prompts, spoil, which, sampling):
    pair = pairs[ENCODER_DECODER]
    field = f"{which}_params"
    broken = pair._replace(**{field: spoil(getattr(pair, field))})
    with pytest.raises(UserError, match="gave NaN logits"):
        sample(broken, prompts, sampling=sampling)


def test_nan_stops_the_row_before_a_token_is_written(pairs, prompts, spoil):
    pair = pairs[ENCODER_DECODER]
    broken = spoil(pair.target_params)
    speculation = Speculation(pair.target, pair.draft, GAMMA, LIMIT)
    ids = jnp.arange(len(prompts))
    out = speculative._compiled(speculation, broken, pair.draft_params, prompts, RNG, ids)
    assert not out.tokens.any()
    assert not out.statistics.finite.any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_encoder_layers": 0}, "both must be of one kind"),
        ({"num_pieces": 5}, "number of pieces 7 and 5"),
        ({"eos_id": 2}, "id of the end of sequence 1 and 2"),
        ({"pad_id": 3}, "id of padding 0 and 3"),
        ({"decoder_start_id": 4}, "id that starts decoding 0 and 4"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(pairs, prompts, change, named):
    pair = pairs[ENCODER_DECODER]
    other = Transformer(dataclasses.replace(pair.draft.config, **change))
    with pytest.raises(UserError, match=named):
        sample(pair._replace(draft=other), prompts)


def test_bad_requests_are_refused(pairs):
    pair = pairs[ENCODER_DECODER]
    with pytest.raises(UserError, match="empty prompt in row 1"):
        sample(pair, np.array([[3, 4], [0, 0]], np.int32))
    with pytest.raises(UserError, match="one integer for each of the 1 prompts"):
        sample(pair, np.array([[3, 4]]), row_ids=np.array([0, 1]))
    small = pair._replace(target=pair.draft, draft=pair.target)  # of 11 and 7 embedded ids
    with pytest.raises(UserError, match="id 7 in row 0 is outside 0 <= id < 7"):
        sample(small, np.array([[3, 7]], np.int32))


@pytest.mark.parametrize("traced", ["target_params", "draft_params", "rng", "row_ids", "inputs"])
def test_a_jitted_caller_is_told_whatever_it_traces(pairs, prompts, traced):
    given = pairs[ENCODER_DECODER]._asdict() | {"inputs": prompts, "rng": RNG}
    given["row_ids"] = np.arange(len(prompts))

    def call(value):
        return speculative_sample(**given | {traced: value}, gamma=1, max_new_tokens=2)

    with pytest.raises(UserError, match="inside a jitted function use `generate` or `speculate`"):
        jax.jit(call)(given[traced])


@pytest.mark.parametrize("rng", [0, None])
def test_what_is_no_random_key_is_refused(pairs, prompts, rng):
    with pytest.raises(UserError, match=r"it must be one key: jax\.random\.key\(seed\)"):
        speculative_sample(*pairs[ENCODER_DECODER], prompts, rng, gamma=1, max_new_tokens=2)
