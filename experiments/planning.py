"""What --plan says: bytes a device would hold, tokens a step, and whether that fits.

Nothing is allocated: parameters are shapes with shardings, the step and what is done between steps
are compiled for a mesh of virtual CPU devices, and the compiler says what they need. It is the
CPU's compiler: an accelerator fuses more and holds bfloat16 as it is, where a CPU makes
float32 copies, so its temporaries are as a rule smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task, load_task
from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculate
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.distill.data_sources import source_probabilities
from distillspec_jax.models import transformer
from distillspec_jax.models.layers import ROW_AXES
from distillspec_jax.sharding.layout import Layout, check_row_parts, device_bytes, placed
from distillspec_jax.sharding.mesh import AXES, MeshConfig, axis_sizes
from distillspec_jax.sharding.rules import batch_sharding
from distillspec_jax.training.validation import sums as likelihood_sums
from experiments import parts
from experiments.models import Loaded, outline

if TYPE_CHECKING:
    from distillspec_jax.distill.recipes import Recipe
    from experiments.distill import DistillConfig
    from experiments.finetune import FinetuneConfig
    from experiments.watching import DecoderConfig

TOO_LARGE = 1  # exit code of a plan that does not fit
GIB = 2**30

speculating = jax.jit(speculate, static_argnums=0)
generating = jax.jit(generate, static_argnums=0, static_argnames=("sampling", "max_new_tokens"))

# Only time is saved by these: neither changes what is allocated.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Pause:
    """What is done between steps; `words` say when, `option` is the config's that makes it less."""

    words: str
    lowered: jax.stages.Lowered
    option: str


