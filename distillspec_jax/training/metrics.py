"""What a run writes while it goes: `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX

JSONL = "metrics.jsonl"
EVENTS = "tensorboard"


class Writer:
    """Writes nothing: what all hosts but the first have."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsWriter(Writer):
    """Appends records to `<workdir>/metrics.jsonl` and to event files in `<workdir>/tensorboard`.

    One JSON object a line: `step`, `kind` ("train" or "eval"), `wall_time` (seconds since 1970)
    and the values, numbers or intervals [low, high]; intervals are not in the event files. A
    number that is not finite becomes null: JSON has no NaN.
    """

    def __init__(self, workdir: Path, *, resumed_step: int = -1) -> None:
        """Opens the files; records of steps after `resumed_step` are of a past that is undone."""
        path = workdir / JSONL
        drop_records_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / EVENTS), purge_step=resumed_step + 1
        )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        record: dict[str, Any] = {"step": step, "kind": kind, "wall_time": time.time()}
        record |= finite(dict(values))
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                continue
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def drop_records_after(path: Path, step: int) -> None:
    """Rewrites `path` without the records after `step`, and without a last line cut short."""
    if not path.exists():
        return
    kept = [line for line in path.read_text("utf-8").splitlines() if _is_record_until(line, step)]
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(whole, path)


def _is_record_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, inside lists and mappings, too."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
