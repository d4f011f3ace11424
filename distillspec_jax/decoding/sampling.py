"""From logits to a distribution and a token: temperature, top-k, top-p, inverse CDF.

One function, `draw`, makes both, so the distribution a draft token is judged by is the one it
was drawn from. Everything is float32 and built of reductions: on a CPU a sort or an argmax over
32,000 logits costs far more than the softmax, and a running sum is as slow.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distillspec_jax.errors import UserError, check_count, check_number

CDF_BLOCK = 128  # entries of a vocabulary whose running sum is formed at a time
SMALLEST_NORMAL = float(jnp.finfo(jnp.float32).tiny)  # anything below is 0 to XLA, no divisor
_ONE_BITS = 0x3F800000  # float32 1.0; positive floats order as their bits do


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How logits become a distribution.

    temperature: divides the logits; 0 is greedy (the lowest index among equal maxima).
    top_k: keep the k largest (all that equal the k-th); 0 keeps all.
    top_p: keep the fewest largest tokens whose probabilities reach top_p (all that equal the
        last one); applied after temperature and top_k; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for field in ("temperature", "top_p"):
            check_number(field, getattr(self, field))
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        check_count("top_k", self.top_k, least=0, zero="off")
        if not SMALLEST_NORMAL <= self.top_p <= 1:  # below, float32 has 0
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1], 1 being off")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


STANDARD = Sampling()


def process(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sampling` makes of logits [..., V]: probabilities [..., V] float32.

    A row with a NaN or an infinite maximum comes out NaN in every entry, whatever the settings.
    """
    logits = logits.astype(jnp.float32)
    if sampling.is_greedy:
        return _one_hot_argmax(logits)
    # the maximum goes first: a logit over a tiny temperature is infinite, and inf - inf NaN
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / max(sampling.temperature, SMALLEST_NORMAL)
    if 0 < sampling.top_k < logits.shape[-1]:
        # before the division, which may make equal what was not
        kth = jax.lax.top_k(shifted, sampling.top_k)[0][..., -1:]
        scaled = jnp.where(shifted < kth, -jnp.inf, scaled)  # a NaN stays and spreads
    weights = jnp.exp(scaled)
    probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probs if sampling.top_p == 1 else _nucleus(probs, sampling.top_p)


def draw(logits: jax.Array, uniform: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Tokens [...] int32 and the distributions [..., V] they were drawn from.

    `uniform` [...] in [0, 1) picks the token by inverse CDF; greedy does not look at it.
    """
    probs = process(logits, sampling)
    token = argmax(logits) if sampling.is_greedy else inverse_cdf(probs, uniform)
    return token, probs


def argmax(values: jax.Array) -> jax.Array:
    """Index of the maximum over the last axis, the lowest among equals: [...] int32.

    Two plain reductions; XLA's own argmax does not vectorise on CPU. A NaN row gives the last
    index.
    """
    size = values.shape[-1]
    is_maximum = values == jnp.max(values, axis=-1, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.min(jnp.where(is_maximum, indices, size - 1), axis=-1)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the running sum of weights [..., V] passes uniform * total: [...] int32.

    Weights need not sum to 1. A token of weight 0 is never returned, at no `uniform` in [0, 1);
    a row of NaN gives 0. Sums run over blocks first and then inside one block: less work and
    less rounding than one running sum over the vocabulary.
    """
    *batch, size = weights.shape
    blocks = -(-size // CDF_BLOCK)
    padding = [(0, 0)] * len(batch) + [(0, blocks * CDF_BLOCK - size)]
    weights = jnp.pad(weights, padding).reshape(*batch, blocks, CDF_BLOCK)
    sums = jnp.sum(weights, axis=-1)
    threshold = uniform * jnp.cumsum(sums, axis=-1)[..., -1]
    block, below = _crossing(sums, threshold)
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    index, _ = _crossing(inside, threshold - below)
    return block * CDF_BLOCK + index


def _crossing(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index [...] whose running sum exceeds `threshold` [...], and the sum before it.

    Only positive weights count, and the last of them takes what rounding leaves over: a parallel
    running sum need not be monotone in its last bit.
    """
    size = weights.shape[-1]
    indices = jax.lax.broadcasted_iota(jnp.int32, weights.shape, weights.ndim - 1)
    running = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    beyond = positive & (running > threshold[..., None])
    first = jnp.min(jnp.where(beyond, indices, size), axis=-1)
    last = jnp.max(jnp.where(positive, indices, 0), axis=-1)
    index = jnp.minimum(first, last)
    below = jnp.max(jnp.where(indices < index[..., None], running, 0), axis=-1)
    return index, below


def _one_hot_argmax(logits: jax.Array) -> jax.Array:
    one_hot = jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=jnp.float32)
    finite = jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.where(finite, one_hot, jnp.nan)


def _nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """Keeps the smallest set {v: probs[v] >= threshold} of mass >= top_p, renormalised.

    Bisects the bits of the threshold: 31 passes over the vocabulary find it exactly.
    """

    def mass_at(bits: jax.Array) -> jax.Array:
        threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.sum(jnp.where(probs >= threshold, probs, 0), axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds  # mass(low) >= top_p > mass(high)
        middle = (low + high) // 2
        enough = mass_at(middle) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros_like(probs[..., :1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + (_ONE_BITS + 1)))
    threshold = jax.lax.bitcast_convert_type(low, jnp.float32)
    kept = jnp.where(probs < threshold, 0, probs)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)
