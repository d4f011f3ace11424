"""The folder of a run: whose it is, who is at work in it, and the files every run writes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax

import distillspec_jax
from distillspec_jax.errors import UserError
from distillspec_jax.files import json_object, name_beside, write_text
from distillspec_jax.hosts import ARRIVALS
from distillspec_jax.training.metrics import finite
from experiments import schema

CONFIG, METRICS, SUMMARY, LOCK = "config.json", "metrics.jsonl", "summary.json", ".lock"
RETIRED = {"distill": ("validation_examples",)}  # keys that older runs have and nothing reads
_MEND = "choose an empty or a new folder"


class Workdir:
    """The folder of one run, locked as long as this object lives.

    Folders of other runs may lie in it: an evaluation's holds those of the drafts it compares.

    Raises UserError if another job is at work in it, if it holds another run (its `config.json`
    differs), or files that are no run at all; then nothing in it was changed.
    """

    def __init__(
        self,
        path: Path,
        experiment: str,
        config: Any,
        *,
        may_change: Sequence[str] = (),
        at_least: Mapping[str, int] | None = None,
    ) -> None:
        """Opens or creates `path`.

        Args:
          path: the folder.
          experiment: name of the entrypoint.
          config: its dataclass; written to `config.json`.
          may_change: dotted keys whose value may differ from the run that is there.
          at_least: how far that run is by a key, which may not be below.
        """
        _refuse_odd_paths(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"--workdir={path} is a file, must be a folder")
        entries = path.iterdir() if path.exists() else ()
        present = {entry.name for entry in entries if not (entry / CONFIG).is_file()}
        theirs = _config_in(path) if CONFIG in present else {}
        if present - {CONFIG, LOCK, ARRIVALS, name_beside(Path(CONFIG)).name}:
            _refuse_other_run(path, theirs, experiment, config, may_change)
            _refuse_less(path, config, at_least or {})
        self._is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # parents that no one can make, as in /proc
            raise UserError(f"--workdir={path} cannot be made there; choose another") from error
        self.path = path
        self._unlock = weakref.finalize(self, os.close, _lock(path))
        write_json(path / CONFIG, {"experiment": experiment, **dataclasses.asdict(config)})

    def write_summary(self, values: Mapping[str, Any], *, seed: int) -> Path:
        """Writes `summary.json`: headline figures (null if not finite), and what made them."""
        path = self.path / SUMMARY
        write_json(path, {**finite(dict(values)), "seed": seed, **environment()})
        return path

    def drop_summary(self) -> None:
        """Removes `summary.json`, which says that the run is over."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def _take_back(self) -> None:
        """Removes a folder that was not there before, of a run that came to nothing.

        Not if the run left something; another run's folder stays, and this one around it.
        """
        left = {entry.name for entry in self.path.iterdir() if not (entry / CONFIG).is_file()}
        if not self._is_new or left - {CONFIG, LOCK}:
            return
        for name in (CONFIG, LOCK):
            (self.path / name).unlink()
        with contextlib.suppress(OSError):  # not empty
            self.path.rmdir()

    def close(self) -> None:
        """Lets another job in."""
        self._unlock()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, UserError):
            self._take_back()
        self.close()


def _refuse_odd_paths(path: Path) -> None:
    """Refuses a path that no folder can have, and what is no file where a run has one."""
    if "\0" in str(path):
        raise UserError(f"--workdir={str(path)!r} has a NUL byte, no path can; choose another")
    for file in (path / CONFIG, path / LOCK):
        if os.path.lexists(file) and not file.is_file():
            raise UserError(f"{file} is not a file; {_MEND}")


def _config_in(path: Path) -> dict[str, Any]:
    """The config of the run in a folder; UserError if its `config.json` is something else's."""
    try:
        theirs = json_object((path / CONFIG).read_text("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path / CONFIG} is not UTF-8 text; {_MEND}") from None
    except ValueError as error:
        raise UserError(f"{path / CONFIG} is {error}; {_MEND}") from None
    if "experiment" not in theirs:
        raise UserError(
            f"{path / CONFIG} is not that of a run: it has no key 'experiment'; {_MEND}"
        )
    return theirs


def _refuse_other_run(
    path: Path,
    theirs: dict[str, Any],
    experiment: str,
    config: Any,
    may_change: Sequence[str],
) -> None:
    if not theirs:
        raise UserError(f"--workdir={path} holds files but no run; {_MEND}")
    name = theirs.pop("experiment")
    if name != experiment:
        raise UserError(
            f"--workdir={path} holds a run of '{name}', this is '{experiment}'; choose another"
        )
    for key in RETIRED.get(experiment, ()):
        theirs.pop(key, None)
    # Through the dataclass: keys that are newer than the run have their defaults.
    before = schema.to_dataclass(type(config), theirs, str(path / CONFIG))
    old, new = schema.flat(dataclasses.asdict(before)), schema.flat(dataclasses.asdict(config))
    for key, value in new.items():
        if old[key] != value and key not in may_change:
            raise UserError(
                f"--workdir={path} holds another run: its {key} is {_shown(old[key])}, yours is "
                f"{_shown(value)}; choose another workdir, or the same value to go on"
            )


def _shown(value: Any) -> str:
    """A value for a sentence: not all of a long one."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 100 else f"{words[:97]}..."


def _refuse_less(path: Path, config: Any, at_least: Mapping[str, int]) -> None:
    for key, reached in at_least.items():
        if getattr(config, key) < reached:
            raise UserError(
                f"--workdir={path} has reached {key} {reached}, yours is {getattr(config, key)}; "
                "choose another workdir, or at least as much"
            )


def devices() -> str:
    """How many devices of which kind a run has, as it says at its start."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def environment() -> dict[str, Any]:
    """Versions and devices, as every summary carries them."""
    return {
        "jax_version": jax.__version__,
        "flax_version": flax.__version__,
        "distillspec_jax_version": distillspec_jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes one value as JSON: the old file or the new one is there at every moment."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The same with an object a line; numbers that are not finite become null."""
    lines = (json.dumps(finite(dict(record)), allow_nan=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def _lock(path: Path) -> int:
    """A file descriptor that holds the lock; the lock goes with the process, killed or not."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another job is at work in --workdir={path}; wait or choose another"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"the file system of --workdir={path} has no locks ({error.strerror}); choose a folder "
            "on one that has, or have it mounted with them (Lustre: -o flock)"
        ) from error
    return descriptor
