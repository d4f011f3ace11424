"""What the training loop costs beside the compiled step, with and without checkpoints.

The same on-policy steps are taken four ways, in turns: by calling the compiled step on batches
that lie on the device already, the same with a copy of the state to the host where the last way
saves, by the loop, and by the loop with saves. The loop draws and places its batches, reads
metrics, writes records. A save has to copy the state before the next step: what it costs beyond
that copy should be little, as the rest is written behind.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.errors import UserError
from distillspec_jax.progress import Progress
from distillspec_jax.sharding.layout import Layout
from distillspec_jax.training.loop import Hooks, LoopConfig, train
from distillspec_jax.training.optimizers import OptimizerConfig
from distillspec_jax.training.state import TrainState
from experiments import distill, parts

WAYS = ("step", "step_with_copies", "loop", "loop_with_saves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The quickstart's sizes."""

    target: str = "stories-target"
    draft: str = "stories-draft"
    batch_size: int = 16
    rollout_length: int = 48
    steps: int = 60
    save_every: int = 20
    repeats: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.save_every < self.steps:
            raise UserError(
                f"loop.save_every is {self.save_every}, must be from 1 to below the {self.steps} "
                "steps: a save between them is what is measured"
            )

    @property
    def saves(self) -> int:
        """Between the first step and the last."""
        return (self.steps - 1) // self.save_every


def measure(config: Config, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds a step of each way, medians over interleaved repeats."""
    run = run_config(config, seed)
    layout, task = parts.open_layout(run), load_task(run.task)
    records = []
    with (
        jax.set_mesh(layout.mesh),
        Progress("loop", len(WAYS) * config.repeats, unit="run") as progress,
    ):
        prepared = distill.prepare(run, task, layout)
        start = jax.device_get(prepared.state)
        ways = _ways(config, run, task, layout, prepared)
        ways["step"](_again(start, prepared.state))  # compiles
        for repeat in range(config.repeats):
            for name, take in ways.items():
                seconds = take(_again(start, prepared.state)) / config.steps
                records.append({"way": name, "repeat": repeat, "seconds_per_step": seconds})
                progress.update(len(records))
    return summarize(config, records), records


def run_config(config: Config, seed: int) -> distill.DistillConfig:
    """The run whose steps are taken."""
    return distill.DistillConfig(
        task=TaskConfig(name="arithmetic_stories"),
        steps=config.steps,
        seed=seed,
        batch_size=config.batch_size,
        target=config.target,
        draft=config.draft,
        rollout_length=config.rollout_length,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
    )


def summarize(config: Config, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, of each way and of what a copy and a save cost in a repeat."""
    seconds = {
        way: np.array([r["seconds_per_step"] for r in records if r["way"] == way]) for way in WAYS
    }
    summary: dict[str, Any] = {
        f"seconds_per_step_{way}": float(np.median(x)) for way, x in seconds.items()
    }
    for way in WAYS[1:]:
        summary[f"overhead_{way}"] = (
            summary[f"seconds_per_step_{way}"] / summary["seconds_per_step_step"] - 1
        )
    copy = (seconds["step_with_copies"] - seconds["step"]) * config.steps / config.saves
    save = (seconds["loop_with_saves"] - seconds["loop"]) * (config.steps - 1) / config.saves
    summary["seconds_of_a_copy"] = float(np.median(copy))
    summary["seconds_of_a_save"] = float(np.median(save))
    summary["seconds_of_a_save_beyond_its_copy"] = float(np.median(save - copy))
    return summary


def _again(start: TrainState, like: TrainState) -> TrainState:
    """The state before the first step, on the devices: steps give theirs away."""
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), start, like)


def _copy(state: TrainState) -> None:
    jax.tree.map(np.array, jax.device_get(state))  # of a CPU's arrays device_get makes views


Take = Callable[[TrainState], float]  # the state before the first step -> seconds


def _ways(
    config: Config,
    run: distill.DistillConfig,
    task: Task,
    layout: Layout,
    prepared: parts.Prepared,
) -> dict[str, Take]:
    place = parts.make_place(run, layout)
    stream = parts.train_batches(task, run, layout)
    source = stream(0)
    batches = [place(next(source)) for _ in range(config.steps)]

    def step(copy_every: int) -> Take:
        def take(state: TrainState) -> float:
            jax.block_until_ready(state)
            before, metrics = time.perf_counter(), None
            for number, batch in enumerate(batches, start=1):
                state, metrics = prepared.call(state, batch)
                if copy_every and number % copy_every == 0 and number < config.steps:
                    _copy(state)
            jax.block_until_ready((state, metrics))
            return time.perf_counter() - before

        return take

    def loop(save_every: int) -> Take:
        def take(state: TrainState) -> float:
            stamps = []

            def stamped(batch: Any) -> Any:
                stamps.append(time.perf_counter())
                return place(batch)

            settings = LoopConfig(log_every=10, evaluate_every=0, save_every=save_every)
            changed = dataclasses.replace(run, loop=settings)
            with (
                tempfile.TemporaryDirectory() as folder,
                parts.open_run(Path(folder) / "run", "loop", changed, task, prepared) as opened,
            ):
                train(
                    prepared.call,
                    state,
                    stream,
                    settings,
                    steps=config.steps,
                    checkpoints=opened.checkpoints,
                    writer_of=opened.writer_of,
                    hooks=Hooks(place=stamped),
                    name="loop",
                )
            # one step fewer, from the first to the last: without the save at the end
            return (stamps[-1] - stamps[0]) * config.steps / (config.steps - 1)

        return take

    takes = (step(0), step(config.save_every), loop(0), loop(config.save_every))
    return dict(zip(WAYS, takes, strict=True))
