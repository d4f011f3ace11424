"""Reads the files that runs write: `config.json`, `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError

Record = dict[str, Any]

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"

LOSS_KINDS = LIKELIHOOD, DIVERGENCE = "likelihood", "divergence"
LIKELIHOOD_RECIPES = ("sft", "seqkd")  # those of distill.recipes whose own loss is 'nll'

# lists in the summary of `evaluate`, and what tables and figures need of each row
EVALUATED = {
    "drafts": ("name", "seed", "gamma", "num_prompts"),
    "pooled": (
        *("name", "temperature", "gamma", "lenience", "seeds", "lossless", "num_prompts"),
        *("block_efficiency", "accepted_histogram", "quality_metric"),
    ),
    "gains": ("figure", "name", "over", "temperature", "gamma", "gain"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    name: path of the folder below the one that is reported on, or that one's own name.
    summary: empty while the run is not finished.
    """

    name: str
    path: Path
    config: Record
    records: list[Record]
    summary: Record

    @property
    def experiment(self) -> str:
        return str(self.config.get("experiment", "unknown"))

    @property
    def is_evaluation(self) -> bool:
        return "drafts" in self.summary

    @property
    def is_training(self) -> bool:
        return any(self.of_kind("train"))

    @property
    def loss_kind(self) -> str:
        """What its training loss is, by its recipe; without one it is a fine-tuning."""
        recipe = self.config.get("recipe")
        if not isinstance(recipe, dict):
            return LIKELIHOOD
        name, loss = recipe.get("name"), recipe.get("loss")  # null: the recipe's own
        is_likelihood = loss == "nll" or (loss is None and name in LIKELIHOOD_RECIPES)
        return LIKELIHOOD if is_likelihood else DIVERGENCE

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.get("kind") == kind]

    def series(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a figure, where it is a number."""
        pairs = [(r["step"], r[key]) for r in self.of_kind(kind) if r.get(key) is not None]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def find_runs(folder: Path) -> list[Run]:
    """All runs in `folder` and below it: its own first, then by name.

    What is no run's, and a record that a kill cut short, is skipped with a warning. Raises
    UserError where there is no run, or where a file of one is broken.
    """
    if not folder.is_dir():
        raise UserError(f"--workdir={folder} is no folder; name one that holds runs")
    paths = sorted(path.parent for path in folder.rglob(CONFIG) if _is_run(path))
    if not paths:
        raise UserError(f"--workdir={folder} holds no run: there is no {CONFIG} of one below it")
    return [_read(path, folder) for path in paths]


def _is_run(config: Path) -> bool:
    """Checkpoints and exported models have a config.json, too, but of a model."""
    try:
        return config.is_file() and "experiment" in _json(config)
    except UserError as error:
        if any((config.parent / name).exists() for name in (METRICS, SUMMARY)):
            raise
        _warn(f"{error}; skipped, for no file of a run lies beside it")
        return False


def _read(path: Path, folder: Path) -> Run:
    summary, metrics = path / SUMMARY, path / METRICS
    return Run(
        name=folder.name if path == folder else path.relative_to(folder).as_posix(),
        path=path,
        config=_json(path / CONFIG),
        records=_json_lines(metrics) if metrics.exists() else [],
        summary=_summary(summary) if summary.exists() else {},
    )


def _summary(path: Path) -> Record:
    """Checked if it is that of an evaluation: one without rows has nothing to show."""
    summary = _json(path)
    for key, fields in EVALUATED.items() if "drafts" in summary else ():
        rows = summary.get(key)
        if not isinstance(rows, list) or (key == "pooled" and not rows):
            raise UserError(f"{path} has 'drafts' but no rows in '{key}': {_REMEDY}")
        for field in fields:
            if not all(isinstance(row, dict) and field in row for row in rows):
                raise UserError(f"{path} has a row in '{key}' without '{field}': {_REMEDY}")
    return summary


_REMEDY = "`evaluate` writes all of them; evaluate again, or move that folder away"


def _json(path: Path) -> Record:
    return _object(_text(path), str(path))


def _json_lines(path: Path) -> list[Record]:
    *lines, last = _text(path).split("\n")
    records = [
        _object(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()
    ]
    try:
        return records + ([_object(last, str(path))] if last.strip() else [])
    except UserError:  # a resumed run drops it, too
        _warn(f"the last line of {path} is unfinished, as a kill leaves it; skipped")
        return records


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _object(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
