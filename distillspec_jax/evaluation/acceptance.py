"""Acceptance rate (alpha) and block efficiency (tau): measured, and predicted from the text.

alpha is measured in three ways that must agree for token verification of whole blocks: counted by
the sampler (accepted / tested), summed from min(p, q) along texts of the target, and read off the
lengths of the blocks.
Only the first and the third need speculative decoding; only the second knows every gamma.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.decoding.sampling import STANDARD, Sampling, process
from distillspec_jax.decoding.state import ACCEPTED, CORRECTED, SpeculativeOutput, check_pair
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.intervals import Estimate, ratio, ratio_of_ratios
from distillspec_jax.models.transformer import Params, Transformer, hidden_states, unembed


def token_acceptance(target_probs: jax.Array, draft_probs: jax.Array) -> jax.Array:
    """beta = sum_v min(p_v, q_v), the probability that a drafted token is accepted.

    Source: arXiv 2211.17192, Theorem 3.5; equals 1 - TVD(p, q).

    Args:
      target_probs, draft_probs: [..., V], after temperature, top-k and top-p.

    Returns:
      [...] within [0, 1].
    """
    return jnp.sum(jnp.minimum(target_probs, draft_probs), axis=-1)


def block_efficiency(emitted: np.ndarray, calls: np.ndarray, gamma: int) -> Estimate:
    """tau, tokens per target call, of blocks of up to gamma drafted tokens."""
    return ratio(emitted, calls).within(1, gamma + 1)


def acceptance_rate(accepted: np.ndarray, tested: np.ndarray) -> Estimate:
    """alpha, accepted tokens per tested one."""
    return ratio(accepted, tested).within(0, 1)


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """Acceptance along given texts; every array is [B, T] and 0 past the end of a text.

    overlap: beta_t = sum_v min(p_t(v), q_t(v)).
    accept: min(1, q_t(y_t) / p_t(y_t)), the probability that the token that stands there was
      drafted and accepted, given that it stands there.
    lengths: [B], tokens of each text with its end-of-sequence.
    """

    overlap: np.ndarray
    accept: np.ndarray
    lengths: np.ndarray


@functools.partial(jax.jit, static_argnames=("target", "draft", "sampling", "draft_sampling"))
def score_texts(
    target, target_params, draft, draft_params, inputs, texts, lengths, sampling, draft_sampling
):
    """overlap and accept [B, T] of `TeacherForced`, compiled: what `along_texts` brings home."""
    hidden = (
        hidden_states(target, target_params, inputs, texts),
        hidden_states(draft, draft_params, inputs, texts),
    )

    def probs(model, params, hidden, sampling):  # as the sampler: of pieces, not of padding rows
        return process(unembed(model, params, hidden)[..., : model.config.num_pieces], sampling)

    def at_position(args):  # one position at a time: [B, V], never [B, T, V]
        target_hidden, draft_hidden, tokens = args
        p = probs(target, target_params, target_hidden, sampling)
        q = probs(draft, draft_params, draft_hidden, draft_sampling)
        p_token = jnp.take_along_axis(p, tokens[:, None], axis=-1)[:, 0]
        q_token = jnp.take_along_axis(q, tokens[:, None], axis=-1)[:, 0]
        accept = jnp.minimum(1.0, q_token / jnp.where(p_token > 0, p_token, jnp.inf))
        return token_acceptance(p, q), accept

    overlap, accept = jax.lax.map(at_position, tuple(x.swapaxes(0, 1) for x in (*hidden, texts)))
    is_text = jnp.arange(texts.shape[1])[None] < lengths[:, None]
    return tuple(jnp.where(is_text, x.T, 0.0) for x in (overlap, accept))


def along_texts(
    target: Transformer,
    target_params: Params,
    draft: Transformer,
    draft_params: Params,
    inputs: jax.Array,
    texts: jax.Array,
    lengths: jax.Array,
    *,
    sampling: Sampling = STANDARD,
    draft_sampling: Sampling | None = None,
) -> TeacherForced:
    """Scores texts of the target with both models, one forward pass each (arXiv 2310.08461, eq. 3).

    Args:
      inputs: [B, S] int32, right-padded prompts.
      texts: [B, T] int32, sampled from the target under `sampling`.
      lengths: [B], tokens of each text, its end-of-sequence included; a model may write the
        padding's id, so the texts alone do not tell.
      sampling, draft_sampling: processing of target and draft; the draft's defaults to the
        target's.

    Returns:
      `TeacherForced` on the host.

    Raises:
      UserError: models that are not of one kind or do not speak one vocabulary.
    """
    check_pair(target, draft)
    models = target, target_params, draft, draft_params
    arrays = score_texts(*models, inputs, texts, lengths, sampling, draft_sampling or sampling)
    overlap, accept = (np.asarray(x, np.float64) for x in arrays)
    return TeacherForced(overlap, accept, np.asarray(lengths))


def blocks_along_texts(
    accept: np.ndarray, lengths: np.ndarray, gamma: int
) -> tuple[np.ndarray, np.ndarray]:
    """Expected (tokens, target calls) of each text for any gamma, without decoding.

    A block that starts at t drafts tokens t .. t + gamma - 1; the first that is not accepted ends
    the block as its correction, else token t + gamma is the bonus. With f_t the probability that
    a block starts at t, calls = sum_t f_t, and over blocks that no end cuts
    tokens / calls = 1 + sum_{k<=gamma} E prod_{j<=k} beta_j. Exact for token
    verification where `accept` is `TeacherForced.accept`; sums over texts give tau. Only blocks
    that start before T - gamma count: the limit of the texts cannot cut those, as it does not cut
    what the sampler counts. (The first one counts always: of T <= gamma tau comes out too low.)

    Args:
      accept: [B, T], probability that the token at each position was drafted and accepted; T is
        the limit up to which texts were written.
      lengths: [B], tokens of each text; an accepted end-of-sequence ends block and text.
      gamma: drafted tokens per block, at least 1.

    Raises:
      UserError: gamma < 1.
    """
    if gamma < 1:
        raise UserError(f"gamma is {gamma}, must be at least 1")
    batch_size, width = accept.shape
    tokens, calls = np.zeros((2, batch_size))
    starts = np.zeros((batch_size, width + gamma + 1))
    starts[:, 0] = 1
    for t in range(max(1, width - gamma)):
        reach = starts[:, t] * (t < lengths)  # the block got this far without a rejection
        calls += reach
        for k in range(gamma + 1):
            here = accept[:, t + k] if k < gamma and t + k < width else 0.0
            tokens += reach * (t + k < lengths)
            starts[:, t + k + 1] += reach * (1 - here)
            reach = reach * here
    return tokens, calls


def iid_block_efficiency(acceptance_rate: float, gamma: int) -> float:
    """tau_iid = (1 - alpha^(gamma+1)) / (1 - alpha): too low where acceptance varies.

    Source: arXiv 2211.17192, equation 1. It holds for acceptances independent along the text.
    """
    return float(sum(acceptance_rate**k for k in range(gamma + 1)))


def from_blocks(origins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accepted and tested tokens read off the texts: a correction ends each block that failed.

    Args:
      origins: [P, L], how each token came to be (`SpeculativeOutput.origins`); bonus tokens were
        never tested, and what the length limit cut off is not seen.

    Returns:
      (accepted [P], tested [P]); alpha is the ratio of their sums.
    """
    accepted = np.sum(origins == ACCEPTED, axis=1)
    return accepted, accepted + np.sum(origins == CORRECTED, axis=1)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one draft did on each prompt, every column [prompts, ...], or [seeds, prompts, ...].

    accepted, tested, emitted, calls: counted by the sampler.
    block_accepted, block_tested: read off the texts (`from_blocks`).
    overlap, text_tokens: sum of beta along the target's own text, and its length.
    path_tokens, path_calls: expected along that text (`blocks_along_texts`).
    histogram: [prompts, gamma + 1], blocks by number of accepted tokens.
    """

    accepted: np.ndarray
    tested: np.ndarray
    emitted: np.ndarray
    calls: np.ndarray
    block_accepted: np.ndarray
    block_tested: np.ndarray
    overlap: np.ndarray
    text_tokens: np.ndarray
    path_tokens: np.ndarray
    path_calls: np.ndarray
    histogram: np.ndarray

    @classmethod
    def of(cls, output: SpeculativeOutput, along: TeacherForced, gamma: int) -> Counts:
        """The columns of one draft from its real decoding and from the target's texts."""
        statistics = output.statistics
        block_accepted, block_tested = from_blocks(np.asarray(output.origins))
        path_tokens, path_calls = blocks_along_texts(along.accept, along.lengths, gamma)
        return cls(
            accepted=np.asarray(statistics.accepted),
            tested=np.asarray(statistics.tested),
            emitted=np.asarray(statistics.emitted),
            calls=np.asarray(statistics.target_calls),
            block_accepted=block_accepted,
            block_tested=block_tested,
            overlap=along.overlap.sum(axis=1),
            text_tokens=along.lengths,
            path_tokens=path_tokens,
            path_calls=path_calls,
            histogram=np.asarray(statistics.accepted_histogram),
        )

    @classmethod
    def stack(cls, parts: Sequence[Counts]) -> Counts:
        """Seeds of one draft, measured on the same prompts."""
        return cls(
            *(
                np.stack([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(cls)
            )
        )

    @property
    def gamma(self) -> int:
        return self.histogram.shape[-1] - 1

    @property
    def block_efficiency(self) -> Estimate:
        """tau, tokens per target call."""
        return block_efficiency(self.emitted, self.calls, self.gamma)

    def gain(self, base: Counts) -> Estimate:
        """tau over the tau of another draft on the same prompts, paired."""
        return ratio_of_ratios(self.emitted, self.calls, base.emitted, base.calls)

    def keys(self) -> dict[str, Any]:
        """Entries of a summary: alpha in three ways, tau measured and predicted in two."""
        counted = acceptance_rate(self.accepted, self.tested)
        return {
            **counted.keys("acceptance_rate"),
            **acceptance_rate(self.overlap, self.text_tokens).keys("acceptance_rate_overlap"),
            **acceptance_rate(self.block_accepted, self.block_tested).keys(
                "acceptance_rate_blocks"
            ),
            **self.block_efficiency.keys("block_efficiency"),
            **block_efficiency(self.path_tokens, self.path_calls, self.gamma).keys(
                "block_efficiency_path"
            ),
            "block_efficiency_iid": iid_block_efficiency(counted.value, self.gamma),
            "accepted_histogram": self.histogram.sum(
                axis=tuple(range(self.histogram.ndim - 1))
            ).tolist(),
            "num_prompts": counted.n,
        }
