"""The common part of the builders: pairs of texts, in `array_record`, in the order they come."""

from __future__ import annotations

import abc
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import tensorflow_datasets as tfds

from distillspec_jax.data import jsonl
from distillspec_jax.errors import UserError

_EXAMPLES_PER_LINE = 50_000
_HASHED_BYTES = 1 << 26
Files = Mapping[str, Sequence[str]]


def cache_dir() -> Path:
    """Where prepared data sets live: `DISTILLSPEC_DATA`, else the user's cache folder."""
    if chosen := os.environ.get("DISTILLSPEC_DATA"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "distillspec_jax" / "data"


class TextPairs(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set of (input, target) texts, written and read without TensorFlow.

    Examples keep the order in which they are generated, so an index means the same example
    everywhere. A target is empty where the data have no reference.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init_subclass__(cls, **kwargs: Any):
        # TFDS has data sets of the same names; only one of each could be registered.
        super().__init_subclass__(skip_registration=True, **kwargs)

    def __init__(self, *, source_dir: str = "", data_dir: str | Path):
        self.source_dir = source_dir
        super().__init__(data_dir=data_dir, file_format="array_record")

    @classmethod
    @abc.abstractmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        """The files that each split is made from; other content makes another data set."""

    @classmethod
    def code(cls) -> list[bytes]:
        """What else makes the data: another version of it makes another data set."""
        return []

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
        count = 0
        for source, target in self.pairs(split):
            yield count, {"input": source, "target": target}
            count += 1
            if count % _EXAMPLES_PER_LINE == 0:
                _say(f"  {split}: {count:,} examples so far")
        if not count:
            raise UserError(f"split '{split}' of {self.name} in '{self.source_dir}' is empty")
        _say(f"  {split}: {count:,} examples")

    # These two print in TFDS; the lines above replace them.
    def _log_download_bytes(self) -> None:
        _say(f"preparing {self.name} in {self.data_dir} (once)")

    def _log_download_done(self) -> None:
        pass


class FromFiles(TextPairs):
    """A data set that reads files which the user has put into a folder.

    Prepared data belong to the files, to the module that reads them and to `jsonl`.

    Attributes:
      FILES: for each split the glob patterns of its files, `a|b` where either name will do; a
        split needs a match for each of its patterns, and a folder at least one split.
    """

    FILES: ClassVar[Files]

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        if not source_dir:
            raise UserError(
                f"task '{cls.name}' needs source_dir, the folder with its files "
                f"({cls._wanted()}); nothing is downloaded"
            )
        folder = Path(source_dir)
        if not folder.is_dir():
            raise UserError(f"source_dir of task '{cls.name}', '{source_dir}', is not a folder")
        found = {}
        for split, patterns in cls.FILES.items():
            matches = [_matches(folder, pattern) for pattern in patterns]
            if all(matches):
                found[split] = [path for paths in matches for path in paths]
        if not found:
            raise UserError(
                f"'{source_dir}' holds none of the files of task '{cls.name}': {cls._wanted()}"
            )
        return found

    @classmethod
    def _wanted(cls) -> str:
        files = (" with ".join(patterns) for patterns in cls.FILES.values())
        return "; ".join(files).replace("|", " or ")

    @classmethod
    def code(cls) -> list[bytes]:
        own = cls.__mro__[: cls.__mro__.index(FromFiles)]
        modules = [jsonl, *(sys.modules[part.__module__] for part in own)]
        return [Path(str(module.__file__)).read_bytes() for module in dict.fromkeys(modules)]

    def files(self, split: str) -> list[Path]:
        return self.sources(self.source_dir)[split]


def _matches(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for name in pattern.split("|") for path in folder.glob(name))


def prepare(builder_class: type[TextPairs], source_dir: str = "") -> TextPairs:
    """A builder whose data lie ready in the cache; generated there on first use.

    Two processes may call it at once: one prepares, the other waits. An interrupted preparation
    leaves nothing that a later one would take for complete.
    """
    digest = _digest(builder_class.sources(source_dir), builder_class.code())
    root = cache_dir() / f"{builder_class.name}-{digest}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / "lock", "w")  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise UserError(
            f"cannot keep prepared data in '{cache_dir()}' ({error.strerror}); "
            "name a folder in the environment variable DISTILLSPEC_DATA"
        ) from error
    with lock:
        _wait_for(lock)
        builder = builder_class(source_dir=source_dir, data_dir=root)
        tfds.disable_progress_bar()
        builder.download_and_prepare()  # nothing to do where the data lie already
    return builder


def _wait_for(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"the file system of '{cache_dir()}' has no locks ({error.strerror}); name a folder on "
            "one that has in the environment variable DISTILLSPEC_DATA"
        ) from error


def _digest(sources: Mapping[str, Sequence[Path]], code: Iterable[bytes]) -> str:
    """A short name for what the sources hold and the code that reads them.

    Files too big to read are known by size and time.
    """
    state = hashlib.sha256()
    for part in code:
        state.update(hashlib.sha256(part).digest())
    for split, paths in sources.items():
        state.update(split.encode())
        for path in paths:
            status = path.stat()
            if status.st_size <= _HASHED_BYTES:
                held = path.read_bytes()
            else:
                held = repr((status.st_size, status.st_mtime_ns)).encode()
            state.update(hashlib.sha256(held).digest())
    return state.hexdigest()[:12]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
