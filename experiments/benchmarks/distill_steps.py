"""Steps beside TRL's and torch's, in chunks and not, and how much of a device they use.

Models of fresh weights that never write an end of sequence, so that every sample has the full
length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.data.batch import Batch
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_distill_step, make_rollout, make_update
from distillspec_jax.evaluation.latency import Timing, side_by_side
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, in_compute_dtype, init_params
from distillspec_jax.training.optimizers import make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.benchmarks.decode_plain import ratio
from experiments.benchmarks.distill import OPTIMIZER, Config, Found, Pair, Row


def beside_trl(config: Config, seed: int, *, part: str) -> Found:
    """On-policy JSD steps of decoder-only models, rollouts included."""
    from experiments.benchmarks import torch_distill

    pair: Pair = getattr(config, part)
    ours = steps_of(config, part, seed)["step"]
    theirs = torch_distill.trl_calls(
        ours.draft.config, ours.target.config, np.asarray(ours.batch.inputs), pair.target_length
    )
    calls = {**ours.calls(), **theirs}
    timings = side_by_side(calls, repeats=config.rounds, seed=seed)
    figures = ratio(f"step_over_{part}", timings["trl_step"].seconds, timings["step"].seconds)
    tokens = pair.batch_size * pair.target_length
    return figures, [*_rows(timings, pair, tokens, calls), ours.memory()]


def beside_torch(config: Config, seed: int) -> Found:
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


def chunked(config: Config, seed: int) -> Found:
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


def utilisation(config: Config, seed: int) -> Found:
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
            target_params = init_params(self.target, keys[1])
            return state, in_compute_dtype(self.target, target_params)  # as `distill` holds them

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

        Of the program for an accelerator, as no compiler counts those of the CPU's own kernel; by
        the CPU's backend, as that of a GPU counts nothing before it has compiled.
        """
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu),
            (self.state, self.target_params, self.batch),
        )
        traced = self._lazy_update.trace(*arguments)
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
