r"""Fine-tunes a model on the references of a task, by likelihood.

    python -m experiments.finetune --config=experiments/configs/finetune_stories.py:target \
        --workdir=runs/target

Started again with the same workdir it goes on from the last checkpoint, to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from distillspec_jax.data.tasks import Task, load_task
from distillspec_jax.decoding.checks import check_finite
from distillspec_jax.distill.losses import REDUCTIONS
from distillspec_jax.distill.step import make_finetune_step
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.sharding.layout import Layout
from distillspec_jax.training.loop import Hooks, LoopConfig, train
from distillspec_jax.training.optimizers import make_optimizer, make_schedule
from distillspec_jax.training.state import TrainState
from distillspec_jax.training.validation import make_likelihood
from experiments import door, parts, planning
from experiments.checks import check_least
from experiments.models import load
from experiments.watching import make_quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(parts.TrainingConfig):
    """One fine-tuning run."""

    model: str  # preset to start fresh, or a name or path to start from (zoo.load)
    dropout: bool = False  # at the rate of the model's config
    reduction: str = "token"  # mean over tokens, or "sequence": over sequences of token means
    model_layout: str = "sharded"  # over config.mesh, or "replicated"
    validation_examples: int = 500
    decode_prompts: int = 0  # validation prompts to answer greedily, scored by the task's metric
    loop: LoopConfig = dataclasses.field(
        default_factory=lambda: LoopConfig(best_metric="loss", best_mode="min")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "validation_examples")
        check_least(self, 0, "decode_prompts")
        if self.reduction not in REDUCTIONS:
            raise unknown_name("reduction", self.reduction, REDUCTIONS, "config.reduction")
        answers = ["quality"] if self.decode_prompts else []
        parts.check_best_metric(self.loop, ["loss", "token_accuracy", *answers])


def main(config: FinetuneConfig, workdir: Path) -> int | None:
    layout = parts.open_layout(config)
    with jax.set_mesh(layout.mesh):
        return _main(config, workdir, layout)


def prepare(
    config: FinetuneConfig, task: Task, layout: Layout, load: parts.Load = load
) -> parts.Prepared:
    """The model, its state and the compiled step; only shapes if `load` gives no more."""
    _check_answers(config, task)
    places = layout.params(config.model_layout)
    loaded = load(
        config.model,
        task,
        compute_dtype=config.compute_dtype,
        seed=config.seed,
        shardings=places,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = parts.new_state(config, layout, loaded, optimizer)
    step = make_finetune_step(
        loaded.model,
        optimizer,
        dropout=config.dropout,
        reduction=config.reduction,
        chunk=config.loss_chunk or None,
        micro_batches=config.micro_batches,
        state_shardings=parts.places(state),
    )
    return parts.Prepared("finetune", {"model": loaded}, state, step)


def _check_answers(config: FinetuneConfig, task: Task) -> None:
    """Refuses answers that nothing would score."""
    if config.decode_prompts and task.metric == "none":
        raise UserError(
            f"config.decode_prompts asks for answers, and task '{task.name}' has no metric to "
            "score them; set config.task.metric, or leave config.decode_prompts out"
        )


def _main(config: FinetuneConfig, workdir: Path, layout: Layout) -> int | None:
    task = load_task(config.task)
    parts.check_references(task, config.train_split, "or distil on samples")
    prepared = prepare(config, task, layout)
    loaded = prepared.models["model"]
    batches = parts.train_batches(task, config, layout)
    hooks = Hooks(
        evaluate=_make_evaluate(config, loaded.model, task, layout),
        learning_rate=make_schedule(config.optimizer, config.steps),
        place=parts.make_place(config, layout),
    )
    with parts.open_run(workdir, "finetune", config, task, prepared) as run:
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
            name="finetune",
        )
        return run.finish(result, seed=config.seed, figures={})


def _make_evaluate(
    config: FinetuneConfig, model: Transformer, task: Task, layout: Layout
) -> Callable[[TrainState], dict[str, float]]:
    size = layout.round_up(config.batch_size)
    batches = parts.validation_batches(task, config, config.validation_examples, size)
    chunk = config.loss_chunk or None
    watches = [make_likelihood(model, map(layout.place, batches), chunk=chunk)]
    if config.decode_prompts:
        prompts = parts.validation_batches(task, config, config.decode_prompts, size)
        where = task.examples(config.validation_split).where
        watches.append(make_quality(model, task, prompts, place=layout.place, where=where))

    def evaluate(state: TrainState) -> dict[str, float]:
        figures = watches[0](state.averaged_params)
        if state.step == 0:  # later it is the training that broke them
            check_finite(np.isfinite(figures["loss"]), f"model '{config.model}'")
        for watch in watches[1:]:
            figures |= watch(state.averaged_params)
        return figures

    return evaluate


if __name__ == "__main__":
    door.run(
        main, FinetuneConfig, plan=planning.planner(prepare, planning.validation), on_hosts=True
    )
