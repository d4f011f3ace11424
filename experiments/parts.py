"""What the training entrypoints share: data, checks, and the opening and closing of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from distillspec_jax.data import pipeline
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import take
from distillspec_jax.data.tasks import Task, TaskConfig
from distillspec_jax.errors import UserError
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.loop import LoopConfig, Result
from distillspec_jax.training.metrics import MetricsWriter
from distillspec_jax.training.optimizers import OptimizerConfig
from distillspec_jax.training.state import TrainState
from experiments import door
from experiments.bench import Loaded
from experiments.workdir import Workdir

# What may differ when a run goes on: it changes no number of the training.
HARMLESS = ("loop.log_every", "loop.save_every", "loop.keep_last", "loop.max_skipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configs of all training entrypoints have."""

    task: TaskConfig
    steps: int
    batch_size: int  # B, over all hosts
    seed: int = 0
    train_split: str = "train"
    validation_split: str = "validation"
    validation_examples: int = 500
    length_bucket: int = 0  # above 0: like lengths share a batch (pipeline.batches)
    micro_batches: int = 1  # parts that a batch is computed in, to save memory
    average_decay: float = 0.0  # of the moving average of weights; 0: none
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "validation_examples", "micro_batches"):
            if getattr(self, field) < 1:
                raise UserError(f"config.{field} is {getattr(self, field)}, must be at least 1")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"config.micro_batches is {self.micro_batches}, must divide the batch size "
                f"{self.batch_size}"
            )
        if not 0 <= self.average_decay < 1:
            raise UserError(f"config.average_decay is {self.average_decay}, must be within [0, 1)")


def train_batches(task: Task, config: TrainingConfig) -> Callable[[int], Iterator[Batch]]:
    """Step -> the endless batches from that step on; their order is a function of (seed, step).

    Raises UserError at once, before anything is written, if the examples are no good.
    """

    def from_step(step: int) -> Iterator[Batch]:
        return task.batches(
            config.train_split,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            bucket=config.length_bucket,
        )

    first = from_step(0)
    return lambda step: from_step(step) if step else first


def validation_batches(
    task: Task, config: TrainingConfig, count: int, batch_size: int
) -> list[Batch]:
    """The first `count` examples of the validation split, in order."""
    examples = task.examples(config.validation_split)
    return list(
        pipeline.eval_batches(
            take(examples, range(min(count, len(examples)))),
            task.vocabulary,
            batch_size=batch_size,
            input_length=task.input_length,
            target_length=task.target_length,
            truncate=task.truncate,
            input_eos=task.input_eos,
        )
    )


def check_references(task: Task, config: TrainingConfig) -> None:
    """Refuses prompts without references where references are learnt from."""
    if not task.examples(config.train_split)[0].target:
        raise UserError(
            f"the split '{config.train_split}' of task '{task.name}' has no references to learn "
            "from; name their field (config.task.target_field), or distil on samples"
        )


@dataclasses.dataclass
class Run:
    """An opened workdir with its checkpoints; a context manager."""

    workdir: Workdir
    checkpoints: Checkpoints

    def writer_of(self, resumed_step: int) -> MetricsWriter:
        return MetricsWriter(self.workdir.path, resumed_step=resumed_step)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.close()
        self.workdir.close()

    def finish(self, result: Result, *, seed: int, figures: Mapping[str, Any]) -> int | None:
        """Writes the summary with some more `figures`, says the headline, returns the exit code."""
        step, memory = int(result.state.step), result.memory
        if result.ended == "signal":
            print(f"stopped at step {step}, all saved; the same command goes on from there")
            return door.STOPPED
        headline = memory.best_evaluation or memory.evaluation
        summary = {
            **headline,
            **{_before(key): value for key, value in memory.first_evaluation.items()},
            **figures,
            "steps": step,
            "ended": result.ended,
            "train_seconds": round(memory.seconds, 2),
            "best_step": memory.best_step if memory.best_evaluation else step,
        }
        file = self.workdir.write_summary(summary, seed=seed)
        print(f"weights of step {summary['best_step']} ({result.ended} at step {step}):")
        for key, value in headline.items():
            if isinstance(value, float):
                print(f"  {key}: {value:.4g} (before: {memory.first_evaluation[key]:.4g})")
        print(f"files: {self.workdir.path} (checkpoints, metrics.jsonl, tensorboard, {file.name})")
        return None


def _before(key: str) -> str:
    stem, interval, _ = key.partition("_ci95")
    return f"{stem}_before{interval}"


def open_run(
    workdir: Path, experiment: str, config: TrainingConfig, task: Task, trained: Loaded
) -> Run:
    """Opens the workdir of a training run.

    Going on, `steps` may be another number unless the learning rate depends on it: then the steps
    already taken would not be those of the longer run.
    """
    may_change = HARMLESS if config.optimizer.depends_on_steps else (*HARMLESS, "steps")
    opened = Workdir(workdir, experiment, config, may_change=may_change)
    description = {
        "model": dataclasses.asdict(trained.model.config),
        "vocabulary_fingerprint": task.vocabulary.fingerprint,
        "optimizer": dataclasses.asdict(config.optimizer),
        "experiment": experiment,
        "seed": config.seed,
    }
    return Run(opened, Checkpoints(workdir, description, keep_last=config.loop.keep_last))


def announce(
    name: str, config: TrainingConfig, task: Task, state: TrainState, models: Mapping[str, Loaded]
) -> None:
    """Says what is about to happen: models, parameters, devices, data, memory.

    `models` are by role, the trained one first.
    """
    print(f"{name}: {config.steps:,} steps, seed {config.seed}")
    for role, loaded in models.items():
        dtype = loaded.model.config.dtype
        print(f"  {role}: {loaded.path}, {loaded.num_parameters:,} parameters, {dtype}")
    devices = jax.devices()
    print(f"  devices: {len(devices)} x {devices[0].device_kind}")
    print(
        f"  data: {task.name}, {len(task.examples(config.train_split)):,} training examples, batch "
        f"{config.batch_size}, up to {task.input_length} + {task.target_length} tokens, vocabulary "
        f"of {task.vocabulary.size}"
    )
    _, *frozen = (loaded.params for loaded in models.values())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, state.params, frozen)))
    print(
        f"  memory: {held / 2**20:,.0f} MiB of weights, optimiser state and gradients, without "
        "activations",
        flush=True,
    )