Pauses = Callable[[parts.Prepared, Any, Task, Layout], list[Pause]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device.

    `temporary` is what the compiler adds while the step runs: activations, gradients, gathered
    weights and caches; `caches` is their part in it by shape, and 0 where nothing is sampled.
    `pausing` is what the compiler adds between steps, in the `pause` that needs most.
    """

    parameters: int
    optimizer: int
    frozen: int
    batch: int
    caches: int
    temporary: int
    output: int  # what the step returns in buffers of its own
    pausing: int
    pause: Pause

    @property
    def running(self) -> int:
        """What is added while the step runs."""
        return self.temporary + self.output

    @property
    def total(self) -> int:
        held = self.parameters + self.optimizer + self.frozen + self.batch
        return held + max(self.running, self.pausing)


def planner(
    prepare: Callable[..., parts.Prepared], pauses: Pauses
) -> Callable[[Any, float | None], int | None]:
    """The --plan of an entrypoint: `(config, GiB of a device or None) -> exit code`."""

    def plan(config: parts.TrainingConfig, memory_gib: float | None) -> int | None:
        check_mesh(config)
        make_virtual_devices(config.mesh)
        layout = parts.open_layout(config)
        task = load_task(config.task)
        with jax.set_mesh(layout.mesh):
            prepared = prepare(config, task, layout, outline)
            _introduce(prepared, config, task, layout)
            start = time.perf_counter()
            compiled = compile_step(prepared, config, task, layout)
            found = make_plan(
                prepared, config, task, layout, compiled, pauses(prepared, config, task, layout)
            )
        _say(found, time.perf_counter() - start)
        return judge(found.total, memory_gib, lambda: advice(found, config))

    return plan


def check_mesh(config: parts.TrainingConfig) -> None:
    """Refuses a mesh before its devices are made: thousands of them take seconds and gigabytes."""
    sizes = dict(zip(AXES, axis_sizes(config.mesh, 1), strict=True))
    if -1 not in dataclasses.astuple(config.mesh):  # else no devices are made for it
        row_parts = math.prod(sizes[axis] for axis in ROW_AXES)
        check_row_parts(row_parts, config.batch_size, config.micro_batches)


def make_virtual_devices(mesh: MeshConfig) -> None:
    """Gives this process as many CPU devices as a mesh without -1 has, if it has none yet.

    An accelerator is left alone, whatever the mesh.
    """
    jax.config.update("jax_platforms", "cpu")
    count = math.prod(dataclasses.astuple(mesh))
    if count < 1:
        return
    with contextlib.suppress(RuntimeError):  # the devices are there already
        jax.config.update("jax_num_cpu_devices", count)


def compile_step(
    prepared: parts.Prepared, config: parts.TrainingConfig, task: Task, layout: Layout
) -> jax.stages.Compiled:
    """The training step for the longest batch of the task."""
    batch = _longest_batch(config.batch_size, task, layout)
    arguments = prepared.arguments(prepared.state, batch)
    return compile_quickly(prepared.step.lower(*arguments))


def trial(
    prepared: parts.Prepared, config: DistillConfig, task: Task, layout: Layout
) -> list[Pause]:
    """The pauses of distillation."""
    lowered = lower_trial(prepared, config.decoder, task, layout)
    return [Pause("while the draft is tried out", lowered, "config.decoder.batch_size")]


def validation(
    prepared: parts.Prepared, config: FinetuneConfig, task: Task, layout: Layout
) -> list[Pause]:
    """The pauses of fine-tuning: likelihood of references, and answers where they are asked for."""
    batch = _longest_batch(layout.round_up(config.batch_size), task, layout)
    model, params = prepared.models["model"].model, prepared.state.averaged_params
    chunk = config.loss_chunk or None
    lowered = likelihood_sums.lower(model, params, batch.inputs, batch.targets, chunk)
    found = [Pause("while it is validated", lowered, "config.batch_size")]
    if config.decode_prompts:
        lowered = generating.lower(
            model,
            params,
            batch.inputs,
            _placed_key(layout),
            sampling=Sampling(temperature=0.0),
            max_new_tokens=task.target_length,
            row_ids=batch.example_ids,
        )
        found.append(Pause("while it answers", lowered, "config.batch_size"))
    return found


def lower_trial(
    prepared: parts.Prepared, decoder: DecoderConfig, task: Task, layout: Layout
) -> jax.stages.Lowered:
    """The real decoder with the longest batch of held-out prompts."""
    prompts = _longest_batch(layout.round_up(decoder.batch_size), task, layout)
    target, draft = prepared.models["target"], prepared.models["draft"]
    params = target.params, prepared.state.averaged_params
    speculation = trial_speculation(decoder, target, draft, task)
    key = _placed_key(layout)
    return speculating.lower(speculation, *params, prompts.inputs, key, prompts.example_ids)


def _placed_key(layout: Layout) -> Any:
    return placed(shape_of_key(), NamedSharding(layout.mesh, PartitionSpec()))


def _longest_batch(rows: int, task: Task, layout: Layout) -> Batch:
    input_length, target_length = _lengths(task)
    shapes = Batch(
        inputs=jax.ShapeDtypeStruct((rows, input_length), jnp.int32),
        targets=jax.ShapeDtypeStruct((rows, target_length), jnp.int32),
        example_ids=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    return placed(shapes, jax.tree.map(lambda _: batch_sharding(layout.mesh), shapes))


def trial_speculation(
    decoder: DecoderConfig, target: Loaded, draft: Loaded, task: Task
) -> Speculation:
    """How `watching.make_counts` tries a draft out, at the temperature that needs most."""
    return Speculation(
        target=target.model,
        draft=draft.model,
        gamma=decoder.gamma,
        max_new_tokens=task.target_length,
        sampling=Sampling(temperature=max(decoder.temperatures)),
    )


def shape_of_key() -> Any:
    """A key of randomness without numbers."""
    return jax.eval_shape(lambda: jax.random.key(0))


def compile_quickly(lowered: Any) -> jax.stages.Compiled:
    """What is to be looked at, not to be run."""
    return lowered.compile(compiler_options=_QUICK)


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes added while a compiled function runs, and of results in buffers of their own."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes


def bytes_of(shapes: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def cache_bytes(loaded: Loaded, rows: int, input_length: int, limit: int) -> int:
    """Bytes of the keys and values of a model that writes up to `limit` tokens in every row."""
    inputs = jax.ShapeDtypeStruct((rows, input_length), jnp.int32)
    start = functools.partial(transformer.start, loaded.model, limit=limit)
    return bytes_of(jax.eval_shape(start, loaded.params, inputs)[0])


def rollout_caches(
    recipe: Recipe,
    models: Mapping[str, Loaded],
    length: int,
    held: Callable[[Loaded, int], int],
) -> int:
    """Bytes of the caches of the source that holds most: of the model that writes, and its help.

    `held` says what a model holds that writes up to so many tokens in every row.
    """
    probabilities, gamma = source_probabilities(recipe), recipe.teacher_gamma
    roles = {
        "draft": ("draft", "target") if recipe.interleave_top_k else ("draft",),
        "teacher": ("target", "draft") if gamma else ("target",),
    }
    limits = {"draft": length, "teacher": length + gamma}
    sizes = (
        sum(held(models[role], limits[source]) for role in roles[source])
        for source in roles
        if probabilities[source] > 0
    )
    return max(sizes, default=0)


def make_plan(
    prepared: parts.Prepared,
    config: parts.TrainingConfig,
    task: Task,
    layout: Layout,
    compiled: jax.stages.Compiled,
    pauses: Sequence[Pause],
) -> Plan:
    """The bytes of a compiled step, and of the pause that needs most."""
    temporary, output = memory_of(compiled)
    pausing = [sum(memory_of(compile_quickly(pause.lowered))) for pause in pauses]
    state = prepared.state
    parameters = device_bytes(state.params)
    rows = sum(_lengths(task)) + 1
    return Plan(
        parameters=parameters,
        optimizer=device_bytes(state) - parameters,
        frozen=device_bytes(prepared.frozen),
        batch=config.batch_size * rows * 4 // layout.row_parts,
        caches=_caches(prepared, config, task, layout),
        temporary=temporary,
        output=output,
        pausing=max(pausing),
        pause=pauses[pausing.index(max(pausing))],
    )


def _lengths(task: Task) -> tuple[int, int]:
    return task.input_length, task.target_length


def _caches(
    prepared: parts.Prepared, config: parts.TrainingConfig, task: Task, layout: Layout
) -> int:
    """Bytes of the keys and values that one device may hold in a rollout."""
    recipe = getattr(config, "recipe", None)
    if recipe is None:
        return 0
    length = getattr(config, "rollout_length", 0) or task.target_length
    rows = config.batch_size // layout.row_parts

    def held(loaded: Loaded, limit: int) -> int:
        whole = cache_bytes(loaded, rows, task.input_length, limit)
        return whole // _head_parts(loaded, layout.mesh.shape)

    return rollout_caches(recipe.resolve(), prepared.models, length, held)


def _head_parts(loaded: Loaded, sizes: Mapping[str, int]) -> int:
    """Over how many devices the heads of a model are split."""
    kernel = loaded.params["decoder"]["layers_0"]["self_attention"]["qkv"]
    return sizes["tensor"] if "tensor" in kernel.sharding.spec else 1


def _introduce(
    prepared: parts.Prepared, config: parts.TrainingConfig, task: Task, layout: Layout
) -> None:
    introduce(prepared.name, prepared.models)
    axes = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    print(f"  mesh: {layout.mesh.size} devices, {axes}")
    for axis, size in dataclasses.asdict(config.mesh).items():
        if size == -1:
            print(f"  mesh.{axis} is -1: planned for {layout.mesh.size} devices; give a number")
    inputs, targets = _lengths(task)
    print(
        f"  a step: {config.batch_size} rows of up to {inputs} + {targets} tokens, "
        f"{config.batch_size * (inputs + targets):,} in all, in {config.micro_batches} parts",
        flush=True,
    )


def introduce(name: str, models: Mapping[str, Loaded]) -> None:
    """Says what is planned, and how large its models are."""
    print(f"plan of {name}, nothing is allocated")
    for role, loaded in models.items():
        print(f"  {role}: {loaded}, computes in {loaded.model.config.dtype}")
    if "bfloat16" in {loaded.model.config.dtype for loaded in models.values()}:
        print(
            "  the CPU's compiler copies bfloat16 to float32: an accelerator holds less than this"
        )


def _say(plan: Plan, seconds: float) -> None:
    lines = {
        "parameters": plan.parameters,
        "optimiser and average": plan.optimizer,
        "frozen models": plan.frozen,
        "batch": plan.batch,
        "while the step runs": plan.running,
        plan.pause.words: plan.pausing,
        "all at once, at most": plan.total,
    }
    print(f"a device holds (compiled in {seconds:.0f} s):")
    for name, size in lines.items():
        print(f"  {name:<28}{size / GIB:10.3f} GiB")
    if plan.caches:
        print(f"  in the step: caches of a rollout {plan.caches / GIB:.3f} GiB")


def judge(total: int, memory_gib: float | None, advice: Callable[[], str]) -> int | None:
    """Says whether `total` bytes fit, and what would help if not; the exit code."""
    if memory_gib is None:
        return None
    if total <= memory_gib * GIB:
        print(f"fits: {total / GIB:.2f} of {memory_gib:g} GiB")
        return None
    print(f"does not fit: {total / GIB:.2f} of {memory_gib:g} GiB; {advice()}")
    return TOO_LARGE


def advice(plan: Plan, config: parts.TrainingConfig) -> str:
    """Which option shrinks the largest item of a plan."""
    largest = max(plan.optimizer, plan.parameters, plan.frozen, plan.running, plan.pausing)
    tensor, dtype = "a larger config.mesh.tensor", narrower(config.compute_dtype)
    if largest == plan.running:
        if getattr(config, "loss_chunk", 1) == 0:
            options = "config.loss_chunk (logits are large), config.micro_batches"
            return f"set {options} or {tensor}{dtype}"
        more = f"{tensor} or more devices of config.mesh.data"
        return f"raise config.micro_batches, or take {more}{dtype}"
    if largest == plan.pausing:
        return f"lower {plan.pause.option}, or take {tensor}{dtype}"
    if largest == plan.frozen:
        if getattr(config, "target_layout", "") == "replicated":
            return "set config.target_layout to 'sharded'"
        return "split the target over more devices: a larger config.mesh.fsdp or config.mesh.tensor"
    layout = "draft_layout" if hasattr(config, "draft_layout") else "model_layout"
    if getattr(config, layout) == "replicated":
        return f"set config.{layout} to 'sharded'"
    if largest == plan.optimizer and config.optimizer.name != "adafactor":
        return "take config.optimizer.name 'adafactor', or a larger config.mesh.fsdp"
    return "take a larger config.mesh.fsdp"


def narrower(dtype: str) -> str:
    """The end of an advice about what is computed, unless it is in the narrow dtype already."""
    if dtype == "bfloat16":
        return ""
    return "; config.compute_dtype 'bfloat16' makes it smaller on an accelerator"
