"""Examples: pairs of texts in a random-access sequence that can say where each one is from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload


class Example(NamedTuple):
    """One pair of texts; `target` is empty where there is no reference."""

    input: str
    target: str


class BuiltExamples(Sequence[Example]):
    """A split of a prepared TFDS data set, as examples."""

    def __init__(self, source: Any, name: str, prefix: str = ""):
        self._source, self._name, self._prefix = source, name, prefix

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.take([index % len(self)])[0]

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples of some indices; reading many at once is ten times faster than each."""
        if not indices:
            return []
        records = self._source.__getitems__(list(indices))
        return [
            Example(self._prefix + record["input"].decode(), record["target"].decode())
            for record in records
        ]

    def where(self, index: int) -> str:
        return f"example {index} of {self._name}"


def take(examples: Sequence[Example], indices: Sequence[int]) -> list[Example]:
    """The examples of some indices, all at once where the sequence can."""
    if isinstance(examples, BuiltExamples):
        return examples.take(indices)
    return [examples[index] for index in indices]


def locate(examples: Sequence[Example], index: int) -> str:
    """Where an example is from, for messages."""
    where = getattr(examples, "where", None)
    return where(index) if where else f"example {index}"
