r"""Distils a draft from its target, or trains the control: the same run by likelihood.

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
import functools
from collections.abc import Callable
from pathlib import Path

import jax

from distillspec_jax import zoo
from distillspec_jax.data.tasks import Task, load_task
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_distill_step
from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.sharding.layout import Layout
from distillspec_jax.training.loop import Figures, Hooks, LoopConfig, train
from distillspec_jax.training.optimizers import make_optimizer, make_schedule
from distillspec_jax.training.state import TrainState
from experiments import door, parts, planning
from experiments.checks import check_least
from experiments.models import Loaded, check_meeting, load
from experiments.phases import PhasedStep
from experiments.watching import (
    ALPHA,
    MEAN,
    MEND_ENDS,
    TAU,
    DecoderConfig,
    make_decoding,
    told_of_ends,
)


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
        own = recipes.named(changes.pop("name"))
        recipe = recipes.named(own.name, **changes)
        recipes.check_used(recipe, [key for key in changes if changes[key] != getattr(own, key)])
        return recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(parts.TrainingConfig):
    """One distillation run."""

    target: str  # name or path, as `zoo.load` takes it
    draft: str
    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    reference: str = ""  # a frozen draft, for recipes that select tokens
    rollout_length: int = 0  # limit of samples; 0: the task's target length
    target_layout: str = "sharded"  # over config.mesh, or "replicated"
    draft_layout: str = "replicated"
    time_phases: bool = False  # log rollout_, score_ and update_seconds; costs a little speed
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(best_metric=MEAN))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "rollout_length")
        temperatures = [f"t{each:g}" for each in self.decoder.temperatures]
        rates = [f"{name}_{t}" for t in temperatures for name in (TAU, ALPHA)]
        parts.check_best_metric(self.loop, [MEAN, *rates])
        recipe = self.recipe.resolve()
        values = dataclasses.asdict(recipe)  # what `config.json` tells
        object.__setattr__(self, "recipe", RecipeConfig(**values))
        if recipe.needs_reference and not self.reference:
            raise UserError(f"recipe '{recipe.name}' needs config.reference, a frozen draft")
        if self.reference and not recipe.needs_reference:
            raise UserError(
                "config.reference is for recipes that select tokens, and recipe "
                f"'{recipe.name}' learns from all: leave it out"
            )
        if self.length_bucket and recipe.lambda1 == 0:
            raise UserError(
                "config.length_bucket groups examples by the length of their references, and "
                f"recipe '{recipe.name}' reads none (lambda1 is 0): leave it out"
            )


def main(config: DistillConfig, workdir: Path) -> int | None:
    layout = parts.open_layout(config)
    with jax.set_mesh(layout.mesh):
        return _main(config, workdir, layout)


def prepare(
    config: DistillConfig, task: Task, layout: Layout, load: parts.Load = load
) -> parts.Prepared:
    """Models, the draft's state and the compiled step; only shapes if `load` gives no more."""
    check_meeting(config.target, config.draft)
    recipe, places = config.recipe.resolve(), layout.params(config.draft_layout)
    load = functools.partial(load, compute_dtype=config.compute_dtype)
    frozen = functools.partial(load, is_frozen=True)
    target = frozen(config.target, task, shardings=layout.params(config.target_layout))
    draft = load(config.draft, task, seed=config.seed, shardings=places)
    models = {"draft": draft, "target": target}
    if config.reference:
        _check_reference(config, draft)
        models["reference"] = frozen(config.reference, task, shardings=places)
    optimizer = make_optimizer(config.optimizer, config.steps)
    make_step = PhasedStep if config.time_phases else make_distill_step
    state = parts.new_state(config, layout, draft, optimizer)
    step = make_step(
        draft.model,
        target.model,
        recipe,
        optimizer,
        rollout_length=config.rollout_length or task.target_length,
        chunk=config.loss_chunk or None,
        micro_batches=config.micro_batches,
        state_shardings=parts.places(state),
    )
    others = [loaded.params for role, loaded in models.items() if role != "draft"]
    return parts.Prepared(f"distill ({recipe.name})", models, state, step, *others)


def _check_reference(config: DistillConfig, draft: Loaded) -> None:
    """Refuses a frozen draft of another shape before it is read."""
    theirs = ModelConfig(**zoo.describe(config.reference)["model"])
    ours = dataclasses.replace(draft.model.config, name=theirs.name, dtype=theirs.dtype)
    if theirs != ours:
        raise UserError(
            f"config.reference '{config.reference}' must have the shape of the draft "
            f"'{config.draft}'"
        )


def _main(config: DistillConfig, workdir: Path, layout: Layout) -> int | None:
    task, recipe = load_task(config.task), config.recipe.resolve()
    if recipe.lambda1 > 0:
        parts.check_references(task, config.train_split, "or distil on samples")
    prepared = prepare(config, task, layout)
    target, draft = prepared.models["target"], prepared.models["draft"]
    if config.task.teacher_data:
        task.check_teacher(target.fingerprint)
    batches = parts.train_batches(task, config, layout)
    hooks = Hooks(
        evaluate=_make_evaluate(config, task, target, draft, layout),
        learning_rate=make_schedule(config.optimizer, config.steps),
        notice=_notice,
        place=parts.make_place(config, layout),
    )
    with parts.open_run(workdir, "distill", config, task, prepared) as run:
        parts.announce(prepared, config, task, layout)
        result = train(
            prepared.call,
            prepared.state,
            batches,
            config.loop,
            steps=config.steps,
            checkpoints=run.checkpoints,
            writer_of=run.writer_of,
            hooks=hooks,
            name="distill",
        )
        held_out = len(task.examples(config.validation_split))
        figures = {
            "gamma": config.decoder.gamma,
            "recipe": recipe.name,
            "num_prompts": min(config.decoder.num_prompts, held_out),
        }
        return run.finish(result, seed=config.seed, figures=figures)


def _make_evaluate(
    config: DistillConfig, task: Task, target: Loaded, draft: Loaded, layout: Layout
) -> Callable[[TrainState], Figures]:
    decoder = config.decoder
    size = layout.round_up(decoder.batch_size)
    watch = make_decoding(
        target,
        draft.model,
        parts.validation_batches(task, config, decoder.num_prompts, size),
        decoder,
        max_new_tokens=task.target_length,
        seed=config.seed,
        place=layout.place,
    )
    return lambda state: watch(state.averaged_params)


def _notice(figures: Figures) -> str | None:
    return told_of_ends(figures.get("eos_rate", 1.0), "the samples", MEND_ENDS) or None


if __name__ == "__main__":
    door.run(main, DistillConfig, plan=planning.planner(prepare, planning.trial), on_hosts=True)
