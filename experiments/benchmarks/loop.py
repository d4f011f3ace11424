"""What the training loop costs beside the compiled step, with and without checkpoints.

The same on-policy steps are taken three ways, in turns: by calling the compiled step on batches
that lie on the device already, by the loop, and by the loop with saves. The loop draws and places
its batches, reads metrics, writes records.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.progress import Progress
from distillspec_jax.sharding.layout import Layout
from distillspec_jax.training.loop import Hooks, LoopConfig, train
from distillspec_jax.training.optimizers import OptimizerConfig
from distillspec_jax.training.state import TrainState
from experiments import distill, parts


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


def measure(config: Config, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds a step of each way, medians over interleaved repeats."""
    run = distill.DistillConfig(
        task=TaskConfig(name="arithmetic_stories"),
        steps=config.steps,
        seed=seed,
        batch_size=config.batch_size,
        target=config.target,
        draft=config.draft,
        rollout_length=config.rollout_length,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
    )
    layout, task = parts.open_layout(run), load_task(run.task)
    records = []
    with jax.set_mesh(layout.mesh), Progress("loop", 3 * config.repeats, unit="run") as progress:
        prepared = distill.prepare(run, task, layout)
        start = jax.device_get(prepared.state)
        ways = _ways(config, run, task, layout, prepared)
        ways["step"](_again(start, prepared.state))  # compiles
        for repeat in range(config.repeats):
            for name, take in ways.items():
                seconds = take(_again(start, prepared.state)) / config.steps
                records.append({"way": name, "repeat": repeat, "seconds_per_step": seconds})
                progress.update(len(records))
    medians = {
        name: float(np.median([r["seconds_per_step"] for r in records if r["way"] == name]))
        for name in ways
    }
    summary: dict[str, Any] = {f"seconds_per_step_{name}": x for name, x in medians.items()}
    for name in ("loop", "loop_with_saves"):
        summary[f"overhead_{name}"] = medians[name] / medians["step"] - 1
    return summary, records


def _again(start: TrainState, like: TrainState) -> TrainState:
    """The state before the first step, on the devices: steps give theirs away."""
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), start, like)


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

    def step(state: TrainState) -> float:
        jax.block_until_ready(state)
        before, metrics = time.perf_counter(), None
        for batch in batches:
            state, metrics = prepared.call(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - before

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
                parts.open_run(
                    Path(folder) / "run", "loop", changed, task, prepared.models["draft"]
                ) as opened,
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
            # from the first step to the last: without the save at the end
            return (stamps[-1] - stamps[0]) * config.steps / (config.steps - 1)

        return take

    return {"step": step, "loop": loop(0), "loop_with_saves": loop(config.save_every)}
