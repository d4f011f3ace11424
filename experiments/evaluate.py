r"""Measures what drafts gain for a target: acceptance, block efficiency, speed and quality.

    python -m experiments.evaluate --config=experiments/configs/quickstart.py:evaluate \
        --workdir=runs/quickstart

All drafts meet the same prompts with the same randomness, and the clock runs interleaved. The
block length that is timed is chosen by predicted speed on the tuning split, never on the prompts
of the claim. Started again with the same config, weights and data it keeps the figures it has;
with other drafts, texts or numbers of prompts it measures again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distillspec_jax.data import tasks
from distillspec_jax.data.tasks import TaskConfig
from distillspec_jax.decoding.block_length import FIXED, BlockLength
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.intervals import worded
from distillspec_jax.evaluation.quality import has_references
from distillspec_jax.files import json_object
from distillspec_jax.models.config import check_dtype
from experiments import door, measuring, planning_decoding
from experiments.bench import Bench, open_bench
from experiments.checks import check_entries, check_least, check_seeds
from experiments.draft_sampling import DraftSampling
from experiments.workdir import METRICS, SUMMARY, Workdir, devices, write_json_lines

GRID = ("temperatures", "gammas", "lenience", "gamma_grid", "timed_batch_sizes")
SIZES = ("num_prompts", "timed_prompts")
FIGURES = ("acceptance_rate", "block_efficiency", "speedup_wall_clock", "quality")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """A draft to measure; drafts of one name are seeds of it and are pooled."""

    name: str
    path: str  # as `zoo.load` takes it
    seed: int = 0  # that it was trained with


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DraftSampling):
    """What is measured; every list is a dimension of the grid."""

    target: str
    drafts: tuple[DraftConfig, ...]  # the last name is the headline, the others are its baselines
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    split: str = "test"
    num_prompts: int = 500
    temperatures: tuple[float, ...] = (0.0, 1.0)
    gammas: tuple[int, ...] = (7,)
    lenience: tuple[float, ...] = (1.0,)  # 1 is lossless; others are measured at T > 0
    lenience_kind: str = "exponential"
    relaxed_residual: bool = False  # with lenience, of the correction, too
    verification: str = "token"
    block_length: BlockLength = FIXED  # adaptive within each gamma
    num_drafts: int = 1  # of every block
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 0  # 0: the task's target length
    batch_size: int = 64  # of decoding for acceptance; with a draft, its slots
    compute_dtype: str = "float32"  # or bfloat16, weights too; softmax stays in float32
    seed: int = 0  # of sampling
    # also measure the gamma of the highest predicted speed; it is predicted for token
    # verification of whole blocks alone
    tune: bool = True
    tuning_split: str = "tuning"
    num_tuning_prompts: int = 200
    gamma_grid: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10)  # what is predicted and tuned over
    timed_prompts: int = 50  # 0: no clock
    timed_batch_sizes: tuple[int, ...] = (1,)
    timed_repeats: int = 3

    def __post_init__(self) -> None:
        if not self.drafts:
            raise UserError("config.drafts is empty, must have at least one entry")
        for field in GRID:
            check_entries(f"config.{field}", getattr(self, field))
        check_least(self, 1, "num_prompts", "batch_size", "num_tuning_prompts", "timed_repeats")
        check_least(self, 1, "gammas", "gamma_grid", "timed_batch_sizes")
        check_least(self, 0, "timed_prompts")
        check_dtype(self.compute_dtype, "config.compute_dtype")
        check_seeds("config.seed", self.seed)
        seen = [(draft.name, draft.seed) for draft in self.drafts]
        if len(set(seen)) < len(seen):
            raise UserError("config.drafts names a draft twice with one seed; give each its seed")
        counts = {sum(name == other for other, _ in seen) for name, _ in seen}
        if len(counts - {1}) > 1:
            raise UserError("config.drafts has names with different numbers of seeds; 1 or all")

    @property
    def drafts_whole_blocks(self) -> bool:
        """Whether every block is gamma tokens of one draft, as the predicted speeds take it."""
        return self.block_length == FIXED and self.num_drafts == 1

    @property
    def has_whole_blocks(self) -> bool:
        """Whether texts of the target tell tau, too: token verification of whole blocks."""
        return self.drafts_whole_blocks and self.verification != "block"


def main(config: EvaluateConfig, workdir: Path) -> None:
    task = tasks.load_task(config.task)
    bench = open_bench(config, task)
    sizes = {name: getattr(config, name) for name in SIZES}
    with Workdir(workdir, "evaluate", config, may_change=("drafts", *SIZES)) as run:
        _announce(bench)
        about = {"weights": bench.weights(), "data": bench.data(), "sizes": sizes}
        summary = _kept(run.path, about)
        if summary is None:
            results = measuring.measure(bench)
            summary = {**results.summary(), **about}
            write_json_lines(run.path / METRICS, results.records)
            run.write_summary(summary, seed=config.seed)
        else:
            mend = "remove it to measure again"
            print(f"kept: {run.path / SUMMARY} has these figures already; {mend}")
        _say(summary, run.path)


def _kept(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The summary that is there, if the same drafts in order were measured on the same prompts."""
    try:
        summary = json_object((path / SUMMARY).read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # the second: damaged
        return None
    if not about.items() <= summary.items():
        return None
    # the last draft is the headline: their order counts
    return summary if list(about["weights"]) == list(summary["weights"]) else None


def _announce(bench: Bench) -> None:
    config = bench.config
    print(f"evaluate: {len(bench.prompts.row_ids)} prompts of {bench.task.name}/{config.split}")
    for role, loaded in bench.models.items():
        print(f"  {role}: {loaded}")
    if config.tune and not config.has_whole_blocks:
        print("  no gamma is tuned: that knows token verification of whole blocks alone")
    grid = {"temperature": config.temperatures, "gamma": config.gammas, "lenience": config.lenience}
    print("  " + ", ".join(f"{name} {_list(values)}" for name, values in grid.items()))
    if config.draft_options:
        print("  " + ", ".join(f"{key} {value:g}" for key, value in config.draft_options.items()))
    metric, references = bench.task.metric, bench.prompts.references
    if metric != "none" and not has_references(metric, references):
        print(f"  no quality ({metric}): the split '{config.split}' has no references")
    print(f"  devices: {devices()}", flush=True)


def _list(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _say(summary: dict[str, Any], path: Path) -> None:
    for row in summary["pooled"]:
        label = f"{row['name']}, T = {row['temperature']:g}, gamma {row['gamma']}"
        if not row["lossless"]:
            label += f", lenience {row['lenience']:g}"
        if row.get("batch_size", 1) != 1:
            label += f", batch {row['batch_size']}"
        figures = [f"{key} {worded(row, key)}" for key in FIGURES if row.get(key) is not None]
        print(f"{label}: {', '.join(figures)}")
    print(f"files: {path} ({SUMMARY}, {METRICS}, config.json)")


if __name__ == "__main__":
    plan = planning_decoding.planner(planning_decoding.of_evaluate)
    door.run(main, EvaluateConfig, plan=plan)
