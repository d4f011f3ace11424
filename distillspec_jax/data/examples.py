"""Examples: pairs of texts in a random-access sequence that can say where each one is from."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from distillspec_jax.errors import UserError

_TAKEN_AT_ONCE = 1_000
_DIGESTED = 256


class Example(NamedTuple):
    """One pair of texts; `target` is empty where there is no reference."""

    input: str
    target: str


class EncodedExample(NamedTuple):
    """The same in pieces, as a model read and wrote them: no end is added."""

    input: list[int]
    target: list[int]


class Examples(Sequence[Example]):
    """A split of a task; a slice of it is a view.

    Texts that a model wrote come as `EncodedExample`: only `pipeline` may read them.
    """

    @abc.abstractmethod
    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples of some indices within 0 and the length."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """Where an example is from, for messages."""

    @property
    def digest(self) -> str:
        """Hex sha256 of how many there are, and of up to 256 of them, from first to last."""
        indices = np.unique(np.linspace(0, len(self) - 1, _DIGESTED).astype(int)).tolist()
        taken = [[example.input, example.target] for example in self.take(indices)]
        return hashlib.sha256(json.dumps([len(self), taken]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _TAKEN_AT_ONCE):
            yield from self.take(range(start, min(start + _TAKEN_AT_ONCE, len(self))))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return _View(self, chosen)
        return self.take([chosen])[0]


class _View(Examples):
    """Some of the examples of a split."""

    def __init__(self, whole: Examples, chosen: range):
        self._whole, self._chosen = whole, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def take(self, indices: Sequence[int]) -> list[Example]:
        return self._whole.take([self._chosen[index] for index in indices])

    def where(self, index: int) -> str:
        return self._whole.where(self._chosen[index])


class BuiltExamples(Examples):
    """A split of a prepared TFDS data set."""

    def __init__(self, source: Any, name: str, prefix: str = ""):
        self._source, self._name, self._prefix = source, name, prefix

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Sequence[int]) -> list[Example]:
        if not indices:
            return []
        try:
            records = self._source.__getitems__(list(indices))  # ten times faster than one by one
            return [
                Example(self._prefix + record["input"].decode(), record["target"].decode())
                for record in records
            ]
        except Exception as error:  # whatever a damaged file makes its readers raise
            raise UserError(
                f"the prepared data of {self._name} are damaged ({str(error)[:200]}); remove them "
                "(below DISTILLSPEC_DATA, else ~/.cache/distillspec_jax/data): they are made anew"
            ) from error

    def where(self, index: int) -> str:
        return f"example {index} of {self._name}"


def take(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    """The examples of some indices, all at once where the sequence can."""
    if isinstance(examples, Examples):
        return examples.take(indices)
    return [examples[index] for index in indices]


def locate(examples: Sequence[Example], index: int) -> str:
    """Where an example is from, for messages."""
    return examples.where(index) if isinstance(examples, Examples) else f"example {index}"
