"""What --plan says of generate, evaluate, decode and sweep, which run on one device.

Their models are outlined, the functions that they compile are compiled on shapes, and the largest
of them decides. Slots are planned as one batch: they hold what as many rows of it hold.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task, load_task
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.distill.recipes import LIKELIHOOD
from distillspec_jax.evaluation import acceptance
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.sharding.mesh import MeshConfig
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.bench import Bench, Draft, Prompts, Setting
from experiments.cells import Cell, Trainer
from experiments.decoder import Decoder, given_prompts
from experiments.models import Loaded, check_meeting, outline
from experiments.planning import (
    GIB,
    bytes_of,
    cache_bytes,
    compile_quickly,
    generating,
    introduce,
    judge,
    make_virtual_devices,
    memory_of,
    narrower,
    rollout_caches,
    shape_of_key,
    speculating,
    trial_speculation,
)

if TYPE_CHECKING:
    from experiments.decoder import DecodeConfig
    from experiments.evaluate import EvaluateConfig
    from experiments.generate import GenerateConfig
    from experiments.sweep import SweepConfig

ONE_DEVICE = MeshConfig(1, 1, 1)
TASK_LENGTHS = "config.task.input_length", "config.task.target_length"


@dataclasses.dataclass(frozen=True)
class Call:
    """Prompts of one call: each row reads up to `input_length` tokens and writes up to `limit`.

    options: of the config, which make it smaller; that of the rows comes first.
    """

    rows: int
    input_length: int
    limit: int
    options: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.rows * (self.input_length + self.limit)

    @property
    def inputs(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.input_length), jnp.int32)

    @property
    def texts(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.limit), jnp.int32)

    @property
    def per_row(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows,), jnp.int32)

    def __str__(self) -> str:
        each = f"{self.input_length} + {self.limit} tokens"
        return f"a call of {self.rows} x up to {each}, {self.tokens:,} in all"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function that an entrypoint compiles, lowered on shapes.

    caches: bytes of keys and values, a part of what it adds while it runs.
    trained: bytes of a draft in training, with its optimiser, beside the models.
    optimizer: key of the config that makes those fewer, if one does.
    """

    name: str
    lowered: jax.stages.Lowered
    call: Call
    caches: int = 0
    trained: int = 0
    optimizer: str = ""


