"""What the training entrypoints share: data, vocabulary check, announcement, opening and closing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from distillspec_jax.data import pipeline
from distillspec_jax.errors import UserError
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.loop import Result
from distillspec_jax.training.metrics import MetricsWriter
from experiments import door


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, and the shape of a batch of them."""

    batch_size: int  # B
    input_length: int  # S
    target_length: int  # T, EOS included
    train_split: str = "train"
    validation_split: str = "validation"
    validation_examples: int = 500
    truncate: bool = False  # else an example that is too long is an error

    def __post_init__(self) -> None:
        for field in ("batch_size", "input_length", "target_length", "validation_examples"):
            if getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}, must be at least 1")


def train_batches(task: Any, data: DataConfig, seed: int) -> Callable[[int], Iterator[Any]]:
    """Step -> the endless batches from that step on; their order is a function of (seed, step)."""
    examples = task.examples(data.train_split)

    def from_step(step: int) -> Iterator[Any]:
        return iter(
            pipeline.batches(
                examples,
                task.vocabulary,
                batch_size=data.batch_size,
                input_length=data.input_length,
                target_length=data.target_length,
                seed=seed,
                start_step=step,
                truncate=data.truncate,
            )
        )

    return from_step


def validation_batches(task: Any, data: DataConfig, limit: int | None = None) -> list[Any]:
    """The first `limit` (validation_examples) examples of the validation split, in order."""
    examples = task.examples(data.validation_split)
    count = min(limit or data.validation_examples, len(examples))
    batches = pipeline.eval_batches(
        [examples[i] for i in range(count)],
        task.vocabulary,
        batch_size=data.batch_size,
        input_length=data.input_length,
        target_length=data.target_length,
        truncate=data.truncate,
    )
    return list(batches)


def check_vocabulary(name: str, model: Any, task: Any) -> None:
    """Refuses a model whose output has no row for some piece of the task's vocabulary."""
    pieces, size = model.config.num_pieces, task.vocabulary.size
    if pieces < size:
        raise UserError(
            f"model '{name}' has {pieces} pieces, the vocabulary of the task has {size}; "
            "take a model of that vocabulary"
        )


@dataclasses.dataclass
class Run:
    """An opened workdir with its checkpoints."""

    workdir: door.Workdir
    checkpoints: Checkpoints

    def writer_of(self, resumed_step: int) -> MetricsWriter:
        return MetricsWriter(self.workdir.path, resumed_step=resumed_step)

    def close(
        self, result: Result, *, seed: int, figures: Mapping[str, Any] | None = None
    ) -> int | None:
        """Writes the summary and says the headline; returns the exit code."""
        path = self.workdir.path
        self.checkpoints.close()
        step = int(result.state.step)
        if result.ended == "signal":
            print(f"stopped at step {step}, all saved; the same command goes on from there")
            return door.STOPPED
        memory = result.memory
        summary = {
            "steps": step,
            "ended": result.ended,
            "train_seconds": round(memory.seconds, 2),
            "best_step": memory.best_step if memory.best_step >= 0 else step,
            **(figures or memory.evaluation),
        }
        file = self.workdir.write_summary(summary, seed=seed)
        for key, value in (figures or memory.evaluation).items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        print(f"files: {path} (checkpoints, metrics.jsonl, tensorboard, {file.name})")
        return None


def open_run(workdir: Path, experiment: str, config: Any, model: Any, task: Any) -> Run:
    """Opens the workdir of a training run; config needs `optimizer` and `loop`."""
    may_change = () if config.optimizer.depends_on_steps else ("steps",)
    opened = door.Workdir(workdir, experiment, config, may_change=may_change)
    description = {
        "model": dataclasses.asdict(model.config),
        "vocabulary_fingerprint": task.vocabulary.fingerprint,
        "optimizer": dataclasses.asdict(config.optimizer),
        "experiment": experiment,
        "seed": config.seed,
    }
    return Run(opened, Checkpoints(workdir, description, keep_last=config.loop.keep_last))


def announce(name: str, models: Mapping[str, tuple[Any, Any]], task: Any, config: Any) -> None:
    """Says what is about to happen: models, parameters, devices, data, memory."""
    data = config.data
    total = 0
    print(f"{name}: {config.steps} steps, seed {config.seed}")
    for role, (model, params) in models.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        total += sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        print(f"  {role}: {model.config.name}, {count:,} parameters, {model.config.dtype}")
    devices = jax.devices()
    print(f"  devices: {len(devices)} x {devices[0].device_kind}")
    print(
        f"  data: {task.name}, {len(task.examples(data.train_split)):,} training examples, batch "
        f"{data.batch_size}, up to {data.input_length} + {data.target_length} tokens, vocabulary "
        f"of {task.vocabulary.size}"
    )
    print(f"  memory: about {total * 4 / 2**20:,.0f} MiB of weights, gradients and optimiser state")
    sys.stdout.flush()
