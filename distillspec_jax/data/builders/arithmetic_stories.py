"""The embedded data set: generated word problems, in five splits that share no question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from distillspec_jax.data import annotators, problems, stories
from distillspec_jax.data.builders.base import TextPairs


class ArithmeticStories(TextPairs):
    """Needs no file: example `i` of a split is `story(split, i)`."""

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "validation", "tuning", "test")

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        # The generator itself, so that data made by another version of it are not taken for its.
        generator = [Path(str(module.__file__)) for module in (problems, annotators, stories)]
        return {split: generator for split in cls.SPLITS}

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for index in range(stories.SPLIT_SIZES[split]):
            yield stories.story(split, index)


class ArithmeticStoriesPretrain(ArithmeticStories):
    """What the target has seen; apart, since who only distils need not wait for it."""

    SPLITS = ("pretrain",)
