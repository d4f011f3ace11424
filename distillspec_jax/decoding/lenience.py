"""Lossy acceptance: how far a target probability is raised before a draft token is judged by it.

The output law changes with every rule here, so results made with one are marked as not lossless.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distillspec_jax.decoding.sampling import SMALLEST_NORMAL
from distillspec_jax.errors import UserError, check_number, unknown_name

KINDS = ("linear", "square", "exponential")


@dataclasses.dataclass(frozen=True)
class Lenience:
    """Accept a draft token x with probability min(1, f(p(x)) / q(x)) instead of p(x) / q(x).

    kind: f_lin(p) = p / epsilon, f_sq(p) = p / epsilon^2, f_exp(p) = p^epsilon; all of them keep
        p = 0 at 0, and none lets a token exceed f(p).
    epsilon: in (0, 1]; 1 is exact, bit for bit.
    relaxed_residual: after a rejection draw from (f(p) - q)+ instead of the exact sampler's
        (p - q)+; the latter keeps every token with p > q at or below p.

    Nothing is relaxed at temperature 0, where p is 0 or 1. Source: DistillSpec (arXiv 2310.08461,
    lossy decoding); f_lin is the lenience of Leviathan et al. (arXiv 2211.17192, A.5).
    """

    kind: str = "exponential"
    epsilon: float = 1.0
    relaxed_residual: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("lenience", self.kind, KINDS)
        check_number("lenience", self.epsilon)
        if not 0 < self.epsilon <= 1:
            raise UserError(f"lenience is {self.epsilon}; it must be in (0, 1], 1 being exact")
        divisor = {"linear": self.epsilon, "square": self.epsilon**2}.get(self.kind, 1.0)
        if divisor < SMALLEST_NORMAL:
            raise UserError(
                f"lenience is {self.epsilon}, by which float32 cannot divide as '{self.kind}'; "
                "1e-15 accepts as much"
            )

    @property
    def is_exact(self) -> bool:
        return self.epsilon == 1


def relax(target_probs: jax.Array, lenience: Lenience | None) -> jax.Array:
    """f(p) elementwise, p itself where nothing is relaxed; may exceed 1."""
    if lenience is None or lenience.is_exact:
        return target_probs
    epsilon = lenience.epsilon
    if lenience.kind == "linear":
        return target_probs / epsilon
    if lenience.kind == "square":
        return target_probs / epsilon**2
    positive = jnp.where(target_probs > 0, target_probs, 1)
    return jnp.where(target_probs > 0, jnp.exp(epsilon * jnp.log(positive)), 0)