@dataclasses.dataclass(frozen=True)
class Outline:
    """An entrypoint without arrays; `copies` are bytes of further weights of its models."""

    name: str
    models: Mapping[str, Loaded]
    programs: Sequence[Program]
    copies: int = 0

    @property
    def dtype(self) -> str:
        """What all of them compute in."""
        return next((each.model.config.dtype for each in self.models.values()), "float32")

    @property
    def weights(self) -> int:
        return self.copies + sum(bytes_of(loaded.params) for loaded in self.models.values())


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on the device while a program runs; `weights` are those of all models."""

    program: Program
    weights: int
    running: int  # what the compiler adds: activations, gradients, caches and results

    @property
    def total(self) -> int:
        return self.weights + self.program.trained + self.running


def planner(outline_of: Callable[[Any], Outline]) -> Callable[[Any, float | None], int | None]:
    """The --plan of an entrypoint: `(config, GiB of the device or None) -> exit code`."""

    def plan(config: Any, memory_gib: float | None) -> int | None:
        make_virtual_devices(ONE_DEVICE)
        return tell(outline_of(config), memory_gib)

    return plan


def tell(found: Outline, memory_gib: float | None) -> int | None:
    """Says what an outline needs; the exit code."""
    introduce(f"{found.name} on one device", found.models)
    start = time.perf_counter()
    needs = [need_of(program, found.weights) for program in found.programs]
    _say(needs, time.perf_counter() - start)
    largest = max(needs, key=lambda need: need.total)
    print(f"the device holds up to {largest.total / GIB:.3f} GiB: {largest.program.name}")
    helping = functools.partial(advice, largest, memory_gib or 0, found.dtype)
    return judge(largest.total, memory_gib, helping)


def need_of(program: Program, weights: int) -> Need:
    """Compiles a program for what it needs."""
    return Need(program, weights, sum(memory_of(compile_quickly(program.lowered))))


def advice(need: Need, memory_gib: float, dtype: str) -> str:
    """Which option shrinks what does not fit."""
    program = need.program
    if need.weights >= memory_gib * GIB:
        return (
            f"the weights alone take {need.weights / GIB:.2f} GiB and are not split here: "
            f"take smaller models or a larger device{narrower(dtype)}"
        )
    if program.trained > need.running and program.optimizer:
        return f"take {program.optimizer} 'adafactor'"
    *options, last = program.call.options[0 if program.call.rows > 1 else 1 :]
    return f"lower {', '.join(options)} or {last}{narrower(dtype)}"


def of_generate(config: GenerateConfig) -> Outline:
    """The target writes alone, a file of texts at a time."""
    task = load_task(config.task)
    target = outline(config.target, task, compute_dtype=config.compute_dtype, is_frozen=True)
    call = Call(
        min(config.batch_size, config.shard_size),
        task.input_length,
        config.max_new_tokens or task.target_length,
        ("config.batch_size", "config.max_new_tokens", "config.task.input_length"),
    )
    return Outline("generate", {"target": target}, [alone(target, call, config.sampling)])


def of_decode(config: DecodeConfig) -> Outline:
    """All prompts of the config, or one of the terminal at a time."""
    examples, decoder = given_prompts(config), Decoder(config, outline)
    rows, length = 1, config.input_length
    if examples is not None:
        rows, length = decoder.encode(examples).shape
    options = "config.batch_size", "config.max_new_tokens", "config.input_length"
    call = Call(min(config.batch_size, rows), length, config.max_new_tokens, options)
    target, draft = decoder.target, decoder.draft
    if draft is None or decoder.speculation is None:
        return Outline("decode", {"target": target}, [alone(target, call, decoder.sampling)])
    program = drafted(decoder.speculation, target, draft, call)
    return Outline("decode", {"target": target, "draft": draft}, [program])


def of_evaluate(config: EvaluateConfig) -> Outline:
    """Every kind of decoding and scoring, at the largest temperature, gamma and timed batch."""
    bench = _bench(config)
    lengths = "config.max_new_tokens", "config.task.input_length"
    is_tuned = config.tune and config.has_whole_blocks
    prompts = max(config.num_prompts, config.num_tuning_prompts if is_tuned else 0)
    sizes = {"config.batch_size": min(config.batch_size, prompts)}
    if config.timed_prompts:
        sizes["config.timed_batch_sizes"] = max(config.timed_batch_sizes)
    gamma = max((*config.gammas, *(config.gamma_grid if is_tuned else ())))
    temperature = max(config.temperatures)
    programs = []
    for option, rows in sizes.items():
        call = Call(rows, bench.task.input_length, bench.max_new_tokens, (option, *lengths))
        programs.append(alone(bench.target, call, bench.sampling(temperature)))
        for draft in _of_each_shape(bench.drafts):
            setting = Setting(draft.config.name, temperature, gamma)
            models = bench.target, draft.loaded
            programs.append(drafted(bench.speculation(draft, setting), *models, call))
            if option == "config.batch_size":
                sampling = bench.sampling(temperature), bench.draft_sampling(temperature)
                programs.append(_scored(*models, call, *sampling))
    return Outline("evaluate", bench.models, programs)


def of_sweep(config: SweepConfig) -> Outline:
    """Who writes, what is learnt by each loss, and the real decoder."""
    task = load_task(config.task)
    check_meeting(config.target, config.draft)
    outlined = functools.partial(outline, task=task, compute_dtype=config.compute_dtype)
    target, draft = outlined(config.target, is_frozen=True), outlined(config.draft)
    programs = [
        *_training(config, task, target, draft),
        _tried_out(config, task, target, draft),
    ]
    fine_tuned = len(config.train_splits) if config.finetune.steps else 0
    models = {"target": target, "draft": draft}
    return Outline("sweep", models, programs, copies=fine_tuned * bytes_of(draft.params))


def _training(config: SweepConfig, task: Task, target: Loaded, draft: Loaded) -> list[Program]:
    """The rollout of each source that samples, and the update by each loss."""
    length, steps = config.rollout_length or task.target_length, config.steps[0]
    trainer = Trainer(
        task,
        target,
        draft.model,
        batch_size=config.batch_size,
        rollout_length=length,
        beta=config.beta,
    )
    options = "config.batch_size", "config.rollout_length", *TASK_LENGTHS
    call = Call(config.batch_size, task.input_length, max(length, task.target_length), options)
    batch = Batch(inputs=call.inputs, targets=call.texts, example_ids=call.per_row)

    def half(
        index: int, name: str, cell: Cell, optimizer: OptimizerConfig, section: str = "config"
    ) -> Program:
        rule = make_optimizer(optimizer, cell.steps)
        state = jax.eval_shape(lambda params: TrainState.create(params, rule), draft.params)
        lowered = trainer.halves(cell, optimizer)[index].lower(state, target.params, batch)
        key = "" if optimizer.name == "adafactor" else f"{section}.optimizer.name"
        return Program(name, lowered, call, trained=bytes_of(state), optimizer=key)

    def rollout(source: str) -> Program:
        cell = Cell("", steps, source=source)
        caches = rollout_caches(
            cell.recipe(config.beta),
            {"target": target, "draft": draft},
            length,
            lambda model, limit: cache_bytes(model, call.rows, call.input_length, limit),
        )
        program = half(0, f"texts by {source}", cell, config.optimizer)
        return dataclasses.replace(program, caches=caches)

    programs = [rollout(source) for source in config.sources if source != "fixed"]
    for loss in dict.fromkeys((LIKELIHOOD, *config.divergences)):
        programs.append(half(1, f"update by {loss}", Cell("", steps, loss), config.optimizer))
    if config.finetune.steps:
        cell = Cell("", config.finetune.steps)
        optimizer, section = config.finetune.optimizer, "config.finetune"
        programs.append(half(1, "fine-tuning", cell, optimizer, section))
    return programs


def _tried_out(config: SweepConfig, task: Task, target: Loaded, draft: Loaded) -> Program:
    """The real decoder with a trained draft; the one it came from is there, too."""
    decoder = config.decoder
    options = "config.decoder.batch_size", *TASK_LENGTHS
    call = Call(decoder.batch_size, task.input_length, task.target_length, options)
    program = drafted(trial_speculation(decoder, target, draft, task), target, draft, call)
    return dataclasses.replace(program, trained=bytes_of(draft.params))


def alone(model: Loaded, call: Call, sampling: Sampling) -> Program:
    """The model decodes without a draft."""
    lowered = generating.lower(
        model.model,
        model.params,
        call.inputs,
        shape_of_key(),
        sampling=sampling,
        max_new_tokens=call.limit,
        row_ids=call.per_row,
    )
    caches = cache_bytes(model, call.rows, call.input_length, call.limit)
    return Program("decoding without a draft", lowered, call, caches)


def drafted(speculation: Speculation, target: Loaded, draft: Loaded, call: Call) -> Program:
    """Speculative decoding, in one batch or in as many slots."""
    params = target.params, draft.params
    lowered = speculating.lower(speculation, *params, call.inputs, shape_of_key(), call.per_row)
    rows, limit = call.rows * speculation.num_drafts, call.limit + speculation.gamma
    caches = sum(cache_bytes(model, rows, call.input_length, limit) for model in (target, draft))
    return Program(f"drafted by {draft.path}, gamma {speculation.gamma}", lowered, call, caches)


def _scored(
    target: Loaded, draft: Loaded, call: Call, sampling: Sampling, draft_sampling: Sampling
) -> Program:
    """Texts of the target scored by both models."""
    models = target.model, target.params, draft.model, draft.params
    texts = call.inputs, call.texts, call.per_row
    lowered = acceptance.score_texts.lower(*models, *texts, sampling, draft_sampling)
    return Program(f"texts scored by {draft.path}", lowered, call)


def _bench(config: EvaluateConfig) -> Bench:
    """What `open_bench` opens, outlined and without prompts."""
    task = load_task(config.task)
    check_meeting(config.target, *(draft.path for draft in config.drafts))
    outlined = functools.partial(
        outline, task=task, compute_dtype=config.compute_dtype, is_frozen=True
    )
    drafts = [Draft(draft, outlined(draft.path)) for draft in config.drafts]
    nothing = Prompts(np.empty((0, task.input_length), np.int32), np.empty(0, np.int32), [])
    return Bench(config, task, outlined(config.target), drafts, nothing, None)


def _of_each_shape(drafts: Sequence[Draft]) -> list[Draft]:
    """The first draft of each shape: the others need what it needs."""
    first: dict[ModelConfig, Draft] = {}
    for draft in drafts:
        first.setdefault(draft.shape, draft)
    return list(first.values())


def _say(needs: Sequence[Need], seconds: float) -> None:
    print(f"weights of all models: {needs[0].weights / GIB:.3f} GiB")
    print(f"beside them, one at a time (compiled in {seconds:.0f} s):")
    for need in needs:
        program = need.program
        parts = {"caches": program.caches, "draft in training": program.trained}
        of_them = ", ".join(f"{size / GIB:.3f} {name}" for name, size in parts.items() if size)
        beside = need.total - need.weights
        about = f" (of them {of_them})" * bool(of_them)
        print(f"  {beside / GIB:.3f} GiB{about}: {program.name}, {program.call}")
