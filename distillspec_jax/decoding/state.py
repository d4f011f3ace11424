"""What the speculative sampler is told, what it carries from block to block, what it returns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from distillspec_jax.data.vocabulary import check_same
from distillspec_jax.decoding.block_length import FIXED, BlockLength
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import STANDARD, Sampling
from distillspec_jax.decoding.verification import RULES
from distillspec_jax.errors import UserError, check_count, check_kind, unknown_name
from distillspec_jax.models.cache import Cache
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer

ACCEPTED, CORRECTED, BONUS = 1, 2, 3  # origins of a token; 0 is padding


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Everything static about a sampler: two models of one kind and vocabulary, and the settings.

    gamma: tokens a block may draft; `block_length` may stop a row earlier.
    draft_sampling: of the draft, `sampling` if None; any choice leaves the law the target's.
    verification: "token", "block" or "greedy"; at temperature 0 all mean "greedy".
    lenience: lossy acceptance, with token verification alone; an exact one becomes None.
    num_drafts: independent drafts of every block, verified in one call; with more than one,
        token verification becomes K-SEQ (`multi_draft.k_seq_rule`).
    keeps_hidden: whether the output has the target's hidden states, for a loss on its texts.
    """

    target: Transformer
    draft: Transformer
    gamma: int
    max_new_tokens: int
    sampling: Sampling = STANDARD
    draft_sampling: Sampling | None = None
    verification: str = "token"
    lenience: Lenience | None = None
    block_length: BlockLength = FIXED
    num_drafts: int = 1
    keeps_hidden: bool = False

    def __post_init__(self) -> None:
        check_kind("sampling", self.sampling, Sampling)
        if self.draft_sampling is not None:
            check_kind("draft_sampling", self.draft_sampling, Sampling)
        check_kind("block_length", self.block_length, BlockLength)
        check_kind("verification", self.verification, str)
        if self.lenience is not None:
            check_kind("lenience", self.lenience, Lenience)
            if self.lenience.is_exact:
                object.__setattr__(self, "lenience", None)
        for field in ("gamma", "max_new_tokens", "num_drafts"):
            check_count(field, getattr(self, field))
        if self.verification not in RULES:
            raise unknown_name("verification rule", self.verification, RULES)
        if self.verification == "greedy" and not self.sampling.is_greedy:
            raise UserError(
                "greedy verification needs temperature 0; sample with 'token' or 'block'"
            )
        if self.lenience is not None and self.verification == "block":
            raise UserError(
                "lenience changes token verification; with 'block' it has no exact base"
            )
        if self.num_drafts > 1 and (self.verification == "block" or self.lenience is not None):
            raise UserError("several drafts need token verification without lenience")
        check_pair(self.target, self.draft)

    @property
    def is_lossless(self) -> bool:
        """Whether the output has the target's law; at temperature 0 no lenience changes it."""
        return self.sampling.is_greedy or self.lenience is None

    @property
    def configs(self) -> tuple[ModelConfig, ModelConfig]:
        return self.target.config, self.draft.config

    @property
    def names(self) -> str:
        return f"target '{self.target.config.name}' or draft '{self.draft.config.name}'"

    @property
    def room(self) -> int:
        """Columns of the output while it is written: the last block may pass the limit."""
        return self.max_new_tokens + self.gamma + 1


class Statistics(struct.PyTreeNode):
    """Counts per row, summed over its blocks; conventions in `speculative`.

    target_calls: [B] int32, blocks verified.
    draft_steps: [B] forward passes of the draft while the row was active, those it only waited in
        (for other rows of the batch) included.
    drafted, tested, accepted, emitted: [B] tokens.
    accepted_histogram: [B, gamma + 1] blocks by number of accepted tokens, from 0 on.
    emitted_histogram: [B, gamma + 1] blocks by number of emitted tokens, from 1 on.
    tested_per_position, accepted_per_position: [B, gamma] blocks by position in the block.
    finished: [B] bool, ended by end-of-sequence within the limit.
    finite: [B] bool, False where a model gave NaN: the row stops before that block.
    """

    target_calls: jax.Array
    draft_steps: jax.Array
    drafted: jax.Array
    tested: jax.Array
    accepted: jax.Array
    emitted: jax.Array
    accepted_histogram: jax.Array
    emitted_histogram: jax.Array
    tested_per_position: jax.Array
    accepted_per_position: jax.Array
    finished: jax.Array
    finite: jax.Array

    @property
    def block_efficiency(self) -> jax.Array:
        """tau of each row [B], NaN without a block; a corpus figure is the ratio of the sums."""
        return _rate(self.emitted, self.target_calls)

    @property
    def acceptance_rate(self) -> jax.Array:
        """alpha of each row [B], NaN without a test; a corpus figure is the ratio of the sums."""
        return _rate(self.accepted, self.tested)


def _rate(count: jax.Array, out_of: jax.Array) -> jax.Array:
    return jnp.where(out_of > 0, count / jnp.maximum(out_of, 1), jnp.nan)


class SpeculativeOutput(struct.PyTreeNode):
    """Texts of a batch and what they cost; L is the limit.

    tokens: [B, L] int32, pad_id after the end. lengths: [B] int32, with the end-of-sequence.
    origins: [B, L] int8, how each token came to be: ACCEPTED, CORRECTED or BONUS; 0 is padding.
    hidden: [B, L, D], what the target drew or judged each token by, before the vocabulary product;
        arbitrary behind a row's length, None unless kept.
    lossless: whether the tokens have exactly the law of the target.
    """

    tokens: jax.Array
    lengths: jax.Array
    origins: jax.Array
    statistics: Statistics
    hidden: jax.Array | None
    lossless: bool = struct.field(pytree_node=False)


