"""The embedded data set: generated word problems, in five splits that share no question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distillspec_jax.data.builders.base import TextPairs
from distillspec_jax.data.stories import SPLIT_SIZES, story


class ArithmeticStories(TextPairs, skip_registration=True):
    """Needs no file: example `i` of a split is `story(split, i)`."""

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        return {split: [] for split in SPLIT_SIZES}

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for index in range(SPLIT_SIZES[split]):
            yield story(split, index)
