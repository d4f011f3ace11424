"""Speculative sampling: a draft proposes blocks, the target keeps what its own law allows.

One compiled loop for a batch whose rows advance apart. Every block starts with exactly one pending
token per row, emitted but fed to neither model. The draft is one token further behind, for it never
read the last one it wrote: it begins every block with two, the one before the pending one again.

    previous s, pending t | draft reads s t, writes x_1 x_2 x_3 | target reads t x_1 x_2 x_3
    n = 2 | emitted x_1 x_2 t'     | the target's cache keeps t x_1 x_2, the draft's t x_1
    n = 3 | emitted x_1 x_2 x_3 t' | the target's keeps t x_1 x_2 x_3, the draft's t x_1 x_2

Conventions (arXiv 2310.08461; 2211.17192):
- The end-of-sequence is a token like any other. A row that drafts it drafts no further; if it is
  accepted the text ends there, without a bonus token; a correction or bonus token may be it.
- Every block counts, the last one too: its target call and the tokens it emitted. Tokens behind an
  end-of-sequence are never counted. The length limit cuts the output after verification and never
  changes acceptance; `emitted` counts before that cut, `lengths` after it. So block efficiency
  tau = sum(emitted) / sum(target_calls) has no edge effect of the limit, and 1 <= tau <= gamma + 1.
- A drafted token is tested if all before it in its block were accepted. Counted acceptance rate:
  alpha = sum(accepted) / sum(tested). The bonus token is neither drafted nor tested. Of several
  drafts the one that was followed counts, and a token is accepted if that draft holds it.
- Reading the prompt is not a target call. The start token of a decoder is not emitted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from distillspec_jax.decoding import keys
from distillspec_jax.decoding.block_length import (
    FIXED,
    BlockLength,
    first_allowance,
    keeps_drafting,
    next_allowance,
)
from distillspec_jax.decoding.checks import Array, check_finite, check_request
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.multi_draft import by_row, follow, k_seq_rule, per_draft, share_cache
from distillspec_jax.decoding.sampling import STANDARD, Sampling, draw, process
from distillspec_jax.decoding.state import (
    ACCEPTED,
    BONUS,
    CORRECTED,
    Draft,
    Speculation,
    SpeculativeOutput,
    State,
    Uniforms,
    Verdict,
    count_block,
    no_statistics,
)
from distillspec_jax.decoding.verification import choose_rule
from distillspec_jax.models.cache import Cache, rollback
from distillspec_jax.models.transformer import (
    Params,
    Transformer,
    extend_hidden,
    in_compute_dtype,
    next_logits,
    start,
    unembed,
)


def speculative_sample(
    target: Transformer,
    target_params: Params,
    draft: Transformer,
    draft_params: Params,
    inputs: Array,
    rng: jax.Array,
    *,
    gamma: int,
    max_new_tokens: int = 128,
    sampling: Sampling = STANDARD,
    draft_sampling: Sampling | None = None,
    verification: str = "token",
    lenience: Lenience | None = None,
    block_length: BlockLength = FIXED,
    num_drafts: int = 1,
    row_ids: jax.Array | None = None,
) -> SpeculativeOutput:
    """Decodes inputs [B, S] with a draft: the target's law, several tokens per target call.

    Compiled once per shape and settings (`Speculation` explains them), with input and output
    checked on the host; inside a jitted function use `speculate`. Raises UserError for settings
    out of range, models of different kind or vocabulary, prompts that are not right-padded ids,
    row ids that do not fit them, what is no key, or NaN from a model.
    """
    speculation = Speculation(
        target=target,
        draft=draft,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        draft_sampling=draft_sampling,
        verification=verification,
        lenience=lenience,
        block_length=block_length,
        num_drafts=num_drafts,
    )
    return speculate_checked(speculation, target_params, draft_params, inputs, rng, row_ids)


def speculate_checked(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    inputs: Array,
    rng: jax.Array,
    row_ids: jax.Array | None = None,
) -> SpeculativeOutput:
    """`speculate`, compiled, with input and output checked on the host."""
    params = target_params, draft_params
    check_request(inputs, row_ids, speculation.configs, rng=rng)
    row_ids = keys.default_row_ids(inputs, row_ids)
    output = _compiled(speculation, *params, inputs, rng, row_ids)
    check_finite(output.statistics.finite, speculation.names)
    return output


def speculate(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    inputs: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array | None = None,
) -> SpeculativeOutput:
    """The traceable sampler: inputs [B, S] -> texts with the law of the processed target.

    Rows with a negative id stay empty and count nothing. A row's tokens depend on `rng`, its id
    and its prompt, not on the batch around it.
    """
    row_ids = keys.default_row_ids(inputs, row_ids)
    params = in_compute_dtypes(speculation, target_params, draft_params)
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.active),
        lambda state: advance(speculation, *params, state),
        begin(speculation, *params, inputs, rng, row_ids),
    )
    return output_of(speculation, state)


_compiled = jax.jit(speculate, static_argnums=0)


def in_compute_dtypes(
    speculation: Speculation, target_params: Params, draft_params: Params
) -> tuple[Params, Params]:
    """Parameters of target and draft as products read them, for a loop of `advance`."""
    s = speculation
    return in_compute_dtype(s.target, target_params), in_compute_dtype(s.draft, draft_params)


def begin(
    speculation: Speculation,
    target_params: Params,
    draft_params: Params,
    inputs: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array,
) -> State:
    """Both models read the prompts [B, S]; nothing is emitted yet."""
    s, batch_size = speculation, inputs.shape[0]
    inputs = inputs.astype(jnp.int32)
    limit = s.max_new_tokens + s.gamma
    target_cache, pending = start(s.target, target_params, inputs, limit)
    draft_cache, _ = start(s.draft, draft_params, inputs, limit)
    config, hidden = s.target.config, None
    draft_lengths = jnp.maximum(draft_cache.lengths - 1, 0)
    # of an encoder-decoder none is read yet, and what stands here is not looked at
    previous = jnp.take_along_axis(inputs, draft_lengths[:, None], axis=1)[:, 0]
    if s.keeps_hidden:
        hidden = jnp.zeros((batch_size, s.room, config.d_model), config.dtype)
    return State(
        keys=keys.row_keys(rng, row_ids),
        previous=previous,
        pending=pending,
        active=row_ids >= 0,
        allowance=first_allowance(s.block_length, s.gamma, batch_size),
        tokens=jnp.full((batch_size, s.room), config.pad_id, jnp.int32),
        origins=jnp.zeros((batch_size, s.room), jnp.int8),
        lengths=jnp.zeros(batch_size, jnp.int32),
        statistics=no_statistics(batch_size, s.gamma),
        hidden=hidden,
        target_cache=per_draft(target_cache, s.num_drafts),
        draft_cache=per_draft(rollback(draft_cache, draft_lengths), s.num_drafts),
    )


def advance(
    speculation: Speculation, target_params: Params, draft_params: Params, state: State
) -> State:
    """One block: draft, verify, emit, roll back. Rows that are not active stay as they are."""
    s = speculation
    uniforms = _block_uniforms(s, state)
    draft = draft_block(s, draft_params, state, uniforms)
    pending = per_draft(state.pending, s.num_drafts)
    block = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
    hidden, target_cache = extend_hidden(s.target, target_params, state.target_cache, block)
    logits = unembed(s.target, target_params, hidden)
    target_probs = process(logits[..., : s.target.config.num_pieces], s.sampling)
    verdict = verify(s, target_probs, draft, uniforms)
    after = emit(s, state, verdict, draft.steps)
    if state.hidden is not None:
        hidden = follow(hidden, verdict.path, s.num_drafts)
        after = after.replace(hidden=_write(state.hidden, hidden, state.lengths))
    # The pending token and the accepted ones are kept; frozen rows do not move.
    kept = per_draft(jnp.where(after.active, 1 + verdict.num_accepted, 0), s.num_drafts)
    lengths = state.target_cache.lengths + kept
    target_cache = share_cache(target_cache, verdict.path, s.num_drafts)
    draft_cache = share_cache(draft.cache, verdict.path, s.num_drafts)
    return after.replace(
        target_cache=rollback(target_cache, lengths),
        draft_cache=rollback(draft_cache, jnp.maximum(lengths - 1, 0)),
    )


def draft_block(
    speculation: Speculation, draft_params: Params, state: State, uniforms: Uniforms
) -> Draft:
    """Drafts until every active row has stopped; nothing reads the last token any more.

    A row stops behind an end-of-sequence, at its allowance, or where `block_length` says so; all
    of them draft-side knowledge. A greedy q is one-hot and never unsure, so there `block_length`
    looks at the draft's softmax at temperature 1.
    """
    s, config = speculation, speculation.draft.config
    sampling = s.draft_sampling or s.sampling
    active, allowance = per_draft((state.active, state.allowance), s.num_drafts)
    rows = active.shape[0]

    def some_row_drafts(draft: Draft) -> jax.Array:
        return (draft.steps < s.gamma) & jnp.any(draft.active)

    def step(draft: Draft, logits: jax.Array, cache: Cache) -> Draft:
        token, probs = draw(logits, uniforms.draft[:, draft.steps], sampling)
        token = jnp.where(draft.active, token, config.pad_id)
        lengths = draft.lengths + draft.active
        # a rule that does not look leaves the softmax to the compiler, which drops it
        judged = process(logits, STANDARD) if sampling.is_greedy else probs
        goes_on = keeps_drafting(s.block_length, judged, token) & (lengths < allowance)
        return Draft(
            tokens=draft.tokens.at[:, draft.steps].set(token),
            probs=draft.probs.at[:, draft.steps].set(probs),
            lengths=lengths,
            finite=draft.finite & ~(draft.active & jnp.isnan(probs[:, 0])),
            steps=draft.steps + 1,
            last=token,
            active=draft.active & goes_on & (token != config.eos_id),
            cache=cache,
        )

    empty = Draft(
        tokens=jnp.full((rows, s.gamma), config.pad_id, jnp.int32),
        probs=jnp.zeros((rows, s.gamma, config.num_pieces), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        finite=jnp.ones(rows, bool),
        steps=jnp.zeros((), jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        active=active,
        cache=state.draft_cache,
    )
    return jax.lax.while_loop(
        some_row_drafts,
        lambda draft: step(draft, *next_logits(s.draft, draft_params, draft.cache, draft.last)),
        step(empty, *_first_logits(s, draft_params, state)),
    )


def _first_logits(
    speculation: Speculation, draft_params: Params, state: State
) -> tuple[jax.Array, Cache]:
    """The draft reads the two last tokens of the text: logits [R, pieces], caught up cache.

    A row with one token alone reads padding behind it, which its cache forgets.
    """
    s, config = speculation, speculation.draft.config
    previous, pending = per_draft((state.previous, state.pending), s.num_drafts)
    both = state.target_cache.lengths > 0
    first, second = jnp.where(both, previous, pending), jnp.where(both, pending, config.pad_id)
    tokens = jnp.stack([first, second], axis=1)
    hidden, cache = extend_hidden(s.draft, draft_params, state.draft_cache, tokens)
    last = jnp.where(both[:, None], hidden[:, 1], hidden[:, 0])
    logits = unembed(s.draft, draft_params, last[:, None])[:, 0, : config.num_pieces]
    return logits, rollback(cache, state.target_cache.lengths + 1)


def verify(
    speculation: Speculation, target_probs: jax.Array, draft: Draft, uniforms: Uniforms
) -> Verdict:
    """Applies the rule to target_probs [R, gamma + 1, V] and the drafts of every row."""
    s = speculation
    # A distribution with a NaN is NaN in every entry.
    needed = jnp.arange(s.gamma + 1)[None] <= draft.lengths[:, None]
    finite = draft.finite & ~jnp.any(jnp.isnan(target_probs[:, :, 0]) & needed, axis=1)
    drafted = (target_probs, draft.probs, draft.tokens, draft.lengths, uniforms.tests)
    if s.num_drafts == 1:
        rule = choose_rule("greedy" if s.sampling.is_greedy else s.verification, s.lenience)
        num_accepted, next_token = rule(*drafted, uniforms.last[:, -1])
        path = jnp.zeros_like(num_accepted)
    else:
        drafted = by_row(drafted, s.num_drafts)
        path, num_accepted, next_token = k_seq_rule(*drafted, uniforms.last)
    return Verdict(
        path=path,
        tokens=follow(draft.tokens, path, s.num_drafts),
        lengths=follow(draft.lengths, path, s.num_drafts),
        num_accepted=num_accepted,
        next_token=next_token,
        finite=jnp.all(by_row(finite, s.num_drafts), axis=1),
    )


def emit(speculation: Speculation, state: State, verdict: Verdict, draft_steps: jax.Array) -> State:
    """Writes x_1 .. x_n and the next token, ends rows, and counts. Caches are left alone."""
    s, config = speculation, speculation.target.config
    emits = state.active & verdict.finite
    n, position = verdict.num_accepted[:, None], jnp.arange(s.gamma + 1)[None]
    tokens = jnp.pad(verdict.tokens, ((0, 0), (0, 1)))
    ended_inside = jnp.any((tokens == config.eos_id) & (position < n), axis=1)
    count = jnp.where(emits, verdict.num_accepted + jnp.where(ended_inside, 0, 1), 0)
    ends = emits & (ended_inside | (verdict.next_token == config.eos_id))
    lengths = state.lengths + count
    active = emits & ~ends & (lengths < s.max_new_tokens)

    all_accepted = verdict.num_accepted == verdict.lengths
    block = jnp.where(position < n, tokens, verdict.next_token[:, None])
    origin = jnp.where(all_accepted, BONUS, CORRECTED)[:, None]
    origin = jnp.where(position < n, ACCEPTED, origin)
    read = jnp.concatenate([state.pending[:, None], verdict.tokens], axis=1)
    previous = jnp.take_along_axis(read, n, axis=1)[:, 0]
    is_emitted = position < count[:, None]
    statistics = count_block(state.statistics, verdict, draft_steps, count, emits)
    return state.replace(
        previous=jnp.where(active, previous, state.previous),
        pending=jnp.where(active, verdict.next_token, state.pending),
        active=active,
        allowance=next_allowance(s.block_length, s.gamma, state.allowance, all_accepted),
        tokens=_write(state.tokens, jnp.where(is_emitted, block, config.pad_id), state.lengths),
        origins=_write(state.origins, jnp.where(is_emitted, origin, 0), state.lengths),
        lengths=lengths,
        statistics=statistics.replace(
            finished=statistics.finished | (ends & (lengths <= s.max_new_tokens)),
            finite=statistics.finite & (verdict.finite | ~state.active),
        ),
    )


def output_of(speculation: Speculation, state: State) -> SpeculativeOutput:
    """What the rows have written so far, cut at the limit."""
    limit = speculation.max_new_tokens
    return SpeculativeOutput(
        tokens=state.tokens[:, :limit],
        lengths=jnp.minimum(state.lengths, limit),
        origins=state.origins[:, :limit],
        statistics=state.statistics,
        hidden=None if state.hidden is None else state.hidden[:, :limit],
        lossless=speculation.is_lossless,
    )


def _block_uniforms(speculation: Speculation, state: State) -> Uniforms:
    """All random numbers of every row's next block, in one draw."""
    k, gamma = speculation.num_drafts, speculation.gamma
    blocks = state.statistics.target_calls
    flat = keys.block_uniforms(state.keys, blocks, 2 * k * gamma + gamma + 1)
    draft, tests, last = jnp.split(flat, [k * gamma, 2 * k * gamma], axis=1)
    return Uniforms(draft.reshape(-1, gamma), tests.reshape(-1, gamma), last)


def _write(buffer: jax.Array, block: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes block [B, gamma + 1, ...] into buffer [B, room, ...] from column starts [B] on.

    A row that ended past the limit is written behind it, which is cut.
    """
    at_row = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    return at_row(buffer, block.astype(buffer.dtype), starts)
