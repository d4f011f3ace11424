"""Distillation beside TRL and torch: seconds a step, by phase, and memory.

Everything of one comparison is timed side by side on the same shapes and batches, with models of
fresh weights that never write an end of sequence, so that every sample has the full length; a
teacher and its draft are trained ones, which end their texts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax import zoo
from distillspec_jax.data.batch import Batch
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_distill_step, make_rollout, make_update
from distillspec_jax.errors import unknown_name
from distillspec_jax.evaluation.latency import Clock, Timing, race, side_by_side
from distillspec_jax.models.config import ModelConfig, check_dtype
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.benchmarks.decode_plain import ratio
from experiments.checks import check_least

PEERS = ("torch", "transformers", "trl")
PARTS = ("trl", "trl_small", "torch", "chunked", "teacher", "utilisation")
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.01)  # AdamW, clipped at norm 1
Row = dict[str, Any]
Found = tuple[Row, list[Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Names of two presets, and the shape of a batch."""

    target: str
    draft: str
    batch_size: int = 8
    input_length: int = 32
    target_length: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured; `parts` names the comparisons."""

    parts: tuple[str, ...] = PARTS
    rounds: int = 7  # timed runs of everything, after the warm-up
    trl: Pair = Pair(target="lm1b_234m", draft="lm1b_33m")
    trl_small: Pair = Pair(target="cpu_target", draft="cpu_draft")
    torch: Pair = Pair(target="t5_base", draft="t5_small", input_length=64)
    chunked: Pair = Pair(target="t5_base", draft="t5_small", batch_size=16, input_length=64)
    chunk: int = 8  # positions that have logits at a time
    micro_batches: int = 2  # that the batch is taken in where the vocabulary is in chunks
    vocabularies: tuple[int, ...] = (8_032, 32_128, 128_512)  # of the loss alone, in rows
    teacher: str = "stories-target"  # whose samples a draft helps to write
    teacher_draft: str = "stories-draft"  # best a distilled one, runs/quickstart/distilled
    teacher_gamma: int = 3
    teacher_batch_sizes: tuple[int, ...] = (4, 16)  # the first gives the headline
    teacher_length: int = 56
    teacher_batches: int = 32  # each timed `rounds` times, with and without the draft
    utilisation: Pair = Pair(target="t5_base", draft="t5_small", input_length=64)
    compute_dtype: str = "float32"  # or bfloat16, of that part; weights and loss stay in float32
    peak_teraflops: float = 0.0  # of the device; 0: what a product of large matrices reaches
    product_size: int = 2048  # rows of those square matrices; an accelerator takes larger ones

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part", part, PARTS, "config.distill.parts")
        counts = ("rounds", "chunk", "micro_batches", "product_size")
        taught = ("teacher_batch_sizes", "teacher_batches")
        check_least(self, 1, *counts, *taught, where="config.distill")
        check_least(self, 0, "peak_teraflops", where="config.distill")
        check_dtype(self.compute_dtype, "config.distill.compute_dtype")


def measure(config: Config, seed: int) -> Found:
    """Times everything; (figures of the summary, one record per program)."""
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    summary: Row = {}
    records: list[Row] = []
    for part in config.parts:
        needed = {"trl": absent, "trl_small": absent, "torch": set(absent) - {"trl"}}.get(part)
        if needed:
            print(f"{part}: left out, {', '.join(sorted(needed))} not installed")
            continue
        print(f"{part}: compiling, then {config.rounds} rounds", flush=True)
        figures, rows = _MEASURES[part](config, seed)
        print(
            "".join(
                f"  {row['name']}: {row['seconds']:.4g} s\n" for row in rows if "seconds" in row
            )
        )
        summary |= figures
        records += [{"kind": "timing", "part": part, **row} for row in rows]
    return summary, records


def _beside_trl(config: Config, seed: int, *, part: str, key: str) -> Found:
    """On-policy JSD steps of decoder-only models, rollouts included."""
    from experiments.benchmarks import torch_distill

    pair: Pair = getattr(config, part)
    ours = steps_of(config, part, seed)["step"]
    theirs = torch_distill.trl_calls(
        ours.draft.config, ours.target.config, np.asarray(ours.batch.inputs), pair.target_length
    )
    calls = {**ours.calls(), **theirs}
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    figures = ratio(key, timings["trl_step"].seconds, timings["step"].seconds)
    tokens = pair.batch_size * pair.target_length
    return figures, [*_rows(timings, pair, tokens, calls), ours.memory()]


def _beside_torch(config: Config, seed: int) -> Found:
    """Score and update of encoder-decoders by forward KL, on given texts."""
    from experiments.benchmarks import torch_distill

    pair, ours = config.torch, steps_of(config, "torch", seed)["update"]
    texts = np.asarray(ours.batch.inputs), np.asarray(ours.batch.targets)
    update = torch_distill.t5_update(ours.draft.config, ours.target.config, *texts)
    calls = {"update": ours.calls()["update"], "torch_update": update}
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    figures = ratio("score_update_over_torch", seconds["torch_update"], seconds["update"])
    tokens = pair.batch_size * pair.target_length
    return figures, [*_rows(timings, pair, tokens, calls), ours.memory()]


def _chunked(config: Config, seed: int) -> Found:
    """The vocabulary in chunks against all logits at once: time, and the compiler's memory.

    Two ways: the chunks alone, and the batch in parts as well, which is what saves memory where it
    is short; the keys without more are of the latter.
    """
    pair, runs = config.chunked, steps_of(config, "chunked", seed)
    calls = {name: run.calls()["update"] for name, run in runs.items()}
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    memory = {name: run.memory()["temporary_bytes"] for name, run in runs.items()}
    figures: Row = {}
    for name in ("chunked", "chunks_alone"):
        figures |= ratio(f"{name}_time_over_plain", timings[name].seconds, timings["plain"].seconds)
        figures |= ratio(f"{name}_peak_memory_over_plain", memory[name], memory["plain"])
    rows = _rows(timings, pair, pair.batch_size * pair.target_length)
    rows = [{**row, "temporary_bytes": memory[row["name"]]} for row in rows]
    return figures, rows + _by_vocabulary(config, seed)


def _by_vocabulary(config: Config, seed: int) -> list[Row]:
    """Temporary memory of the step in chunks for vocabularies of growing size."""
    pair, rows = config.chunked, []
    for size in config.vocabularies:
        for chunk in (None, config.chunk):
            recipe = recipes.named("supkd")
            run = Ours(pair, recipe, seed=seed, chunk=chunk, vocabulary=size, abstract=True)
            rows.append({**run.memory(), "chunk": chunk or 0, "vocabulary": size})
    return rows


def _teacher(config: Config, seed: int) -> Found:
    """Texts of a trained target and whole steps on them, by itself and with a draft's help.

    Both end their texts where they like, and each way draws its own: so rates in tokens are
    compared, over many batches, with intervals over these.
    """
    models = *zoo.load(config.teacher), *zoo.load(config.teacher_draft)
    figures: Row = {}
    rows: list[Row] = []
    for batch_size in config.teacher_batch_sizes:
        batches = _stories(batch_size, config.teacher_batches, seed)
        calls = taught(config, *models, batches[0], seed)
        clock = race(
            {name: _on_batches(call) for name, call in calls.items()},
            batches,
            batch_size=batch_size,
            repeats=config.rounds,
        )
        place = f"_batch{batch_size}" if figures else ""
        for key, name, base in (
            ("teacher_rollout_speedup", "with_draft", "plain"),
            ("teacher_step_speedup", "step_with_draft", "plain_step"),
        ):
            figures |= clock.speedup([name], [base]).keys(key + place)
        shapes = {"batch_size": batch_size, "gamma": config.teacher_gamma}
        rows += [{**_rates(name, clock), **shapes} for name in calls]
    return figures, rows


def _on_batches(call: functools.partial[Any]) -> Callable[[Batch], tuple[Any, Any]]:
    """batch -> what `call`, bound to another batch, makes of it, and the tokens written."""
    state, target_params, _ = call.args
    return lambda batch: call.func(state, target_params, batch)


def _rates(name: str, clock: Clock) -> Row:
    seconds = clock.seconds[name]
    return {
        "name": name,
        "seconds": float(np.median(seconds)),
        "seconds_spread": [float(seconds.min()), float(seconds.max())],
        "tokens": int(clock.tokens[name].sum()),
        **clock.tokens_per_second([name]).keys("tokens_per_second"),
        "first_call_seconds": clock.compile_seconds[name] + float(seconds[0]),
    }


def taught(
    config: Config,
    target: Transformer,
    target_params: Any,
    draft: Transformer,
    draft_params: Any,
    batch: Batch,
    seed: int,
) -> dict[str, Any]:
    """Rollouts and steps from one state, which every call finds as it was.

    Each is a compiled function bound to its arguments, which gives what it made and the tokens it
    wrote; parameters and batch may be shapes.
    """
    rule = make_optimizer(OPTIMIZER, 1_000)
    create = functools.partial(TrainState.create, optimizer=rule, seed=seed)
    is_shape = isinstance(batch.inputs, jax.ShapeDtypeStruct)
    state = jax.eval_shape(create, draft_params) if is_shape else create(draft_params)

    def counted(batch: Batch) -> jax.Array:
        return jnp.sum(batch.targets != draft.config.pad_id)

    def writer(gamma: int) -> functools.partial[Any]:
        recipe = recipes.named("seqkd", teacher_gamma=gamma)  # its loss asks the target nothing
        rollout = make_rollout(draft, target, recipe, rollout_length=config.teacher_length)

        def write(state: TrainState, target_params: Any, batch: Batch) -> Any:
            written = rollout(state, target_params, batch)
            return written, counted(written[0])

        return functools.partial(jax.jit(write), state, target_params, batch)

    def stepper(gamma: int) -> functools.partial[Any]:
        recipe = recipes.named("gkd", lambda2=0.0, teacher_gamma=gamma)
        write = make_rollout(draft, target, recipe, rollout_length=config.teacher_length)
        update = make_update(draft, target, recipe, rule)

        def step(state: TrainState, target_params: Any, batch: Batch) -> Any:
            written, _ = write(state, target_params, batch)
            return update(state, target_params, written), counted(written)

        return functools.partial(jax.jit(step), state, target_params, batch)

    gamma = config.teacher_gamma
    return {
        "plain": writer(0),
        "with_draft": writer(gamma),
        "plain_step": stepper(0),
        "step_with_draft": stepper(gamma),
    }


def _stories(batch_size: int, count: int, seed: int) -> list[Batch]:
    from distillspec_jax.data.tasks import TaskConfig, load_task

    batches = load_task(TaskConfig()).batches("train", batch_size=batch_size, seed=seed)
    return [jax.tree.map(jnp.asarray, batch) for batch in itertools.islice(batches, count)]


def _utilisation(config: Config, seed: int) -> Found:
    """Operations that score and update do in a second, and their share of the device's peak."""
    pair, size = config.utilisation, config.product_size
    ours = steps_of(config, "utilisation", seed)["update"]
    matrix = jnp.ones((size, size), config.compute_dtype)
    calls: dict[str, Callable[[], Any]] = {
        "update": ours.calls()["update"],
        "product": functools.partial(jax.jit(jnp.matmul), matrix, matrix),
    }
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    rate, product = ours.flops() / timings["update"].seconds, timings["product"]
    peak = 1e12 * config.peak_teraflops or 2 * size**3 / product.seconds
    figures = {
        **ratio("score_update_flops_per_second", rate, 1),
        **ratio("score_update_utilisation", rate, peak),
    }
    update = _rows({"update": timings["update"]}, pair, pair.batch_size * pair.target_length)
    return figures, [*update, {**_times("product", product), "product_size": size}]


