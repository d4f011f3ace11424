r"""Distils one draft in many ways: divergence x source of the data, for seeds, data sizes, steps.

    python -m experiments.sweep --config=experiments/configs/grid.py --workdir=runs/grid
    python -m experiments.sweep --config=experiments/configs/curves.py:references \
        --workdir=runs/curve-references
    python -m experiments.sweep --config=experiments/configs/curves.py:steps \
        --workdir=runs/curve-steps

Beside the cells stand the draft before and the control, the same draft trained for the same steps
on the references, all decoded by the real sampler on the same prompts with the same randomness.
Cells that are done are kept: stopped and started again, or asked for more cells, it goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distillspec_jax import zoo
from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.distill.recipes import LIKELIHOOD
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.files import json_object, write_text
from distillspec_jax.interop import native
from distillspec_jax.models.config import check_dtype
from distillspec_jax.models.transformer import Params
from distillspec_jax.progress import Progress
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments import cell_tables, door, planning_decoding
from experiments.cells import CONTROL, SOURCES, Cell, Trainer, slug
from experiments.checks import check_entries, check_least, check_seeds
from experiments.models import Loaded, check_meeting, load
from experiments.parts import check_references, check_teacher_is_read
from experiments.watching import MEND_ENDS, DecoderConfig, make_counts, told_of_ends
from experiments.workdir import METRICS, Workdir, devices, environment, write_json, write_json_lines

DIMENSIONS = ("divergences", "sources", "train_splits", "steps", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneStage:
    """How the draft is made, on each part of the data, before anything is distilled."""

    steps: int = 0  # 0: config.draft is fine-tuned already
    seed: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every list is a dimension; a list may grow when the sweep is started again."""

    target: str
    draft: str  # where every cell starts
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    divergences: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd", "tvd")
    sources: tuple[str, ...] = tuple(SOURCES)
    train_splits: tuple[str, ...] = ("train",)
    steps: tuple[int, ...] = (500,)
    seeds: tuple[int, ...] = (0, 1, 2)
    beta: float = 0.5  # of jsd
    batch_size: int = 16
    rollout_length: int = 0  # limit of samples; 0: the task's target length
    compute_dtype: str = "float32"  # or bfloat16; trained weights, softmax and loss not
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    finetune: FinetuneStage = dataclasses.field(default_factory=FinetuneStage)
    split: str = "test"  # whose prompts are decoded
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    decoding_seed: int = 0

    def __post_init__(self) -> None:
        for field in DIMENSIONS:
            check_entries(f"config.{field}", getattr(self, field))
        for source in self.sources:
            if source not in SOURCES:
                raise unknown_name("source", source, SOURCES, "config.sources")
        check_least(self, 1, "batch_size", "steps")
        check_least(self, 0, "rollout_length")
        check_least(self.finetune, 0, "steps", where="config.finetune")
        check_dtype(self.compute_dtype, "config.compute_dtype")
        check_teacher_is_read(self.task, "config.train_splits", self.train_splits)
        check_seeds("config.seeds", *self.seeds)
        check_seeds("config.finetune.seed", self.finetune.seed)
        check_seeds("config.decoding_seed", self.decoding_seed)
        for cell in self.cells:
            cell.recipe(self.beta)  # refuses unknown divergences and betas
        if {cell.name for cell in self.cells} == {CONTROL}:
            raise UserError(
                "config.divergences and config.sources name nothing but the control, nll on fixed "
                "data; name a divergence, or another source"
            )

    @property
    def cells(self) -> list[Cell]:
        """The control and all pairs of loss and source, seed by seed."""
        pairs = itertools.product(self.divergences, self.sources)
        learnt = dict.fromkeys([(LIKELIHOOD, "fixed"), *pairs])
        return [
            Cell(split, steps, loss, source, seed)
            for split, steps, seed in itertools.product(self.train_splits, self.steps, self.seeds)
            for loss, source in learnt
        ]


