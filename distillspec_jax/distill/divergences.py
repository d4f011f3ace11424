"""Divergences between the next-token distributions of target and draft.

Every function maps logits of the target and of the draft, both [..., V], to one value per
position, [...] float32. p = softmax(target_logits) and q = softmax(draft_logits) in float32; the
target is constant, gradients flow into the draft alone. Ids that are masked (-inf, or hugely
negative) in both models contribute exactly nothing, neither value nor gradient. "Forward" means
the target first: KL(p || q). README.md of this folder has the gradients, the limits and pinned
numbers. Source: arXiv 2310.08461 (DistillSpec), section 3 and appendix A.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distillspec_jax.errors import UserError, unknown_name

Divergence = Callable[[jax.Array, jax.Array], jax.Array]

# Where p underflows, KL(q || p) would be infinite; the float32 softmax ends at e**-103.
LOG_FLOOR = -100.0
# Acceptance below this has a constant -log: its gradient would be noise times a huge factor.
ACCEPTANCE_FLOOR = 1e-5


def _log_probs(target_logits: jax.Array, draft_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p (constant) and log q, float32; -inf where the logit is -inf."""
    if target_logits.shape != draft_logits.shape:
        raise UserError(
            "target and draft must score the same positions and vocabulary: their logits have "
            f"shapes {target_logits.shape} and {draft_logits.shape}"
        )
    target_logits = jax.lax.stop_gradient(target_logits)
    log_p = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
    return log_p, jax.nn.log_softmax(draft_logits.astype(jnp.float32), axis=-1)


def _expected(probs: jax.Array, value: Callable[..., jax.Array], *logs: jax.Array) -> jax.Array:
    """sum_v probs_v value(logs_v), in which probs_v = 0 gives 0 whatever its logs are.

    The logs are replaced before `value` sees them, not only its result after: otherwise the
    gradient of the branch not taken, 0 * inf, would be NaN.
    """
    possible = probs > 0
    safe = (jnp.where(possible, log, 0.0) for log in logs)
    return jnp.sum(jnp.where(possible, probs * value(*safe), 0.0), axis=-1)