class State(struct.PyTreeNode):
    """A batch between two blocks. Every leaf has the batch in front; caches have B * num_drafts.

    keys: [B] keys of the rows' random numbers.
    previous: [B] int32, the token before `pending`, which the draft may not have read; arbitrary
        where there is none.
    pending: [B] int32, the last emitted token; fed to neither model.
    active: [B] bool, rows still writing; the others are frozen.
    allowance: [B] int32, tokens the row may draft in its next block.
    tokens, origins: [B, L + gamma + 1], written from the left.
    lengths: [B] int32, tokens emitted, the part past the limit included.
    hidden: [B, L + gamma + 1, D] of the target, aligned with `tokens`; None unless kept.
    """

    keys: jax.Array
    previous: jax.Array
    pending: jax.Array
    active: jax.Array
    allowance: jax.Array
    tokens: jax.Array
    origins: jax.Array
    lengths: jax.Array
    statistics: Statistics
    hidden: jax.Array | None
    target_cache: Cache
    draft_cache: Cache


class Uniforms(struct.PyTreeNode):
    """The random numbers of one block: draft, tests: [R, gamma]; last: [B, gamma + 1].

    `last` has one for the token behind n accepted ones, for each n; rules that draw one only
    take its last column.
    """

    draft: jax.Array
    tests: jax.Array
    last: jax.Array


class Draft(struct.PyTreeNode):
    """What the draft proposes for one block; R = B * num_drafts, the drafts of a row adjacent.

    tokens: [R, gamma] int32, pad_id from `lengths` [R] on.
    probs: [R, gamma, V] float32, the q that each token was drawn from.
    finite: [R] bool. steps: [] int32, forward passes.
    last, active: [R], the token to feed next, and whether the draft goes on.
    """

    tokens: jax.Array
    probs: jax.Array
    lengths: jax.Array
    finite: jax.Array
    steps: jax.Array
    last: jax.Array
    active: jax.Array
    cache: Cache


class Verdict(struct.PyTreeNode):
    """What the target made of the drafts of every row.

    path: [B] int32, the draft that was followed; 0 where there is one.
    tokens, lengths: [B, gamma] and [B] int32, what that draft had proposed.
    num_accepted: [B] int32, its tokens that stay. next_token: [B] int32, correction or bonus.
    finite: [B] bool, whether both models gave numbers.
    """

    path: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    num_accepted: jax.Array
    next_token: jax.Array
    finite: jax.Array


def no_statistics(batch_size: int, gamma: int) -> Statistics:
    """All counts zero."""
    zero, per_position = jnp.zeros(batch_size, jnp.int32), jnp.zeros((batch_size, gamma), jnp.int32)
    per_length = jnp.zeros((batch_size, gamma + 1), jnp.int32)
    return Statistics(
        target_calls=zero,
        draft_steps=zero,
        drafted=zero,
        tested=zero,
        accepted=zero,
        emitted=zero,
        accepted_histogram=per_length,
        emitted_histogram=per_length,
        tested_per_position=per_position,
        accepted_per_position=per_position,
        finished=jnp.zeros(batch_size, bool),
        finite=jnp.ones(batch_size, bool),
    )


def count_block(
    statistics: Statistics,
    verdict: Verdict,
    draft_steps: jax.Array,
    emitted: jax.Array,
    counts: jax.Array,
) -> Statistics:
    """Adds one block of the rows [B] where `counts`; emitted: [B] tokens it gave."""
    accepted, drafted = verdict.num_accepted, verdict.lengths
    tested = jnp.minimum(accepted + 1, drafted)
    gamma = verdict.tokens.shape[1]

    def ones_below(ends: jax.Array) -> jax.Array:
        return (jnp.arange(gamma)[None] < ends[:, None]) & counts[:, None]

    def one_at(index: jax.Array) -> jax.Array:
        return (jnp.arange(gamma + 1)[None] == index[:, None]) & counts[:, None]

    return statistics.replace(
        target_calls=statistics.target_calls + counts,
        draft_steps=statistics.draft_steps + counts * draft_steps,
        drafted=statistics.drafted + counts * drafted,
        tested=statistics.tested + counts * tested,
        accepted=statistics.accepted + counts * accepted,
        emitted=statistics.emitted + counts * emitted,
        accepted_histogram=statistics.accepted_histogram + one_at(accepted),
        emitted_histogram=statistics.emitted_histogram + one_at(emitted - 1),
        tested_per_position=statistics.tested_per_position + ones_below(tested),
        accepted_per_position=statistics.accepted_per_position + ones_below(accepted),
    )


def check_pair(
    target: Transformer,
    draft: Transformer,
    *,
    fingerprints: tuple[str | None, str | None] = (None, None),
) -> None:
    """Raises UserError unless the two models are of one kind and speak one vocabulary.

    Args:
      fingerprints: of the target's and the draft's pieces, compared where both are known, as the
        number of pieces and the special ids always are.
    """
    t, d = target.config, draft.config
    if t.is_encoder_decoder != d.is_encoder_decoder:
        kinds = {True: "an encoder-decoder", False: "decoder-only"}
        raise UserError(
            f"target '{t.name}' is {kinds[t.is_encoder_decoder]} but draft '{d.name}' is "
            f"{kinds[d.is_encoder_decoder]}; both must be of one kind"
        )
    ours, theirs = (
        {"vocabulary_fingerprint": pieces, "vocabulary_size": c.num_pieces, **c.special_ids}
        for c, pieces in zip((t, d), fingerprints, strict=True)
    )
    check_same(ours, theirs, (f"target '{t.name}'", f"draft '{d.name}'"))
