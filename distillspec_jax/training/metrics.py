"""What a run writes while it goes: `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from distillspec_jax.errors import naming
from distillspec_jax.files import write_text

JSONL = "metrics.jsonl"
EVENTS = "tensorboard"
_FLUSH_SECONDS = 120.0  # event files lag behind by as much: a flush goes down to the disk


class Writer:
    """Writes nothing: what all hosts but the first have."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def keep(self) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsWriter(Writer):
    """Appends records to `<workdir>/metrics.jsonl` and to event files in `<workdir>/tensorboard`.

    One JSON object a line: `step`, `kind` ("train" or "eval"), `wall_time` (seconds since 1970)
    and the values, numbers or intervals [low, high]; intervals are not in the event files. A
    number that is not finite becomes null: JSON has no NaN. A "train" record of a step that has
    one is not written again. `metrics.jsonl` is the record: what stops the event files, a full
    disk say, is told once, and the run goes on without them.
    """

    def __init__(
        self, workdir: Path, *, resumed_step: int = -1, evaluated_step: int | None = None
    ) -> None:
        """Opens the files; records of steps after `resumed_step` are of a past that is undone.

        So are evaluations after `evaluated_step`, if it is given: one of the resumed step itself
        is made again where the checkpoint was saved before it.
        """
        path = workdir / JSONL
        kept = drop_records_after(path, resumed_step, evaluated_step)
        self._trained = max((each["step"] for each in kept if each["kind"] == "train"), default=-1)
        self._file = _at_end(path)
        self._events = _Events(workdir / EVENTS, resumed_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "train":
            if step <= self._trained:
                return
            self._trained = step
        record: dict[str, Any] = {"step": step, "kind": kind, "wall_time": time.time()}
        record |= finite(dict(values))
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        self._events.write(
            step, {f"{kind}/{k}": v for k, v in values.items() if not isinstance(v, list)}
        )

    def keep(self) -> None:
        """Returns when all records are on the disk: a node that fails later loses none of them.

        The file is closed for it, too: a mounted bucket takes a file only then.
        """
        with naming(Path(self._file.name)):
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = _at_end(Path(self._file.name))

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _at_end(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def _numbers(folder: Path) -> list[int]:
    """Of the event files in a folder, which TensorBoard reads in this order."""
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    return [int(parts[3]) for parts in names if parts[3].isdecimal()]


class _Events:
    """An event file, written by the caller: tensorboardX's writers hang once their thread died."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Opens a file; TensorBoard hides what earlier ones say of `first_step` and later."""
        folder.mkdir(exist_ok=True)
        now, self._flush_at = time.time(), 0.0
        # readers take the files in the order of these numbers; a clock may go back or stand
        number = max([int(now), *(1 + each for each in _numbers(folder))])
        name = f"events.out.tfevents.{number}.{socket.gethostname()}"
        self._file: RecordWriter | None = RecordWriter(str(folder / name))
        start = SessionLog(status=SessionLog.START)
        self._append(
            [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=first_step, session_log=start),
            ]
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        now = time.time()
        summaries = [scalar(name, value) for name, value in values.items()]
        self._append([Event(wall_time=now, step=step, summary=each) for each in summaries])

    def close(self) -> None:
        self._attempt(lambda file: file.close())

    def _append(self, events: list[Event]) -> None:
        def append(file: RecordWriter) -> None:
            for event in events:
                file.write(event.SerializeToString())
            if time.monotonic() >= self._flush_at:
                file.flush()
                self._flush_at = time.monotonic() + _FLUSH_SECONDS

        self._attempt(append)

    def _attempt(self, action: Callable[[RecordWriter], None]) -> None:
        if self._file is None:
            return
        try:
            action(self._file)
        except OSError as error:
            print(
                f"warning: the files for TensorBoard end here ({error}); {JSONL} goes on",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def drop_records_after(
    path: Path, step: int, evaluated_step: int | None = None
) -> list[dict[str, Any]]:
    """Rewrites `path` without the records after `step`, and without a last line cut short.

    Evaluations are kept until `evaluated_step`, if it is given. Returns what is kept.
    """
    if not path.exists():
        return []
    evaluated_step = step if evaluated_step is None else evaluated_step
    lines = path.read_text("utf-8", errors="replace").splitlines()
    read = ((line, _record_until(line, step, evaluated_step)) for line in lines)
    kept = [(line, record) for line, record in read if record is not None]
    write_text(path, "".join(line + "\n" for line, _ in kept))
    return [record for _, record in kept]


def _record_until(line: str, step: int, evaluated_step: int) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
        is_kept = record["step"] <= (evaluated_step if record["kind"] == "eval" else step)
    except (ValueError, KeyError, TypeError, RecursionError):  # no record that we wrote
        return None
    return record if is_kept else None


def finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, inside lists and mappings, too."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
