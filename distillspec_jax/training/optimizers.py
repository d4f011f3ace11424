"""Optimisers and learning rates, from one frozen description."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distillspec_jax.errors import UserError, unknown_name

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    The learning rate rises linearly over `warmup_steps`, stays at its peak until `decay_start`
    (or the end of the warm-up, if that is later), then follows `schedule`: "linear" and "cosine"
    reach `floor` times the peak behind the last step, "rsqrt" falls as sqrt(start / step) and
    stops at the floor. DistillSpec: adafactor, 3e-4, warm-up 5,000, cosine from step 150,000 to
    300,000, floor 0.1.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3  # the peak
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_start: int = 0
    floor: float = 0.0  # as a fraction of the peak
    clip_norm: float = 1.0  # of the whole gradient; 0: no clipping
    weight_decay: float = 0.0  # of matrices, times the learning rate; norms and biases never decay
    b1: float = 0.9  # adamw, as the next two
    b2: float = 0.98
    epsilon: float = 1e-8
    scale_by_parameter: bool = True  # adafactor: updates relative to the weights' size

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown_name("optimizer", self.name, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES, "the optimizer")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}, must be above 0")
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor is {self.floor}, must be within 0 and 1 (a part of the peak)")
        for field in ("scale_by_parameter",) if self.name == "adamw" else ("b1", "b2", "epsilon"):
            if getattr(self, field) != getattr(OptimizerConfig, field):
                raise UserError(f"{field} is not a setting of {self.name}: leave it out")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.epsilon > 0):
            raise UserError(
                f"b1, b2 and epsilon are {self.b1}, {self.b2} and {self.epsilon}, must be within "
                "[0, 1) and above 0"
            )
        for field in ("warmup_steps", "decay_start", "clip_norm", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{field} is {getattr(self, field)}, must not be negative")

    @property
    def depends_on_steps(self) -> bool:
        """Whether a longer run would have had other learning rates from the start."""
        return self.schedule in ("linear", "cosine")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the function step -> learning rate; step 0 is the first, and is not at rate 0."""
    start = max(config.warmup_steps, config.decay_start)

    def shape(step: jax.Array) -> jax.Array:
        done = jnp.clip((step - start) / max(steps - start, 1), 0.0, 1.0)
        if config.schedule == "linear":
            return config.floor + (1 - config.floor) * (1 - done)
        if config.schedule == "cosine":
            return config.floor + (1 - config.floor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        if config.schedule == "rsqrt":
            since = max(start, 1)
            return jnp.maximum(jnp.sqrt(since / jnp.maximum(step, since)), config.floor)
        return jnp.ones_like(done)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        return config.learning_rate * warm * shape(step)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimiser of a run of `steps` steps: clipping, then the update rule."""
    rate = make_schedule(config, steps)
    if config.name == "adamw":
        base = optax.adamw(
            rate,
            config.b1,
            config.b2,
            config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    else:
        # its own decay would not be scaled by the learning rate, as AdamW's is
        base = optax.chain(
            optax.adafactor(multiply_by_parameter_scale=config.scale_by_parameter),
            optax.add_decayed_weights(-config.weight_decay, decayed),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        )
    if not config.clip_norm:
        return base
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), base)


def decayed(params: Any) -> Any:
    """Marks the leaves that weight decay applies to: matrices, but no norms and no biases."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim >= 2 and "bias" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
