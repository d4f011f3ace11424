"""The teacher's texts, and steps on them, by itself and with a draft's help: tokens a second.

Target and draft are trained ones, which end their texts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax import zoo
from distillspec_jax.data.batch import Batch
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_rollout, make_update
from distillspec_jax.evaluation.latency import Clock, race
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.training.optimizers import make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.benchmarks.distill import OPTIMIZER, Config, Found, Row


def measure(config: Config, seed: int) -> Found:
    """Texts of a trained target and whole steps on them, by itself and with a draft's help.

    Both end their texts where they like, and each way draws its own: so rates in tokens are
    compared, over many batches, with intervals over these.
    """
    models = *zoo.load(config.teacher), *zoo.load(config.teacher_draft)
    figures: Row = {}
    rows: list[Row] = []
    for batch_size in config.teacher_batch_sizes:
        batches = stories(batch_size, config.teacher_batches, seed)
        calls = taught(config, *models, batches[0], seed)
        clock = race(
            {name: _on_batches(call) for name, call in calls.items()},
            batches,
            batch_size=batch_size,
            repeats=config.rounds,
        )
        place = f"_batch{batch_size}" if figures else ""
        for key, name, base in (
            ("teacher_rollout_speedup", "with_draft", "plain"),
            ("teacher_step_speedup", "step_with_draft", "plain_step"),
        ):
            figures |= clock.speedup([name], [base]).keys(key + place)
        shapes = {"batch_size": batch_size, "gamma": config.teacher_gamma}
        rows += [{**_rates(name, clock), **shapes} for name in calls]
    return figures, rows


def _on_batches(call: functools.partial[Any]) -> Callable[[Batch], tuple[Any, Any]]:
    """batch -> what `call`, bound to another batch, makes of it, and the tokens written."""
    state, target_params, _ = call.args
    return lambda batch: call.func(state, target_params, batch)


def _rates(name: str, clock: Clock) -> Row:
    seconds = clock.seconds[name]
    return {
        "name": name,
        "seconds": float(np.median(seconds)),
        "seconds_spread": [float(seconds.min()), float(seconds.max())],
        "tokens": int(clock.tokens[name].sum()),
        **clock.tokens_per_second([name]).keys("tokens_per_second"),
        "first_call_seconds": clock.compile_seconds[name] + float(seconds[0]),
    }


def taught(
    config: Config,
    target: Transformer,
    target_params: Any,
    draft: Transformer,
    draft_params: Any,
    batch: Batch,
    seed: int,
) -> dict[str, Any]:
    """Rollouts and steps from one state, which every call finds as it was.

    Each is a compiled function bound to its arguments, which gives what it made and the tokens it
    wrote; parameters and batch may be shapes.
    """
    rule = make_optimizer(OPTIMIZER, 1_000)
    create = functools.partial(TrainState.create, optimizer=rule, seed=seed)
    is_shape = isinstance(batch.inputs, jax.ShapeDtypeStruct)
    state = jax.eval_shape(create, draft_params) if is_shape else create(draft_params)

    def counted(batch: Batch) -> jax.Array:
        return jnp.sum(batch.targets != draft.config.pad_id)

    def writer(gamma: int) -> functools.partial[Any]:
        recipe = recipes.named("seqkd", teacher_gamma=gamma)  # its loss asks the target nothing
        rollout = make_rollout(draft, target, recipe, rollout_length=config.teacher_length)

        def write(state: TrainState, target_params: Any, batch: Batch) -> Any:
            written = rollout(state, target_params, batch)
            return written, counted(written[0])

        return functools.partial(jax.jit(write), state, target_params, batch)

    def stepper(gamma: int) -> functools.partial[Any]:
        recipe = recipes.named("gkd", lambda2=0.0, teacher_gamma=gamma)
        write = make_rollout(draft, target, recipe, rollout_length=config.teacher_length)
        update = make_update(draft, target, recipe, rule)

        def step(state: TrainState, target_params: Any, batch: Batch) -> Any:
            written, _ = write(state, target_params, batch)
            return update(state, target_params, written), counted(written)

        return functools.partial(jax.jit(step), state, target_params, batch)

    gamma = config.teacher_gamma
    return {
        "plain": writer(0),
        "with_draft": writer(gamma),
        "plain_step": stepper(0),
        "step_with_draft": stepper(gamma),
    }


def stories(batch_size: int, count: int, seed: int) -> list[Batch]:
    from distillspec_jax.data.tasks import TaskConfig, load_task

    batches = load_task(TaskConfig()).batches("train", batch_size=batch_size, seed=seed)
    return [jax.tree.map(jnp.asarray, batch) for batch in itertools.islice(batches, count)]
