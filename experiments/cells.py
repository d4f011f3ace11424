"""The cells of a sweep: trained and measured in one process that compiles each part once.

A step is the two halves of `distill.step`, compiled apart: who writes the text (one program a
source) and what is learnt from it (one a loss), instead of one for every pair of the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task
from distillspec_jax.distill.recipes import LIKELIHOOD, Recipe
from distillspec_jax.distill.step import Metrics, make_rollout, make_update
from distillspec_jax.errors import UserError
from distillspec_jax.models.transformer import Params, Transformer
from distillspec_jax.training.loop import LoopConfig
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.models import Loaded

# lambda1, lambda2 of algorithm 1; "mixed" is half references, half the draft's own samples
SOURCES = {"fixed": (1.0, 1.0), "teacher": (0.0, 0.0), "draft": (0.0, 1.0), "mixed": (0.5, 1.0)}
CONTROL, START = "control", "finetuned"
MAX_SKIPPED = LoopConfig.max_skipped  # updates in a row, as in a run of its own


@dataclasses.dataclass(frozen=True)
class Cell:
    """One draft: what it learnt from, by which loss, for how long.

    split: of the training data, also a part of one ("train[:300]").
    loss, source: a recipe's loss and a key of SOURCES; `nll` on `fixed` is the control, and
      steps = 0 the draft before.
    """

    split: str
    steps: int
    loss: str = LIKELIHOOD
    source: str = "fixed"
    seed: int = 0

    @property
    def name(self) -> str:
        if self.steps == 0:
            return START
        is_control = (self.loss, self.source) == (LIKELIHOOD, "fixed")
        return CONTROL if is_control else f"{self.loss}-{self.source}"

    @property
    def key(self) -> str:
        """Name of its file."""
        return f"{slug(self.split)}-{self.steps}-{self.name}-{self.seed}"

    def recipe(self, beta: float) -> Recipe:
        lambda1, lambda2 = SOURCES[self.source]
        return Recipe(self.name, loss=self.loss, beta=beta, lambda1=lambda1, lambda2=lambda2)


def slug(text: str) -> str:
    """A part of the data as part of a file's name: "train[:-300]" -> "train_to_minus300"."""
    return text.translate({ord("["): "_", ord(":"): "to_", ord("-"): "minus", ord("]"): None})


@dataclasses.dataclass(frozen=True)
class Trained:
    """The draft of a cell; `means` are those of the metrics of its steps, where they are finite."""

    params: Params
    skipped_updates: int
    means: dict[str, float]


class Trainer:
    """Trains drafts of one shape for one target; programs and the target's texts are kept."""

    def __init__(
        self,
        task: Task,
        target: Loaded,
        draft: Transformer,
        *,
        batch_size: int,
        rollout_length: int,
        beta: float,
    ) -> None:
        self._task, self._target, self._draft = task, target, draft
        self._batch_size, self._beta = batch_size, beta
        self._rollout_length = rollout_length
        self._rollout = functools.cache(self._make_rollout)
        self._update = functools.cache(self._make_update)
        # (split, seed) -> texts of each step: with no draft in it, it is the same for all losses
        self._by_target: dict[tuple[str, int], list[tuple[Batch, Metrics]]] = {}

    def halves(self, cell: Cell, optimizer: OptimizerConfig) -> tuple[Any, Any]:
        """The jitted rollout and update of a cell, of `(state, target_params, batch)` both."""
        return self._rollout(cell.source), self._update(cell.loss, optimizer, cell.steps)

    def train(
        self,
        cell: Cell,
        params: Params,
        optimizer: OptimizerConfig,
        on_step: Callable[[int], None],
    ) -> Trained:
        """Takes the steps of a cell from `params`, whose buffers stay as they are.

        `on_step` hears the number of steps that are done. Raises UserError if the last update
        was not finite, or MAX_SKIPPED of them in a row.
        """
        rule = make_optimizer(optimizer, cell.steps)
        state = TrainState.create(params, rule, seed=cell.seed)
        rollout, update = self.halves(cell, optimizer)
        batches = self._batches(cell)
        totals: dict[str, np.ndarray] = {}
        pending: Metrics = {}
        for step in range(cell.steps):
            batch, written = self._write(cell, rollout, state, step, batches)
            skipped_in_row = jnp.copy(state.skipped_in_row)  # the update takes the state's own
            state, metrics = update(state, self._target.params, batch)
            _add(totals, pending)  # of the step before: this one runs meanwhile
            _stop_if_diverged(cell, step, skipped_in_row, MAX_SKIPPED)
            on_step(step)
            pending = {**metrics, **written}
        _add(totals, pending)
        _stop_if_diverged(cell, cell.steps, state.skipped_in_row, 1)
        on_step(cell.steps)
        means = {name: float(total / count) for name, (total, count) in totals.items() if count}
        return Trained(state.params, int(state.skipped), means)

    def _batches(self, cell: Cell) -> Iterator[Batch]:
        return self._task.batches(cell.split, batch_size=self._batch_size, seed=cell.seed)

    def _write(
        self,
        cell: Cell,
        rollout: Callable[..., Any],
        state: TrainState,
        step: int,
        batches: Iterator[Batch],
    ) -> tuple[Batch, Metrics]:
        if cell.source != "teacher":
            return rollout(state, self._target.params, next(batches))
        texts = self._by_target.setdefault((cell.split, cell.seed), [])
        batch = next(batches)
        if step == len(texts):
            texts.append(jax.device_get(rollout(state, self._target.params, batch)))
        return texts[step]

    def _make_rollout(self, source: str) -> Callable[..., Any]:
        recipe = Cell("", 1, source=source).recipe(self._beta)
        target, length = self._target.model, self._rollout_length
        return jax.jit(make_rollout(self._draft, target, recipe, rollout_length=length))

    def _make_update(self, loss: str, optimizer: OptimizerConfig, steps: int) -> Callable[..., Any]:
        recipe = Cell("", steps, loss).recipe(self._beta)
        rule = make_optimizer(optimizer, steps)
        update = make_update(self._draft, self._target.model, recipe, rule)
        return jax.jit(update, donate_argnums=0)


def _stop_if_diverged(cell: Cell, step: int, skipped_in_row: jax.Array, limit: int) -> None:
    if (count := int(skipped_in_row)) >= limit:
        raise UserError(
            f"the gradient of '{cell.key}' was not finite in {count} steps in a row, up to step "
            f"{step} of {cell.steps}; lower config.optimizer.learning_rate"
        )


def _add(totals: dict[str, np.ndarray], metrics: Metrics) -> None:
    for name, pair in jax.device_get(metrics).items():
        if np.isfinite(pair).all():  # not that of an update that was skipped
            totals[name] = totals.get(name, np.zeros(2)) + np.array(pair, np.float64)
