"""What the training entrypoints share: data, checks, and the opening and closing of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import optax

from distillspec_jax import hosts, zoo
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import TEACHER, Task, TaskConfig
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.models.config import check_dtype
from distillspec_jax.run_folders import newest_step
from distillspec_jax.sharding.layout import Layout, check_rows, device_bytes
from distillspec_jax.sharding.mesh import AXES, MeshConfig, make_mesh
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.loop import LoopConfig, Result
from distillspec_jax.training.metrics import MetricsWriter, Writer
from distillspec_jax.training.optimizers import OptimizerConfig
from distillspec_jax.training.state import TrainState
from experiments import door, schema
from experiments.checks import check_least, check_seeds
from experiments.models import Loaded, Shardings
from experiments.workdir import Workdir

# What may differ when a run goes on: it changes no number of the training, but by rounding.
HARMLESS = (
    *(f"loop.{name}" for name in ("log_every", "save_every", "keep_last", "max_skipped")),
    *(f"mesh.{axis}" for axis in AXES),
    *("model_layout", "target_layout", "draft_layout"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configs of all training entrypoints have."""

    task: TaskConfig
    steps: int
    batch_size: int  # B, over all hosts
    seed: int = 0
    train_split: str = "train"
    validation_split: str = "validation"
    loss_chunk: int = 0  # positions that have logits at a time; 0: all
    length_bucket: int = 0  # above 0: like lengths share a batch (pipeline.batches)
    micro_batches: int = 1  # parts that a batch is computed in, to save memory
    average_decay: float = 0.0  # of the moving average of weights; 0: none
    compute_dtype: str = "float32"  # or bfloat16; trained weights, softmax and loss not
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "batch_size", "micro_batches")
        check_least(self, 0, "loss_chunk", "length_bucket")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"config.micro_batches is {self.micro_batches}, must divide the batch size "
                f"{self.batch_size}"
            )
        check_seeds("config.seed", self.seed)
        if not 0 <= self.average_decay < 1:
            raise UserError(f"config.average_decay is {self.average_decay}, must be within [0, 1)")
        check_dtype(self.compute_dtype, "config.compute_dtype")
        splits = (self.train_split, self.validation_split)
        check_teacher_is_read(self.task, "config.train_split", splits)


class Load(Protocol):
    """`models.load`, or `models.outline`: shapes alone."""

    def __call__(
        self,
        path: str,
        task: Task,
        *,
        compute_dtype: str,
        seed: int = 0,
        shardings: Shardings | None = None,
        is_frozen: bool = False,
    ) -> Loaded: ...


class Prepared:
    """What is trained, and how.

    `models` are by role, the trained one first. A step reads the `frozen` parameters too: the
    first before the batch, the others behind it.
    """

    def __init__(
        self, name: str, models: Mapping[str, Loaded], state: TrainState, step: Any, *frozen: Any
    ) -> None:
        self.name, self.models, self.state, self.step = name, models, state, step
        self.frozen = frozen

    @property
    def trained(self) -> Loaded:
        """The model that is trained."""
        return next(iter(self.models.values()))

    def arguments(self, state: TrainState, batch: Any) -> tuple[Any, ...]:
        """What `step` is called with."""
        return (state, *self.frozen[:1], batch, *self.frozen[1:])

    def call(self, state: TrainState, batch: Any) -> Any:
        """`(state, batch) -> (state, metrics)`."""
        return self.step(*self.arguments(state, batch))


def open_layout(config: TrainingConfig) -> Layout:
    """The mesh that the config asks for; UserError if it does not divide the batch."""
    rows = config.batch_size // config.micro_batches
    layout = Layout(make_mesh(config.mesh, rows=rows))
    check_rows(layout, config.batch_size, config.micro_batches)
    return layout


