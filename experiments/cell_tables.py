"""From the counts of a sweep's cells to rows with intervals, a summary and Markdown tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distillspec_jax.data.tasks import Task
from distillspec_jax.evaluation.acceptance import acceptance_rate, block_efficiency
from distillspec_jax.evaluation.intervals import ratio_of_ratios, worded
from experiments.cells import CONTROL, SOURCES, START, Cell
from experiments.watching import DecoderConfig

Row = dict[str, Any]
GAINS = (START, CONTROL)  # what the gain of a cell is over


@dataclasses.dataclass(frozen=True)
class Results:
    """What the files of all cells hold, in the order of the cells."""

    decoder: DecoderConfig
    task: Task
    measured: Mapping[Cell, Row]

    def records(self) -> Iterator[Row]:
        """One object per cell, seed and temperature."""
        for cell, found in self.measured.items():
            for temperature in self.decoder.temperatures:
                emitted, calls, accepted, tested = found["counts"][f"{temperature:g}"]
                yield {
                    "kind": "cell",
                    "name": cell.name,
                    **dataclasses.asdict(cell),
                    "temperature": temperature,
                    **self._figures(emitted, calls, accepted, tested),
                    "train_seconds": found["train_seconds"],
                    "skipped_updates": found.get("skipped_updates", 0),
                    **{f"train_{name}": mean for name, mean in found.get("means", {}).items()},
                }

    def _figures(
        self, emitted: np.ndarray, calls: np.ndarray, accepted: np.ndarray, tested: np.ndarray
    ) -> Row:
        return {
            **block_efficiency(emitted, calls, self.decoder.gamma).keys("block_efficiency"),
            **acceptance_rate(accepted, tested).keys("acceptance_rate"),
        }

    def rows(self) -> list[Row]:
        """One row per cell and temperature, its seeds pooled, with gains over start and control.

        `gain_over_*` is a ratio of block efficiencies on the same prompts; its interval resamples
        them together and is wider by what the seeds differ by.
        """
        unseeded = dict.fromkeys(dataclasses.replace(cell, seed=0) for cell in self.measured)
        return [
            self._row(cell, temperature)
            for cell in unseeded
            for temperature in self.decoder.temperatures
        ]

    def _row(self, cell: Cell, temperature: float) -> Row:
        emitted, calls, accepted, tested = self._counts(cell, temperature)
        row: Row = {
            "name": cell.name,
            "divergence": cell.loss if cell.name not in GAINS else None,
            "source": cell.source if cell.name != START else None,
            "train_split": cell.split,
            "references": len(self.task.examples(cell.split)),
            "steps": cell.steps,
            "temperature": temperature,
            "seeds": len(emitted),
            "num_prompts": emitted.shape[1],
            **self._figures(emitted, calls, accepted, tested),
        }
        for name, base in ((START, Cell(cell.split, 0)), (CONTROL, Cell(cell.split, cell.steps))):
            if cell.name in (START, name):
                continue
            base_emitted, base_calls, *_ = self._counts(base, temperature)
            gain = ratio_of_ratios(emitted, calls, base_emitted, base_calls)
            row |= gain.keys(f"gain_over_{name}")
        return row

    def _counts(self, cell: Cell, temperature: float) -> np.ndarray:
        """[4, seeds, prompts]."""
        same = [
            found["counts"][f"{temperature:g}"]
            for other, found in self.measured.items()
            if dataclasses.replace(other, seed=0) == dataclasses.replace(cell, seed=0)
        ]
        return np.stack([np.array(counts, np.float64) for counts in same], axis=1)


def summary(rows: list[Row], decoder: DecoderConfig) -> Row:
    """The rows, and per temperature the best cell with its gains.

    The best is chosen on the prompts it is measured on, so its gain is a little flattered.
    """
    prompts = rows[0]["num_prompts"]
    found: Row = {"gamma": decoder.gamma, "num_prompts": prompts, "cells": rows}
    for temperature in decoder.temperatures:
        cells = [row for row in rows if row["divergence"] and row["temperature"] == temperature]
        best = max(cells, key=lambda row: row[f"gain_over_{CONTROL}"])
        found[f"best_cell_t{temperature:g}"] = {
            key: best[key] for key in ("name", "train_split", "steps")
        }
        for name in GAINS:
            for end in ("", "_ci95"):  # one prompt has no interval
                key = f"gain_over_{name}"
                if key + end in best:
                    found[f"{key}_t{temperature:g}{end}"] = best[key + end]
    return found


def markdown(rows: list[Row]) -> str:
    """Per data size, steps and temperature a grid; then gains by data size and steps, if many."""
    groups = list(
        dict.fromkeys((row["train_split"], row["steps"]) for row in rows if row["divergence"])
    )
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    parts = [
        _grid([row for row in rows if row["temperature"] == temperature], *group)
        for group in groups
        for temperature in temperatures
    ]
    if len(groups) > 1:
        parts.append(_curve(rows))
    return "\n".join(parts)


def _grid(rows: list[Row], split: str, steps: int) -> str:
    """Divergence x source, with the draft before and the control above."""
    here = [row for row in rows if row["train_split"] == split and row["steps"] in (0, steps)]
    by_name = {row["name"]: row for row in here}
    cells = [row for row in here if row["divergence"]]
    sources = [name for name in SOURCES if any(row["source"] == name for row in cells)]
    start, control = by_name[START], by_name[CONTROL]
    lines = [
        f"T = {start['temperature']:g}, {start['references']:,} references, {steps:,} steps, "
        f"{control['seeds']} seeds: fine-tuned {_tau(start)}, control {_tau(control)}",
        "",
        f"| | {' | '.join(sources)} |",
        "| --- " * (len(sources) + 1) + "|",
    ]
    for divergence in dict.fromkeys(row["divergence"] for row in cells):
        names = [Cell(split, steps, divergence, source).name for source in sources]
        taus = [_tau(by_name[name]) for name in names]
        lines.append(f"| {divergence} | {' | '.join(taus)} |")
    return "\n".join(lines) + "\n"


def _curve(rows: list[Row]) -> str:
    """A line per cell, with its gains: how they depend on data size and steps."""
    lines = [
        "| references | steps | draft | T | block efficiency | over fine-tuned | over control |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        gains = [_gain(row, f"gain_over_{name}") for name in GAINS]
        head = f"| {row['references']:,} | {row['steps']:,} | {row['name']} "
        lines.append(f"{head}| {row['temperature']:g} | {_tau(row)} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


def _tau(row: Row) -> str:
    return worded(row, "block_efficiency", ".2f")


def _gain(row: Row, key: str) -> str:
    if key not in row:
        return ""
    gain = f"{100 * (row[key] - 1):+.0f} %"
    if f"{key}_ci95" not in row:
        return f"{gain} (n=1)"
    low, high = (100 * (bound - 1) for bound in row[f"{key}_ci95"])
    return f"{gain} [{low:+.0f}, {high:+.0f}]"
