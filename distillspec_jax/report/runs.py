"""Reads the files that runs write: `config.json`, `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError

Record = dict[str, Any]


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

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.get("kind") == kind]

    def series(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a figure, where it is a number."""
        pairs = [(r["step"], r[key]) for r in self.of_kind(kind) if r.get(key) is not None]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def find_runs(folder: Path) -> list[Run]:
    """All runs in `folder` and below it: its own first, then by name.

    Raises UserError where there is none, or where a file of one is broken.
    """
    if not folder.is_dir():
        raise UserError(f"--workdir={folder} is no folder; name one that holds runs")
    paths = sorted(path.parent for path in folder.rglob("config.json") if _is_run(path))
    if not paths:
        raise UserError(f"--workdir={folder} holds no run: there is no config.json of one below it")
    return [_read(path, folder) for path in paths]


def _is_run(config: Path) -> bool:
    """Checkpoints and exported models have a config.json, too, but of a model."""
    return "experiment" in _json(config)


def _read(path: Path, folder: Path) -> Run:
    summary, metrics = path / "summary.json", path / "metrics.jsonl"
    return Run(
        name=folder.name if path == folder else path.relative_to(folder).as_posix(),
        path=path,
        config=_json(path / "config.json"),
        records=_json_lines(metrics) if metrics.exists() else [],
        summary=_json(summary) if summary.exists() else {},
    )


def _json(path: Path) -> Record:
    return _object(path.read_text("utf-8"), str(path))


def _json_lines(path: Path) -> list[Record]:
    lines = path.read_text("utf-8").splitlines()
    return [_object(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _object(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value
