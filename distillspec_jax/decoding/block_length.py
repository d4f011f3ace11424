"""How many tokens a row drafts before the target looks: fixed, adaptive, or tuned.

Adaptive rules see what the draft knew (the tokens of this block and the q they came from) and how
earlier blocks ended, never p of the tokens under test; so the output law stays the target's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.errors import UserError, check_count, check_number


@dataclasses.dataclass(frozen=True)
class BlockLength:
    """When a row stops drafting, within the static maximum gamma. The last token is kept.

    q is what the draft drew from; of a greedy draft, its softmax at temperature 1.

    min_confidence: stop after a token with q(x) below this; 0 never stops. The transformers
        library takes 0.4.
    max_entropy: stop after a token drawn at an entropy of q above this, in nats; 0 never stops.
        SVIP (arXiv 2411.18462) stops at sqrt(0.15 H) > 0.3, which is 0.6.
    schedule_start: block length a row begins with; then + 2 after a block that was accepted
        whole, - 1 (down to 1) after any other. 0 turns the schedule off: gamma, always.
    """

    min_confidence: float = 0.0
    max_entropy: float = 0.0
    schedule_start: int = 0

    def __post_init__(self) -> None:
        for field in ("min_confidence", "max_entropy"):
            check_number(field, getattr(self, field))
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"min_confidence is {self.min_confidence}; it must be in [0, 1]")
        if not self.max_entropy >= 0:
            raise UserError(f"max_entropy is {self.max_entropy}; it must be 0 (off) or more nats")
        check_count("schedule_start", self.schedule_start, least=0, zero="off")


FIXED = BlockLength()


def keeps_drafting(rule: BlockLength, draft_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether to draft on after tokens [B], by the draft's distributions [B, V]: [B] bool."""
    goes_on = jnp.ones(tokens.shape, bool)
    if rule.min_confidence > 0:
        confidence = jnp.take_along_axis(draft_probs, tokens[:, None], axis=1)[:, 0]
        goes_on &= confidence >= rule.min_confidence
    if rule.max_entropy > 0:
        goes_on &= _entropy(draft_probs) <= rule.max_entropy
    return goes_on


def first_allowance(rule: BlockLength, gamma: int, batch_size: int) -> jax.Array:
    """Tokens each row may draft in its first block: [B] int32."""
    start = min(rule.schedule_start, gamma) if rule.schedule_start else gamma
    return jnp.full(batch_size, start, jnp.int32)


def next_allowance(
    rule: BlockLength, gamma: int, allowance: jax.Array, all_accepted: jax.Array
) -> jax.Array:
    """Tokens each row may draft in its next block: [B] int32 in 1..gamma."""
    if not rule.schedule_start:
        return allowance
    return jnp.clip(jnp.where(all_accepted, allowance + 2, allowance - 1), 1, gamma)


def _entropy(probs: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats."""
    return -jnp.sum(probs * jnp.log(jnp.where(probs > 0, probs, 1)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The best block length among those measured, and the predicted speed-up of each.

    A best speed-up below 1 says that decoding without the draft is faster.
    """

    gamma: int
    speedups: dict[int, float]


def tune(
    block_efficiency: Mapping[int, float],
    cost_ratio: float,
    verification_cost: Mapping[int, float],
) -> Tuning:
    """The gamma that maximises tau(gamma) / (c gamma + v(gamma)); the smaller one on ties.

    block_efficiency: tau by gamma. cost_ratio: c, a draft step over a target step.
    verification_cost: v by gamma, a target call on gamma + 1 positions over one on a single one.
    Raises UserError if no gamma has both.
    """
    gammas = sorted(block_efficiency.keys() & verification_cost.keys())
    if not gammas:
        raise UserError(
            f"no block length has both a block efficiency ({sorted(block_efficiency)}) and a "
            f"verification cost ({sorted(verification_cost)})"
        )
    speedups = {g: block_efficiency[g] / (cost_ratio * g + verification_cost[g]) for g in gammas}
    return Tuning(max(gammas, key=lambda gamma: speedups[gamma]), speedups)


def efficiency_by_gamma(emitted_histogram: Sequence[int] | np.ndarray) -> dict[int, float]:
    """tau for every gamma up to G from blocks decoded at gamma = G.

    tau(gamma) = sum_{i <= gamma + 1} P(at least i emitted), with the blocks that began where they
    did at G; for token and for block verification, as both accept i tokens or more with a
    probability that does not depend on gamma >= i. At G it is emitted tokens over target calls.
    emitted_histogram: [G + 1] blocks by number of emitted tokens, from 1 on, summed over rows; an
    accepted end-of-sequence has no token behind it, so accepted lengths would not do.
    """
    histogram = np.asarray(emitted_histogram, np.float64)
    at_least = np.cumsum(histogram[::-1])[::-1] / histogram.sum()
    return {gamma: float(at_least[: gamma + 1].sum()) for gamma in range(1, len(at_least))}
