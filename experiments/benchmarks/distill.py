"""Distillation beside TRL and torch: seconds a step, by phase, and memory.

Everything of one comparison is timed side by side on the same shapes and batches, with models of
fresh weights that never write an end of sequence, so that every sample has the full length; a
teacher and its draft are trained ones, which end their texts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from distillspec_jax.errors import unknown_name
from distillspec_jax.models.config import check_dtype
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments.checks import check_least
from experiments.models import check_meeting

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
    compute_dtype: str = "float32"  # or bfloat16, of that part; trained weights and loss not
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
    from experiments.benchmarks import distill_steps, distill_teacher

    measures: dict[str, Callable[[Config, int], Found]] = {
        "trl": functools.partial(distill_steps.beside_trl, part="trl"),
        "trl_small": functools.partial(distill_steps.beside_trl, part="trl_small"),
        "torch": distill_steps.beside_torch,
        "chunked": distill_steps.chunked,
        "teacher": distill_teacher.measure,
        "utilisation": distill_steps.utilisation,
    }
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if "teacher" in config.parts:  # told now, not behind an hour of the other parts
        check_meeting(config.teacher, config.teacher_draft)
    summary: Row = {}
    records: list[Row] = []
    for part in config.parts:
        needed = {"trl": absent, "trl_small": absent, "torch": set(absent) - {"trl"}}.get(part)
        if needed:
            print(f"{part}: left out, {', '.join(sorted(needed))} not installed")
            continue
        print(f"{part}: compiling, then {config.rounds} rounds", flush=True)
        figures, rows = measures[part](config, seed)
        print(
            "".join(
                f"  {row['name']}: {row['seconds']:.4g} s\n" for row in rows if "seconds" in row
            )
        )
        summary |= figures
        records += [{"kind": "timing", "part": part, **row} for row in rows]
    return summary, records
