"""The state of training: a pytree that goes into a step and comes out of it."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import optax
from flax import struct

from distillspec_jax.errors import UserError
from distillspec_jax.models.transformer import Params


class TrainState(struct.PyTreeNode):
    """Everything that a resumed run needs to go on as if it had never stopped.

    Attributes:
      step: int32 scalar, steps taken; with `seed` it keys every random draw and the data order.
      params: float32 weights that are trained.
      opt_state: the optimiser's own state.
      seed: uint32 scalar.
      skipped: int32 scalar, updates left out so far because a gradient was not finite.
      skipped_in_row: int32 scalar, how many of them were the latest steps.
      average: exponential moving average of `params`, None when `average_decay` is 0.
      average_decay: weight of the past in that average, once it is long enough (static).
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    seed: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    average: Params | None = None
    average_decay: float = struct.field(pytree_node=False, default=0.0)

    @classmethod
    def create(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        *,
        seed: int = 0,
        average_decay: float = 0.0,
    ) -> TrainState:
        """Returns the state before the first step; steps may donate it.

        `params` are copied, as float32 whatever they come in: bfloat16 would lose small updates.
        """
        _check_seed(seed)
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            seed=jnp.asarray(seed, jnp.uint32),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
            average=jax.tree.map(jnp.array, params) if average_decay else None,
            average_decay=average_decay,
        )

    @property
    def averaged_params(self) -> Params:
        """The weights to evaluate and to hand out: the average where there is one."""
        return self.params if self.average is None else self.average

    def apply_gradients(self, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Takes one step; an update whose gradient is not finite is left out and counted.

        A step left out changes neither weights, nor optimiser state, nor average; the step
        number grows all the same, so the next step sees the next batch.
        """
        finite = jnp.isfinite(optax.tree.norm(grads))
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        params = _where(finite, params, self.params)
        skipped = jnp.where(finite, 0, 1)
        return self.replace(
            step=self.step + 1,
            params=params,
            opt_state=_where(finite, opt_state, self.opt_state),
            skipped=self.skipped + skipped,
            skipped_in_row=jnp.where(finite, 0, self.skipped_in_row + 1),
            average=self._next_average(params, finite),
        )

    def _next_average(self, params: Params, finite: jax.Array) -> Params | None:
        if self.average is None:
            return None
        taken = self.step + 1 - self.skipped
        # The first steps average over what there is: the initial weights fade at once.
        decay = jnp.minimum(self.average_decay, taken / (taken + 9.0))
        decay = jnp.where(finite, decay, 1.0)
        return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), self.average, params)


def _check_seed(seed: object) -> None:
    if isinstance(seed, jax.Array):  # may be traced
        return
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**32:
        raise UserError(f"seed is {seed}, must be an integer within 0 and 2**32 - 1")


def _where(condition: jax.Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