_MEASURES: Mapping[str, Callable[[Config, int], Found]] = {
    "trl": functools.partial(_beside_trl, part="trl", key="step_over_trl"),
    "trl_small": functools.partial(_beside_trl, part="trl_small", key="step_over_trl_small"),
    "torch": _beside_torch,
    "chunked": _chunked,
    "teacher": _teacher,
    "utilisation": _utilisation,
}


def steps_of(config: Config, part: str, seed: int, *, abstract: bool = False) -> dict[str, Ours]:
    """Our steps of a part, by name; without arrays if `abstract`."""
    make = functools.partial(Ours, getattr(config, part), seed=seed, abstract=abstract)
    if part in ("trl", "trl_small"):
        return {"step": make(recipes.named("distillspec"), decoder_only=True)}
    make = functools.partial(make, recipes.named("supkd"))
    if part != "chunked":
        dtype = config.compute_dtype if part == "utilisation" else "float32"
        return {"update": make(dtype=dtype)}
    chunk, parts = config.chunk, config.micro_batches
    return {
        "plain": make(),
        "chunks_alone": make(chunk=chunk),
        "chunked": make(chunk=chunk, micro_batches=parts),
    }


class Ours:
    """A compiled step and its halves, on random texts of full length."""

    def __init__(
        self,
        pair: Pair,
        recipe: recipes.Recipe,
        *,
        seed: int,
        chunk: int | None = None,
        micro_batches: int = 1,
        decoder_only: bool = False,
        vocabulary: int = 0,
        abstract: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.pair = pair
        self.target, self.draft = (
            Transformer(_endless(preset(name), decoder_only, vocabulary, dtype))
            for name in (pair.target, pair.draft)
        )
        rule = make_optimizer(OPTIMIZER, 1_000)
        arguments = self.draft, self.target, recipe
        rollout = make_rollout(*arguments, rollout_length=pair.target_length)
        self._rollout = jax.jit(rollout)
        parts: Any = {"chunk": chunk, "micro_batches": micro_batches}
        self._lazy_update = jax.jit(make_update(*arguments, rule, **parts), donate_argnums=0)
        self._step = make_distill_step(*arguments, rule, rollout_length=pair.target_length, **parts)
        rng = np.random.default_rng(seed)

        def ids(length: int) -> np.ndarray:
            shape = (pair.batch_size, length)
            return rng.integers(3, self.draft.config.num_pieces, shape).astype(np.int32)

        rows = np.arange(pair.batch_size, dtype=np.int32)
        self.batch = Batch(ids(pair.input_length), ids(pair.target_length), rows)

        def fresh() -> tuple[TrainState, Any]:
            keys = jax.random.split(jax.random.key(seed), 2)
            state = TrainState.create(init_params(self.draft, keys[0]), rule, seed=seed)
            return state, init_params(self.target, keys[1])

        self.state, self.target_params = jax.eval_shape(fresh) if abstract else jax.jit(fresh)()

    def lower(self, name: str) -> jax.stages.Lowered:
        """The whole step, or else score and update."""
        program: Any = self._step if name == "step" else self._lazy_update
        return program.lower(self.state, self.target_params, self.batch)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The whole step and its halves; each call goes on from the state of the one before."""

        def train(step: Callable[..., Any]) -> jax.Array:
            self.state, metrics = step(self.state, self.target_params, self.batch)
            return metrics["loss"][0]

        return {
            "step": lambda: train(self._step),
            "rollout": lambda: self._rollout(self.state, self.target_params, self.batch),
            "update": lambda: train(self._update),
        }

    @functools.cached_property
    def _update(self) -> Any:
        """Score and update, compiled."""
        return self.lower("update").compile()

    def flops(self) -> float:
        """Operations of score and update by the compiler's count; loop bodies count once.

        Of the program for an accelerator: no compiler counts those of the CPU's own kernel.
        """
        traced = self._lazy_update.trace(self.state, self.target_params, self.batch)
        return traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]

    def memory(self) -> Row:
        """The compiler's own account of score and update, in bytes."""
        analysis = self._update.memory_analysis()
        return {
            "name": "memory of score and update",
            "target": self.target.config.name,
            "draft": self.draft.config.name,
            "temporary_bytes": analysis.temp_size_in_bytes,
            "argument_bytes": analysis.argument_size_in_bytes,
        }


def _endless(config: ModelConfig, decoder_only: bool, vocabulary: int, dtype: str) -> ModelConfig:
    """A shape without dropout whose model never ends a text: its end is one of the padding rows."""
    rows = vocabulary or config.vocab_size
    return dataclasses.replace(
        config,
        vocab_size=rows,
        num_pieces=rows - 1,
        eos_id=rows - 1,
        dropout_rate=0.0,
        dtype=dtype,
        num_encoder_layers=0 if decoder_only else config.num_encoder_layers,
    )


def _rows(
    timings: Mapping[str, Timing],
    pair: Pair,
    tokens: int,
    calls: Mapping[str, Callable[[], Any]] | None = None,
) -> list[Row]:
    """Times of each, and of `calls` the memory, taken in one more round."""
    rows = []
    for name, timing in timings.items():
        row = {**_times(name, timing), "tokens_per_second": tokens / timing.median}
        if calls is not None:
            row["added_bytes"] = added_bytes(calls[name])
        rows.append(row | dataclasses.asdict(pair))
    return rows


def added_bytes(call: Callable[[], Any]) -> int | None:
    """Most bytes of memory that this process holds while `call` runs, beyond those before.

    Whoever allocates them. None where the system does not tell (Linux does).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _resident_bytes("VmRSS")
    jax.block_until_ready(call())
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _times(name: str, timing: Timing) -> Row:
    return {
        "name": name,
        "seconds": timing.median,
        "seconds_spread": [float(timing.seconds.min()), float(timing.seconds.max())],
        "first_call_seconds": timing.first_call,
    }