def new_state(
    config: TrainingConfig,
    layout: Layout,
    trained: Loaded,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step, born on its devices; takes over the parameters."""

    def make(params: Any) -> TrainState:
        return TrainState.create(
            params, optimizer, seed=config.seed, average_decay=config.average_decay
        )

    return layout.born(make, trained.params)


def places(state: TrainState) -> Any:
    """Where each leaf of a state, or of its shapes, lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def make_place(config: TrainingConfig, layout: Layout) -> Callable[[Batch], Batch]:
    """This host's rows of a training batch -> the batch of all hosts, on the devices."""
    share = layout.share(config.batch_size)
    return lambda batch: layout.place(batch, share)


def train_batches(
    task: Task, config: TrainingConfig, layout: Layout
) -> Callable[[int], Iterator[Batch]]:
    """Step -> this host's rows of the endless batches from that step on.

    Their order is a function of (seed, step). Raises UserError at once, before anything is
    written, if the examples are no good.
    """
    index, count = layout.share(config.batch_size)

    def from_step(step: int) -> Iterator[Batch]:
        return task.batches(
            config.train_split,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            bucket=config.length_bucket,
            process_index=index,
            process_count=count,
        )

    first = from_step(0)
    return lambda step: from_step(step) if step else first


def validation_batches(
    task: Task, config: TrainingConfig, count: int, batch_size: int
) -> list[Batch]:
    """The first `count` examples of the validation split, in order."""
    return list(task.eval_batches(config.validation_split, batch_size=batch_size, count=count))


def check_teacher_is_read(task: TaskConfig, key: str, splits: Sequence[str]) -> None:
    """Refuses texts of a teacher that none of a run's splits is; `key` may name one."""
    if task.teacher_data and TEACHER not in {each.partition("[")[0] for each in splits}:
        raise UserError(
            f"config.task.teacher_data is read as the split '{TEACHER}', and this run reads "
            f"{', '.join(repr(each) for each in splits)}: have {key} name '{TEACHER}', or leave "
            "config.task.teacher_data out"
        )


def check_best_metric(loop: LoopConfig, known: Sequence[str]) -> None:
    """Refuses a figure that no evaluation of the run will have, before anything is loaded."""
    if loop.best_metric and loop.best_metric not in known:
        raise unknown_name("metric", loop.best_metric, known, "config.loop.best_metric")


def check_references(task: Task, split: str, instead: str) -> None:
    """Refuses prompts without references where references are learnt from."""
    if not task.examples(split)[0].target:
        raise UserError(
            f"the split '{split}' of task '{task.name}' has no references to learn from; name "
            f"their field (config.task.target_field), {instead}"
        )


@dataclasses.dataclass
class Run:
    """An opened workdir with its checkpoints; a context manager."""

    workdir: Workdir | None  # of the first host alone
    checkpoints: Checkpoints
    steps: int

    def writer_of(self, resumed_step: int, evaluated_step: int) -> Writer:
        if self.workdir is None:
            return Writer()
        if resumed_step < self.steps:
            self.workdir.drop_summary()  # of a run that was over, and now goes on
        return MetricsWriter(
            self.workdir.path, resumed_step=resumed_step, evaluated_step=evaluated_step
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.close()
        if self.workdir is not None:
            self.workdir.close()

    def finish(self, result: Result, *, seed: int, figures: Mapping[str, Any]) -> int | None:
        """Writes the summary with some more `figures`, says the headline, returns the exit code."""
        step, memory = int(result.state.step), result.memory
        stopped = result.ended == "signal"
        if self.workdir is None:
            return door.STOPPED if stopped else None
        if stopped:
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
            "compile_seconds": round(memory.compile_seconds, 2),
            "skipped_updates": int(result.state.skipped),
            "best_step": memory.best_step if memory.best_evaluation else step,
        }
        file = self.workdir.write_summary(summary, seed=seed)
        print(f"weights of step {summary['best_step']} ({result.ended} at step {step}):")
        for key, value in headline.items():
            if isinstance(value, float):
                print(f"  {key}: {value:.4g} (before: {memory.first_evaluation[key]:.4g})")
        if summary["skipped_updates"]:
            print(
                f"  warning: {summary['skipped_updates']:,} updates were left out, for their "
                "gradients were not finite"
            )
        print(f"files: {self.workdir.path} (checkpoints, metrics.jsonl, tensorboard, {file.name})")
        return None


def _before(key: str) -> str:
    stem, interval, _ = key.partition("_ci95")
    return f"{stem}_before{interval}"


def open_run(
    workdir: Path, experiment: str, config: TrainingConfig, task: Task, prepared: Prepared
) -> Run:
    """Opens the workdir of a training run; on several hosts the first one does it for all.

    Going on, `steps` may be another number unless the learning rate depends on it: then the steps
    already taken would not be those of the longer run.
    """
    may_change = HARMLESS if config.optimizer.depends_on_steps else (*HARMLESS, "steps")
    description = {
        "model": prepared.trained.model.config.as_stored(),
        "vocabulary_fingerprint": task.vocabulary.fingerprint,
        "optimizer": dataclasses.asdict(config.optimizer),
        "experiment": experiment,
        "seed": config.seed,
        "sources": _sources(config, task, prepared),
    }
    hosts.check_same(schema.flat(description))
    opened = hosts.on_first(
        lambda: Workdir(
            workdir,
            experiment,
            config,
            may_change=may_change,
            at_least={"steps": newest_step(workdir)},
        )
    )
    checkpoints = Checkpoints(workdir, description, keep_last=config.loop.keep_last)
    return Run(opened, checkpoints, config.steps)


def _sources(config: TrainingConfig, task: Task, prepared: Prepared) -> dict[str, str]:
    """Digests of what a run reads by its path; the same run does not go on from others.

    Fresh weights are told by their seed: their last bits are those of a machine.
    """
    [first, *_] = prepared.models
    # the state took over what was loaded for it
    trained = dataclasses.replace(prepared.trained, params=prepared.state.params)
    read = {
        role: loaded.fingerprint
        for role, loaded in {**prepared.models, first: trained}.items()
        if zoo.find(loaded.path).path is not None
    }
    for split in (config.train_split, config.validation_split):
        read[f"data of '{split}'"] = task.examples(split).digest
    return read


def announce(prepared: Prepared, config: TrainingConfig, task: Task, layout: Layout) -> None:
    """Says what is about to happen: models, parameters, mesh, data, memory."""
    if not hosts.is_first():
        return
    print(f"{prepared.name}: {config.steps:,} steps, seed {config.seed}")
    for role, loaded in prepared.models.items():
        print(f"  {role}: {loaded}, {loaded.model.config.dtype}")
    print(f"  devices: {layout.describe()}")
    print(
        f"  data: {task.name}, {len(task.examples(config.train_split)):,} training examples, batch "
        f"{config.batch_size}, up to {task.input_length} + {task.target_length} tokens, vocabulary "
        f"of {task.vocabulary.size}"
    )
    warm_up = config.optimizer.warmup_steps
    if warm_up >= config.steps:
        print(
            f"  warning: config.optimizer.warmup_steps is {warm_up:,}: the run of {config.steps:,} "
            "steps ends before the learning rate has risen"
        )
    state = prepared.state
    held = device_bytes((state, state.params, prepared.frozen))
    print(
        f"  memory: {held / 2**20:,.0f} MiB a device of weights, optimiser state and gradients, "
        "without activations",
        flush=True,
    )
