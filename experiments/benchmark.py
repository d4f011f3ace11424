r"""Measures speed beside the peers (torch, transformers, trl), side by side in one run.

    python -m experiments.benchmark --config=experiments/configs/benchmark/decode.py \
        --workdir=runs/benchmark-decode

Peers that are not installed (`pip install -e .[peers]`) are left out with a word. Everything is
interleaved after a warm-up whose time stands apart; the ratios of `summary.json` are of one run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError, unknown_name
from experiments import door, planning_benchmark
from experiments.benchmarks import decode, distill, loop, scaling
from experiments.checks import check_seeds
from experiments.workdir import METRICS, SUMMARY, Workdir, devices, write_json_lines

# each has a dataclass Config and measure(config, seed) -> (summary, records)
BENCHMARKS = {"decode": decode, "distill": distill, "loop": loop, "scaling": scaling}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Which benchmark, and the settings of each; those of the others are not looked at."""

    benchmark: str  # a key of BENCHMARKS
    seed: int = 0  # of weights, prompts and the order of runs
    decode: decode.Config = dataclasses.field(default_factory=decode.Config)
    distill: distill.Config = dataclasses.field(default_factory=distill.Config)
    loop: loop.Config = dataclasses.field(default_factory=loop.Config)
    scaling: scaling.Config = dataclasses.field(default_factory=scaling.Config)

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", self.benchmark, BENCHMARKS, "config.benchmark")
        check_seeds("config.seed", self.seed)


def main(config: BenchmarkConfig, workdir: Path) -> None:
    with Workdir(workdir, "benchmark", config) as run:
        if (run.path / SUMMARY).exists():
            raise UserError(
                f"--workdir={workdir} has the figures of such a run; remove {SUMMARY} or choose "
                "another to measure again"
            )
        print(f"benchmark: {config.benchmark}, {devices()}")
        summary, records = BENCHMARKS[config.benchmark].measure(
            getattr(config, config.benchmark), config.seed
        )
        write_json_lines(run.path / METRICS, records)
        run.write_summary(summary, seed=config.seed)
        _say(summary)
        print(f"files: {run.path} ({SUMMARY}, {METRICS}, config.json)")


def _say(summary: dict[str, Any]) -> None:
    """One line per figure that has an interval or a spread."""
    for key, value in summary.items():
        for suffix in ("_ci95", "_spread"):
            about = summary.get(key + suffix)
            if about is not None:
                low, high = about
                print(f"{key}: {value:.3g} [{low:.3g}, {high:.3g}]")


if __name__ == "__main__":
    door.run(main, BenchmarkConfig, plan=planning_benchmark.plan)
