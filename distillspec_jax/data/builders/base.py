"""The common part of the builders: pairs of texts, in `array_record`, in the order they come."""

from __future__ import annotations

import abc
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from distillspec_jax.errors import UserError
from distillspec_jax.progress import Progress


def cache_dir() -> Path:
    """Where prepared data sets live: `DISTILLSPEC_DATA`, else the user's cache folder."""
    if chosen := os.environ.get("DISTILLSPEC_DATA"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "distillspec_jax" / "data"


class TextPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS data set of (input, target) texts, read and written without TensorFlow.

    Examples keep the order in which they are generated, so an index means the same example
    everywhere. A builder that reads files of the user's says which, so that changed files make
    another data set.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source_dir: str = "", data_dir: str | Path):
        self.source_dir = source_dir
        super().__init__(data_dir=data_dir, file_format="array_record")

    @classmethod
    @abc.abstractmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        """The files of each split that the folder holds; a generated split has none."""

    @abc.abstractmethod
    def pairs(self, split: str) -> Iterable[tuple[str, str]]:
        """The (input, target) texts of a split, in order."""

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"input": text(), "target": text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.sources(self.source_dir)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (source, target) in enumerate(self.pairs(split)):
            yield index, {"input": source, "target": target}

    # TFDS prints its own two lines and bars; the progress of this package replaces them.
    def _log_download_bytes(self) -> None:
        print(f"preparing {self.name} in {self.data_dir} (once)", flush=True)

    def _log_download_done(self) -> None:
        print(f"prepared {self.name}", flush=True)


def prepare(builder_class: type[TextPairs], source_dir: str = "") -> TextPairs:
    """A builder whose data lie ready in the cache; generated there on first use.

    Two processes may call it at once: one prepares, the other waits. An interrupted preparation
    leaves nothing that a later one would take for complete.
    """
    key = _digest(builder_class.sources(source_dir))
    root = cache_dir() / key if key else cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f"{builder_class.name}.lock", "w")  # noqa: SIM115 (closed by `with`)
    except OSError as error:
        raise UserError(
            f"prepared data cannot be kept in '{cache_dir()}': {error.strerror}; "
            "name another folder in DISTILLSPEC_DATA"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = builder_class(source_dir=source_dir, data_dir=root)
        if not (builder.data_path / "dataset_info.json").exists():
            tfds.disable_progress_bar()
            builder.download_and_prepare()
    return builder


def _digest(sources: dict[str, list[Path]]) -> str:
    """A short name for the state of the source files; empty where there are none."""
    files = sorted(path.resolve() for paths in sources.values() for path in paths)
    if not files:
        return ""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:12]
