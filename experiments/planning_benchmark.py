"""What --plan says of `benchmark`: the models and programs of its parts, in turns on one device.

The memory of peers is not ours to plan: it is the host's, and comes on top.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.models.presets import preset
from experiments import distill, planning
from experiments.benchmarks import (
    decode,
    decode_plain,
    decode_products,
    distill_steps,
    distill_teacher,
    loop,
)
from experiments.benchmarks import distill as distilling
from experiments.models import Loaded, outline
from experiments.planning import bytes_of, make_virtual_devices, shape_of_key
from experiments.planning_decoding import (
    ONE_DEVICE,
    Call,
    Outline,
    Program,
    alone,
    drafted,
    tell,
)

if TYPE_CHECKING:
    from experiments.benchmark import BenchmarkConfig

MEGABYTE = 2**20


def plan(config: BenchmarkConfig, memory_gib: float | None) -> int | None:
    """Says it of every part that is to be measured; TOO_LARGE if one of them does not fit."""
    if config.benchmark == "scaling":
        print("plan of benchmark scaling: it compiles for virtual devices and allocates nothing")
        return None
    if config.benchmark == "loop":
        run = loop.run_config(config.loop, config.seed)
        return planning.planner(distill.prepare, planning.trial)(run, memory_gib)
    make_virtual_devices(ONE_DEVICE)
    outlines = (
        of_decode(config.decode) if config.benchmark == "decode" else of_distill(config.distill)
    )
    codes = [tell(found, memory_gib) for found in outlines]
    return planning.TOO_LARGE if any(codes) else None


def of_decode(config: decode.Config) -> Iterator[Outline]:
    """The parts of the decoding benchmark; of the shapes one is on the device at a time."""
    for part in config.parts:
        if part == "drafted":
            yield _of_trained_pair(config)
        else:
            yield from map(
                functools.partial(_of_shape if part == "plain" else _of_products, config),
                config.shapes,
            )


def _of_shape(config: decode.Config, shape: str) -> Outline:
    """A fresh model, its draft, and the memory that is read."""
    options = (
        *("config.decode.batch_sizes", "config.decode.new_tokens"),
        *("config.decode.input_length", "config.decode.read_megabytes"),
    )
    rows, limit = max(config.batch_sizes), max(config.new_tokens)
    call = Call(rows, config.input_length, limit, options)
    models = {"model": _fresh(shape, config.dtype)}
    programs = [alone(models["model"], call, decode_plain.GREEDY)]
    for name in config.fresh_drafts:
        models["draft"] = _fresh(name, config.dtype)
        speculation = Speculation(
            target=models["model"].model,
            draft=models["draft"].model,
            gamma=config.fresh_gamma,
            max_new_tokens=limit,
            sampling=decode_plain.GREEDY,
        )
        programs.append(drafted(speculation, models["model"], models["draft"], call))
    memory = 2 * config.read_megabytes * MEGABYTE  # a device copies it
    return Outline(f"benchmark decode, {shape}", models, programs, copies=memory)


def _fresh(shape: str, dtype: str) -> Loaded:
    model = decode_plain.endless(shape, dtype)
    return Loaded(shape, model, jax.eval_shape(functools.partial(decode_plain.fresh, model), 0))


def _of_trained_pair(config: decode.Config) -> Outline:
    """The target and its draft, on all prompts of a split at once."""
    task = load_task(TaskConfig())
    target, draft = outline(config.target, task), outline(config.draft, task)
    options = (
        *("config.decode.tuning_prompts", "config.decode.prompts"),
        "config.decode.max_new_tokens",
    )
    rows = max(config.tuning_prompts, config.prompts)
    call = Call(rows, task.input_length, config.max_new_tokens, options)
    speculation = Speculation(
        target=target.model,
        draft=draft.model,
        gamma=max(config.gammas),
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(temperature=1.0),
    )
    programs = [drafted(speculation, target, draft, call)]
    return Outline("benchmark decode, drafted", {"target": target, "draft": draft}, programs)


def _of_products(config: decode.Config, shape: str) -> Outline:
    """The weights of a decoder's products, without the model around them."""
    draw = functools.partial(decode_products.weights_of, preset(shape))
    weights, rows = jax.eval_shape(draw, shape_of_key()), max(config.product_rows)
    x = jax.ShapeDtypeStruct((rows, max(each.shape[0] for each in weights)), jnp.float32)
    lowered = decode_products.one_after_another(jnp.matmul).lower(x, weights)
    call = Call(rows, 0, 1, ("config.decode.product_rows", "config.decode.shapes"))
    programs = [Program("products", lowered, call)]
    name = f"benchmark decode, products of {shape}"
    return Outline(name, {}, programs, copies=bytes_of(weights))


def of_distill(config: distilling.Config) -> Iterator[Outline]:
    """The parts of the distillation benchmark."""
    for part in config.parts:
        yield _of_teacher(config) if part == "teacher" else _of_pair(config, part)


def _of_pair(config: distilling.Config, part: str) -> Outline:
    """Every way of a part has a state and a target of its own, and all are held at once."""
    key, pair = f"config.distill.{part}", getattr(config, part)
    options = f"{key}.batch_size", f"{key}.input_length", f"{key}.target_length"
    call = Call(pair.batch_size, pair.input_length, pair.target_length, options)
    steps = distill_steps.steps_of(config, part, 0, abstract=True)
    one = next(iter(steps.values()))
    models = {
        "target": Loaded(pair.target, one.target, one.target_params),
        "draft": Loaded(pair.draft, one.draft, one.state.params),
    }
    held = bytes_of([(each.state, each.target_params) for each in steps.values()])
    copies = held - bytes_of([loaded.params for loaded in models.values()])
    programs = [Program(name, each.lower(name), call) for name, each in steps.items()]
    return Outline(f"benchmark distill, {part}", models, programs, copies=copies)


def _of_teacher(config: distilling.Config) -> Outline:
    """Rollouts and steps by a trained target, by itself and with its draft's help."""
    task = load_task(TaskConfig())
    target, draft = outline(config.teacher, task), outline(config.teacher_draft, task)
    rows = max(config.teacher_batch_sizes)
    options = "config.distill.teacher_batch_sizes", "config.distill.teacher_length"
    call = Call(rows, task.input_length, config.teacher_length, options)
    models = target.model, target.params, draft.model, draft.params
    calls: dict[str, Any] = distill_teacher.taught(config, *models, _batch(rows, task), 0)
    programs = [Program(name, each.func.lower(*each.args), call) for name, each in calls.items()]
    state, *_ = calls["plain_step"].args
    held = {"target": target, "draft": draft}
    return Outline("benchmark distill, teacher", held, programs, copies=bytes_of(state))


def _batch(rows: int, task: Task) -> Batch:
    """Shapes of a training batch."""
    return Batch(
        inputs=jax.ShapeDtypeStruct((rows, task.input_length), jnp.int32),
        targets=jax.ShapeDtypeStruct((rows, task.target_length), jnp.int32),
        example_ids=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
