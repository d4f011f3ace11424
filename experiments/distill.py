"""Distils a draft from its target, or trains the control: the same run by likelihood.

    python -m experiments.distill --config=experiments/configs/distill_stories.py \
        --workdir=runs/distilled
    python -m experiments.distill --config=experiments/configs/distill_stories.py:sft \
        --workdir=runs/control

While it runs, block efficiency and acceptance are measured by the real decoder on held-out
prompts, before the first step, too; the weights of the best step are those that the run stands
for. Started again with the same workdir it goes on from the last checkpoint, to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distillspec_jax.data.tasks import Task, load_task
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_distill_step
from distillspec_jax.errors import UserError
from distillspec_jax.training.loop import Figures, Hooks, LoopConfig, train
from distillspec_jax.training.optimizers import make_optimizer, make_schedule
from distillspec_jax.training.state import TrainState
from experiments import door, parts
from experiments.bench import Loaded, check_meeting, load
from experiments.watching import MEAN, DecoderConfig, make_decoding

LOW_EOS_RATE = 0.5  # below it most samples are cut by the limit, and little is learnt of the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A named recipe, and what is changed of it; None keeps the recipe's own."""

    name: str = "distillspec"
    loss: str | None = None
    beta: float | None = None
    eta: float | None = None
    lambda1: float | None = None
    lambda2: float | None = None
    rollout_temperature: float | None = None
    target_temperature: float | None = None
    draft_temperature: float | None = None
    interleave_top_k: int | None = None
    teacher_gamma: int | None = None
    keep_fraction: float | None = None
    reduction: str | None = None

    def resolve(self) -> recipes.Recipe:
        changes = {key: value for key, value in vars(self).items() if value is not None}
        return recipes.named(changes.pop("name"), **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(parts.TrainingConfig):
    """One distillation run."""

    target: str  # name or path, as `zoo.load` takes it
    draft: str
    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    reference: str = ""  # a frozen draft, for recipes that select tokens
    rollout_length: int = 0  # limit of samples; 0: the task's target length
    loss_chunk: int = 0  # positions that have logits at a time; 0: all
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(best_metric=MEAN))


def main(config: DistillConfig, workdir: Path) -> int | None:
    task, recipe = load_task(config.task), config.recipe.resolve()
    if recipe.lambda1 > 0:
        parts.check_references(task, config)
    check_meeting(config.target, config.draft)
    target, draft = load(config.target, task), load(config.draft, task, seed=config.seed)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = TrainState.create(
        draft.params, optimizer, seed=config.seed, average_decay=config.average_decay
    )
    step = _make_step(config, task, recipe, optimizer, target, draft)
    batches = parts.train_batches(task, config)
    hooks = Hooks(
        evaluate=_make_evaluate(config, task, target, draft),
        learning_rate=make_schedule(config.optimizer, config.steps),
        notice=_notice,
    )
    with parts.open_run(workdir, "distill", config, task, draft) as run:
        models = {"draft": draft, "target": target}
        parts.announce(f"distill ({recipe.name})", config, task, state, models)
        result = train(
            step,
            state,
            batches,
            config.loop,
            steps=config.steps,
            checkpoints=run.checkpoints,
            writer_of=run.writer_of,
            hooks=hooks,
            name="distill",
        )
        figures = {"gamma": config.decoder.gamma, "recipe": recipe.name}
        return run.finish(result, seed=config.seed, figures=figures)


def _make_step(
    config: DistillConfig,
    task: Task,
    recipe: recipes.Recipe,
    optimizer: Any,
    target: Loaded,
    draft: Loaded,
) -> Callable[[TrainState, Any], Any]:
    """The step with everything frozen already inside: `(state, batch) -> (state, metrics)`."""
    frozen = [target.params]
    if recipe.needs_reference:
        if not config.reference:
            raise UserError(f"recipe '{recipe.name}' needs config.reference, a frozen draft")
        reference = load(config.reference, task)
        if dataclasses.replace(reference.model.config, name="") != dataclasses.replace(
            draft.model.config, name=""
        ):
            raise UserError(
                f"config.reference '{config.reference}' must have the shape of the draft "
                f"'{config.draft}'"
            )
        frozen.append(reference.params)
    step = make_distill_step(
        draft.model,
        target.model,
        recipe,
        optimizer,
        rollout_length=config.rollout_length or task.target_length,
        chunk=config.loss_chunk or None,
        micro_batches=config.micro_batches,
    )
    before, *after = frozen
    return lambda state, batch: step(state, before, batch, *after)


def _make_evaluate(
    config: DistillConfig, task: Task, target: Loaded, draft: Loaded
) -> Callable[[TrainState], Figures]:
    decoder = config.decoder
    prompts = parts.validation_batches(task, config, decoder.num_prompts, decoder.batch_size)
    watch = make_decoding(
        target, draft.model, prompts, decoder, max_new_tokens=task.target_length, seed=config.seed
    )
    return lambda state: watch(state.best_params)


def _notice(figures: Figures) -> str | None:
    rate = figures.get("eos_rate", 1.0)
    if not rate < LOW_EOS_RATE:  # NaN, where nothing was sampled, is not low
        return None
    return (
        f"warning: only {rate:.0%} of the samples ended by themselves; raise config.rollout_length "
        "or fine-tune the model that writes them"
    )


if __name__ == "__main__":
    door.run(main, DistillConfig)
