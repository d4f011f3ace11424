"""Texts that a model wrote, kept in sharded `array_record` files that say how they were made.

    texts-00000-of-00003.array_record     record 0: the settings, a JSON object
                                          then one per text, {"input", "target"} in pieces

Pieces and not words: a text encoded anew may be other pieces than those the model wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from distillspec_jax.data.examples import EncodedExample, Examples
from distillspec_jax.errors import UserError

SUFFIX = ".array_record"
OPEN_FILES = 64  # at once: a process may have 1,024
_DAMAGE = (ValueError, TypeError, IndexError, RuntimeError)  # what a bad file makes readers raise
_NO_DAMAGE = {  # what the readers say of a good one, and what mends it
    "Too many open files": "allow this process more of them (ulimit -n)",
    "Permission denied": "allow this user to read it",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What made the texts; texts of other settings are other data.

    target: `models.fingerprint` of the model that wrote, and where it was.
    vocabulary: fingerprint of the pieces.
    data: task and split of the prompts, with how they were encoded.
    sampling: temperature, top_k, top_p and the most tokens of a text.
    seed: of the draws; text n is keyed by n.
    prompts, examples, shard_size: prompts, texts in all (text n is of prompt n mod prompts), and
      texts in each file.
    """

    target: str
    target_path: str
    vocabulary: str
    data: dict[str, Any]
    sampling: dict[str, Any]
    seed: int
    prompts: int
    examples: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.examples // self.shard_size)

    def path(self, folder: Path, shard: int) -> Path:
        return folder / f"texts-{shard:05}-of-{self.shards:05}{SUFFIX}"

    def rows(self, shard: int) -> range:
        """The examples of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.examples))


def write_shard(
    folder: Path, settings: Settings, shard: int, texts: Iterable[EncodedExample]
) -> None:
    """Writes one file, whole or not at all."""
    path = settings.path(folder, shard)
    beside = path.with_name(f".{path.name}.tmp")
    records = [dataclasses.asdict(settings), *(text._asdict() for text in texts)]
    try:
        writer = ArrayRecordWriter(str(beside), "group_size:1")  # one by one: read in any order
        for record in records:
            writer.write(json.dumps(record).encode())
        writer.close()
        os.replace(beside, path)
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"cannot write {path} ({reason}); make room or allow writing there"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def is_written(folder: Path, settings: Settings, shard: int) -> bool:
    """Whether a shard is there; UserError if it is damaged or not of these settings."""
    path = settings.path(folder, shard)
    if not path.exists():
        return False
    found = _read_settings(path)
    different = [
        field.name
        for field in dataclasses.fields(Settings)
        if getattr(found, field.name) != getattr(settings, field.name)
    ]
    if different:
        raise UserError(
            f"{path} was made with another {', '.join(different)}; choose another folder"
        )
    return True


class WrittenTexts(Examples):
    """The texts of a folder, by index; of its files those read last stay open."""

    def __init__(self, folder: str | Path) -> None:
        """Opens every shard.

        Raises UserError for a folder without texts, with some missing, damaged, or made
        differently.
        """
        self.folder = Path(folder)
        paths = sorted(self.folder.glob(f"texts-*{SUFFIX}"))
        if not paths:
            raise UserError(
                f"there are no texts in '{folder}' (texts-*{SUFFIX}); make some with "
                "experiments.generate"
            )
        self.settings = _read_settings(paths[0])
        shards = range(self.settings.shards)
        done = sum(is_written(self.folder, self.settings, shard) for shard in shards)
        if done < len(shards):
            raise UserError(
                f"'{folder}' has {done} of {len(shards)} files of texts; start "
                "experiments.generate again to write the rest"
            )
        self._reader = functools.lru_cache(OPEN_FILES)(
            lambda shard: _reader(self.settings.path(self.folder, shard))
        )

    def check(self, name: str, fingerprint: str) -> None:
        """Refuses texts of another `name`, "target" or "vocabulary", than that of a fingerprint."""
        theirs = getattr(self.settings, name)
        if theirs != fingerprint:
            raise UserError(
                f"the texts in '{self.folder}' were made with another {name} ({theirs[:12]}, this "
                f"one is {fingerprint[:12]}; their target was '{self.settings.target_path}'); "
                f"generate them again with this {name}"
            )

    def __len__(self) -> int:
        return self.settings.examples

    def take(self, indices: Sequence[int]) -> list[Any]:
        """The texts of some indices, `EncodedExample` each."""
        found = []
        for index in indices:
            shard, row = divmod(index, self.settings.shard_size)
            try:
                [record] = self._reader(shard).read([1 + row])
                found.append(EncodedExample(**json.loads(record)))
            except _DAMAGE as error:
                raise _damaged(self.settings.path(self.folder, shard), error) from None
        return found

    def where(self, index: int) -> str:
        shard, row = divmod(index, self.settings.shard_size)
        return f"text {row} of {self.settings.path(self.folder, shard)}"


def _reader(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), "readahead_buffer_size:0")


def _read_settings(path: Path) -> Settings:
    """Reads all of a file of texts, so that its checksums are compared."""
    try:
        return Settings(**json.loads(_reader(path).read_all()[0]))
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    for words, mend in _NO_DAMAGE.items():
        if words in str(error):
            return UserError(f"{path} cannot be read ({words.lower()}); {mend}")
    return UserError(
        f"{path} is no file of texts, or broken ({str(error)[:200]}); remove it and start "
        "experiments.generate again to write it anew"
    )
