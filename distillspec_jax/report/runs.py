"""Reads the files that runs write: `config.json`, `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError
from distillspec_jax.files import json_object

Record = dict[str, Any]

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"

LOSS_KINDS = LIKELIHOOD, DIVERGENCE = "likelihood", "divergence"

# lists in the summary of `evaluate`, and what tables and figures need of each row
EVALUATED = {
    "drafts": ("name", "seed", "gamma", "num_prompts"),
    "pooled": (
        *("name", "temperature", "gamma", "lenience", "seeds", "lossless", "num_prompts"),
        *("block_efficiency", "accepted_histogram", "quality_metric"),
    ),
    "gains": ("figure", "name", "over", "temperature", "gamma", "gain"),
}
CURVE = [
    *("name", "temperature", "gamma"),
    *("block_efficiency_path", "speedup_predicted_verification"),
]
TEXTS = ("name", "over", "figure", "quality_metric")
LISTS = ("seeds", "accepted_histogram")


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
    def recipe(self) -> Record:
        """Empty for a fine-tuning."""
        recipe = self.config.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def loss_kind(self) -> str:
        """What its training loss is, by its recipe; without one it is a fine-tuning."""
        if not self.recipe:
            return LIKELIHOOD
        return LIKELIHOOD if self.recipe.get("loss") == "nll" else DIVERGENCE

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.get("kind") == kind]

    def series(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a figure, where it is a number."""
        pairs = [(r["step"], r[key]) for r in self.of_kind(kind) if r.get(key) is not None]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def evaluations(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """The evaluations, each after what its titles begin with: its name, if there are several."""
    found = [run for run in runs if run.is_evaluation]
    return [(f"{run.name}: " if len(found) > 1 else "", run) for run in found]


def find_runs(folder: Path) -> list[Run]:
    """All runs in `folder` and below it, linked ones too: its own first, then by name.

    A run with a broken file, and a record that a kill cut short, is skipped with a warning, and
    one that has nothing to draw is named. Raises UserError where there is no run to read.
    """
    if not folder.is_dir():
        raise UserError(f"--workdir={folder} is no folder; name one that holds runs")
    paths = sorted(path for path in _folders(folder) if (path / CONFIG).is_file())
    runs = [run for path in paths if (run := _read(path, folder))]
    if not runs:
        raise UserError(
            f"--workdir={folder} holds no run that can be read; name a folder with the {CONFIG} of "
            "one in it or below it"
        )
    for run in runs:
        if not (run.is_evaluation or run.is_training):
            lack = "nothing to draw" if run.summary else f"unfinished: no {SUMMARY} yet"
            _warn(f"{run.name} (experiments.{run.experiment}): {lack}")
    return runs


def _folders(top: Path) -> Iterator[Path]:
    """`top` and what lies below it, each real folder once: links wait for those without one."""
    waiting, seen = collections.deque([top]), set()
    while waiting:
        folder = waiting.popleft()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        except OSError as error:
            _warn(f"{folder} cannot be read ({error.strerror}); skipped")
            continue
        yield folder
        waiting.extendleft(entry for entry in below if not entry.is_symlink())
        waiting.extend(entry for entry in below if entry.is_symlink())


def _read(path: Path, folder: Path) -> Run | None:
    """None for a checkpoint or an exported model, and with a warning for a broken run."""
    summary, metrics = path / SUMMARY, path / METRICS
    try:
        config = _json(path / CONFIG)
        if "experiment" not in config:
            return None
        return Run(
            name=folder.name if path == folder else path.relative_to(folder).as_posix(),
            path=path,
            config=config,
            records=_json_lines(metrics) if metrics.exists() else [],
            summary=_summary(summary) if summary.exists() else {},
        )
    except UserError as error:
        _warn(f"{error}; skipped")
        return None


def _summary(path: Path) -> Record:
    """Checked if it is that of an evaluation: one without rows has nothing to show."""
    summary = _json(path)
    for key, fields in EVALUATED.items() if "drafts" in summary else ():
        rows = summary.get(key)
        if not isinstance(rows, list) or (key == "pooled" and not rows):
            raise UserError(f"{path} has 'drafts' but no rows in '{key}': {_REMEDY}")
        for row in rows:
            _check(row, fields, f"{path} has a row in '{key}'", f": {_REMEDY}")
    return summary


_REMEDY = "`evaluate` writes all of them; evaluate again, or move that folder away"


def _check(row: Any, fields: Sequence[str], where: str, remedy: str = "") -> None:
    """Raises UserError unless `row` has all `fields`, each as tables and figures need it."""
    for field in fields:
        if not isinstance(row, dict) or field not in row:
            raise UserError(f"{where} without '{field}'{remedy}")
        if not _is_sound(field, row[field]):
            raise UserError(f"{where} whose '{field}' is {json.dumps(row[field]):.40}{remedy}")


def _is_sound(field: str, value: Any) -> bool:
    if field in TEXTS:
        return isinstance(value, str)
    if field in LISTS:
        return isinstance(value, list) and all(map(_is_number, value))
    return isinstance(value, bool) if field == "lossless" else _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds; JSON knows longer ones."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _json(path: Path) -> Record:
    return _object(_text(path), str(path))


def _json_lines(path: Path) -> list[Record]:
    *lines, last = _text(path).split("\n")
    records = [
        _record(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()
    ]
    try:
        return records + ([_record(last, str(path))] if last.strip() else [])
    except UserError:  # a resumed run drops it, too
        _warn(f"the last line of {path} is unfinished, as a kill leaves it; skipped")
        return records


def _record(text: str, where: str) -> Record:
    record = _object(text, where)
    kind, needed = record.get("kind"), []
    if kind == "curve":
        needed = CURVE
    elif kind in ("train", "eval"):
        known = [key for key, value in record.items() if value is not None]  # null: not finite
        needed = ["step", *(k for k in known if k != "kind" and not k.endswith("_ci95"))]
    _check(record, needed, f"{where} has a record of '{kind}'")
    return record


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _object(text: str, where: str) -> Record:
    try:
        return json_object(text)
    except ValueError as error:
        raise UserError(f"{where} is {error}") from None


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