def forward_kl(target_logits: jax.Array, draft_logits: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p_v log(p_v / q_v), in nats; mass covering. Gradient in the logits: q - p.

    [..., V], [..., V] -> [...]. +inf where the draft excludes (-inf) what the target allows.
    """
    log_p, log_q = _log_probs(target_logits, draft_logits)
    return _expected(jnp.exp(log_p), jnp.subtract, log_p, log_q)


def reverse_kl(target_logits: jax.Array, draft_logits: jax.Array) -> jax.Array:
    """KL(q || p) = sum_v q_v log(q_v / p_v), in nats; mode seeking.

    [..., V], [..., V] -> [...]. log p is floored at LOG_FLOOR, which bounds the loss where the
    target excludes what the draft allows. Gradient: q_v (log(q_v / p_v) - KL(q || p)).
    """
    log_p, log_q = _log_probs(target_logits, draft_logits)
    probs_q, log_p = jnp.exp(log_q), jnp.maximum(log_p, LOG_FLOOR)
    # as in jsd: the change of log q itself adds nothing but rounding
    return _expected(probs_q, jnp.subtract, jax.lax.stop_gradient(log_q), log_p)


def jsd(target_logits: jax.Array, draft_logits: jax.Array, *, beta: float = 0.5) -> jax.Array:
    """JSD[beta] = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, in nats.

    [..., V], [..., V] -> [...]. At most the binary entropy of beta; JSD[beta] / beta tends to
    KL(p || q) as beta -> 0 and JSD[beta] / (1 - beta) to KL(q || p) as beta -> 1, JSD itself to 0
    at both ends, so beta must lie strictly between. Gradient: (1 - beta) q_v (log(q_v / m_v) -
    KL(q || m)). Source: arXiv 2306.13649 (GKD), eq. (1).
    """
    check_beta(beta)
    log_p, log_q = _log_probs(target_logits, draft_logits)
    probs_p, probs_q = jnp.exp(log_p), jnp.exp(log_q)
    mixture = beta * probs_p + (1 - beta) * probs_q
    # What log m and log q change by adds up to 0: sum_v m_v dlog m_v = sum_v dm_v = 0. Leaving it
    # out is exact, divides nothing by a tiny m, and where q is near p a 1 beside log(q / m) would
    # round most of it away.
    log_m = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
    log_m, log_q = jax.lax.stop_gradient((log_m, log_q))
    from_target = _expected(probs_p, jnp.subtract, log_p, log_m)
    return beta * from_target + (1 - beta) * _expected(probs_q, jnp.subtract, log_q, log_m)


def tvd(target_logits: jax.Array, draft_logits: jax.Array) -> jax.Array:
    """TVD(p, q) = (1/2) sum_v |p_v - q_v| = 1 - acceptance rate, within [0, 1].

    [..., V], [..., V] -> [...]. Gradient: q_v (s_v - sum_w q_w s_w), s = sign(q - p) / 2, which is
    0 at the kink p = q and vanishes with q_v: slow from a cold start.
    """
    log_p, log_q = _log_probs(target_logits, draft_logits)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def acceptance_rate(target_logits: jax.Array, draft_logits: jax.Array) -> jax.Array:
    """alpha = sum_v min(p_v, q_v): how often a draft token survives verification.

    [..., V], [..., V] -> [...] within [0, 1]. Source: arXiv 2211.17192, corollary 3.6.
    """
    log_p, log_q = _log_probs(target_logits, draft_logits)
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


def negative_log_acceptance(target_logits: jax.Array, draft_logits: jax.Array) -> jax.Array:
    """-log alpha, alpha = sum_v min(p_v, q_v); the LK^alpha loss.

    [..., V], [..., V] -> [...]. Gradient: that of TVD divided by alpha; the cross-entropy where p
    is one-hot. Constant below ACCEPTANCE_FLOOR. Source: arXiv 2602.23881.
    """
    alpha = acceptance_rate(target_logits, draft_logits)
    return -jnp.log(jnp.maximum(alpha, ACCEPTANCE_FLOOR))


def lk_hybrid(target_logits: jax.Array, draft_logits: jax.Array, *, eta: float = 3.0) -> jax.Array:
    """LK^lambda = lambda KL(p || q) + (1 - lambda) TVD(p, q), lambda = exp(-eta alpha) constant.

    [..., V], [..., V] -> [...]. lambda is taken per position: KL leads where the draft is far off,
    TVD where it nearly agrees. Source: arXiv 2602.23881.
    """
    check_eta(eta)
    distance = tvd(target_logits, draft_logits)
    weight = jnp.exp(-eta * (1.0 - jax.lax.stop_gradient(distance)))
    return weight * forward_kl(target_logits, draft_logits) + (1.0 - weight) * distance


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def check_beta(beta: float) -> None:
    """Refuses a beta at which JSD[beta] is no loss (0 everywhere) or not defined."""
    if not 0.0 < beta < 1.0:
        instead = "reverse_kl" if beta >= 1.0 else "forward_kl"
        raise UserError(
            f"beta of jsd is {beta:g}, must lie strictly between 0 and 1 (JSD is 0 at both ends); "
            f"use the divergence '{instead}' instead"
        )


def check_eta(eta: float) -> None:
    """Refuses an eta below 0: KL would then lead where the draft nearly agrees."""
    if not eta >= 0.0:
        raise UserError(f"eta of lk_hybrid is {eta:g}, must be at least 0")


def named(name: str, *, beta: float = 0.5, eta: float = 3.0) -> Divergence:
    """Returns the divergence of that name; `beta` is for jsd, `eta` for lk_hybrid."""
    if name not in DIVERGENCES:
        raise unknown_name("divergence", name, DIVERGENCES)
    if name == "jsd":
        check_beta(beta)
        return functools.partial(jsd, beta=beta)
    if name == "lk_hybrid":
        check_eta(eta)
        return functools.partial(lk_hybrid, eta=eta)
    return DIVERGENCES[name]


def at_temperatures(
    divergence: Divergence, *, target: float = 1.0, draft: float = 1.0
) -> Divergence:
    """Returns `divergence` of softmax(target_logits / target) and softmax(draft_logits / draft).

    The value is not multiplied by any power of the temperatures.
    """
    for who, temperature in (("target", target), ("draft", draft)):
        if not temperature > 0.0:
            raise UserError(f"the {who} temperature is {temperature:g}, must be above 0")
    if target == draft == 1.0:
        return divergence
    return lambda target_logits, draft_logits: divergence(
        target_logits / target, draft_logits / draft
    )