def main(config: SweepConfig, workdir: Path) -> None:
    task = load_task(config.task)
    for split in config.train_splits:
        check_references(task, split, "for the control needs them")
    check_meeting(config.target, config.draft)
    dtype = config.compute_dtype
    target = load(config.target, task, compute_dtype=dtype, is_frozen=True)
    if config.task.teacher_data:
        task.check_teacher(target.fingerprint)
    draft = load(config.draft, task, compute_dtype=dtype, seed=config.finetune.seed)
    with Workdir(workdir, "sweep", config, may_change=DIMENSIONS) as run:
        sweep = _Sweep(config, task, target, draft, run.path)
        _announce(config, task, target, draft, sweep)
        measured = sweep.run()
        results = cell_tables.Results(config.decoder, task, measured)
        rows = results.rows()
        write_json_lines(run.path / METRICS, results.records())
        write_text(run.path / "table.md", cell_tables.markdown(rows))
        run.write_summary(cell_tables.summary(rows, config.decoder), seed=config.seeds[0])
        print(cell_tables.markdown(rows))
        print(f"files: {run.path} (summary.json, table.md, {METRICS}, cells)")


class _Sweep:
    """Goes through the cells; each leaves a file in `cells`, by which it is known to be done."""

    def __init__(
        self, config: SweepConfig, task: Task, target: Loaded, draft: Loaded, path: Path
    ) -> None:
        self._config, self._target, self._draft, self._path = config, target, draft, path
        self._trainer = Trainer(
            task,
            target,
            draft.model,
            batch_size=config.batch_size,
            rollout_length=config.rollout_length or task.target_length,
            beta=config.beta,
        )
        decoder = config.decoder
        prompts = task.eval_batches(
            config.split, batch_size=decoder.batch_size, count=decoder.num_prompts
        )
        self._counts = make_counts(
            target,
            draft.model,
            list(prompts),
            decoder,
            max_new_tokens=task.target_length,
            seed=config.decoding_seed,
        )
        self._models = {
            "target": target.fingerprint,
            "draft": draft.fingerprint,
        }
        splits = {*config.train_splits, config.split}
        self._data = {split: task.examples(split).digest for split in sorted(splits)}
        self._card = {
            "vocabulary_fingerprint": task.vocabulary.fingerprint,
            "fine_tuned_from": self._models["draft"],
        }
        self._starts: dict[str, Params] = {}
        for folder in ("cells", "drafts"):
            (path / folder).mkdir(exist_ok=True)

    @property
    def cells(self) -> list[Cell]:
        """The drafts before, then the config's cells."""
        return [Cell(split, 0) for split in self._config.train_splits] + self._config.cells

    @property
    def waiting(self) -> list[Cell]:
        return [cell for cell in self.cells if self._kept(cell) is None]

    def run(self) -> dict[Cell, dict[str, Any]]:
        """Measures what is missing; what each cell's file holds, in the order of the cells."""
        waiting = self.waiting
        total = sum(cell.steps for cell in self.cells)
        done = total - sum(cell.steps for cell in waiting)
        with Progress("sweep", total, done=done) as progress:
            for number, cell in enumerate(waiting, len(self.cells) - len(waiting) + 1):
                label = f"{cell.key} ({number} of {len(self.cells)})"

                def on_step(step: int, before: int = done, label: str = label) -> None:
                    progress.update(before + step, label)

                progress.say(self._measure(cell, on_step))
                done += cell.steps
        return {cell: self._kept(cell) or {} for cell in self.cells}

    def _measure(self, cell: Cell, on_step: Callable[[int], None]) -> str:
        """Trains and decodes a cell, writes its file and returns a line to say."""
        config, begin = self._config, time.perf_counter()
        start = self._start(cell.split)
        figures: dict[str, Any] = {"models": self._models, "data": self._data_of(cell)}
        params = start
        if cell.steps:
            trained = self._trainer.train(cell, start, config.optimizer, on_step)
            params = trained.params
            figures |= {"means": trained.means, "skipped_updates": trained.skipped_updates}
        figures["train_seconds"] = round(time.perf_counter() - begin, 2)
        figures["counts"] = {
            f"{temperature:g}": self._counts(params, temperature).tolist()
            for temperature in config.decoder.temperatures
        }
        write_json(self._file(cell), {**dataclasses.asdict(cell), **figures, **environment()})
        taus = [
            f"{np.sum(emitted) / np.sum(calls):.3f} at T = {temperature}"
            for temperature, (emitted, calls, *_) in figures["counts"].items()
        ]
        line = f"{cell.key}: block efficiency {', '.join(taus)} ({figures['train_seconds']:.0f} s)"
        return line + _few_ends(figures.get("means", {}))

    def _start(self, split: str) -> Params:
        """The draft before, fine-tuned on this part of the data if the config asks for it."""
        stage = self._config.finetune
        if stage.steps == 0:
            return self._draft.params
        if split not in self._starts:
            folder = self._path / "drafts" / slug(split)
            stored, data = native.describe(folder), self._data[split]
            is_same = stored.get("fine_tuned_on", data) == data
            if not is_same or stored.get("fine_tuned_from") != self._models["draft"]:
                self._fine_tune(split, folder)
            self._starts[split] = zoo.load(folder)[1]
        return self._starts[split]

    def _fine_tune(self, split: str, folder: Path) -> None:
        """Writes the draft before, in place of one of other weights or data."""
        stage = self._config.finetune
        cell = Cell(split, stage.steps, seed=stage.seed)
        with Progress(f"fine-tune on {split}", stage.steps) as progress:
            trained = self._trainer.train(
                cell, self._draft.params, stage.optimizer, progress.update
            )
        if folder.exists():
            shutil.rmtree(folder)
        card = self._card | {"fine_tuned_on": self._data[split]}
        zoo.save_native(self._draft.model, trained.params, folder, card, dtype="float32")

    def _file(self, cell: Cell) -> Path:
        return self._path / "cells" / f"{cell.key}.json"

    def _kept(self, cell: Cell) -> dict[str, Any] | None:
        """What the file of a cell holds, if it is this very cell, of these very models and data.

        Of files that do not tell the data, those of an earlier version, it is taken to be this.
        """
        try:
            kept = json_object(self._file(cell).read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # the second: damaged
            return None
        about = {**dataclasses.asdict(cell), "models": self._models}
        data = self._data_of(cell)
        is_same = about.items() <= kept.items() and kept.get("data", data) == data
        return kept if is_same else None

    def _data_of(self, cell: Cell) -> dict[str, str]:
        """Digests of what a cell is trained on and decoded with."""
        return {split: self._data[split] for split in (cell.split, self._config.split)}


def _few_ends(means: Mapping[str, float]) -> str:
    """What the line of a cell ends with if most of the texts written for it did not end."""
    told = told_of_ends(means.get("eos_rate", 1.0), "its samples", MEND_ENDS)
    return f"; {told}" if told else ""


def _announce(
    config: SweepConfig, task: Task, target: Loaded, draft: Loaded, sweep: _Sweep
) -> None:
    cells, waiting = sweep.cells, sweep.waiting
    print(f"sweep: {len(cells)} cells, {len(cells) - len(waiting)} of them done")
    for role, loaded in (("target", target), ("draft", draft)):
        print(f"  {role}: {loaded}")
    print(f"  losses: {', '.join(config.divergences)}; data: {', '.join(config.sources)}")
    sizes = [f"{split} ({len(task.examples(split)):,})" for split in config.train_splits]
    print(f"  training data: {task.name}, {', '.join(sizes)}; batch {config.batch_size}")
    print(f"  steps: {_list(config.steps)}; seeds: {_list(config.seeds)}")
    decoder = config.decoder
    prompts = min(decoder.num_prompts, len(task.examples(config.split)))
    print(
        f"  decoding: {prompts} prompts of {config.split}, gamma {decoder.gamma}, "
        f"T = {_list(decoder.temperatures)}"
    )
    print(f"  devices: {devices()}", flush=True)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    plan = planning_decoding.planner(planning_decoding.of_sweep)
    door.run(main, SweepConfig, plan=plan)
