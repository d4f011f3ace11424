"""Spec-Bench (Xia et al., arXiv 2401.07851): prompts for measuring speculative decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.errors import UserError


class Specbench(FromFiles):
    """First turns only; split "test" has all of them, and each category is a split of its name.

    The target is the first reference where the file has one, else empty.
    """

    FILES: ClassVar[Files] = {"test": ["question.jsonl"]}

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        paths = super().sources(source_dir)["test"]
        categories = dict.fromkeys(category for category, _, _ in _rows(paths[0]))
        return {"test": paths, **{category: paths for category in categories}}

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        (path,) = self.files(split)
        for category, prompt, reference in _rows(path):
            if split in ("test", category):
                yield prompt, reference


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """The (category, prompt, reference) of every question."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            reference = (row.get("reference") or [""])[0]
            rows.append((str(row["category"]), str(row["turns"][0]), str(reference)))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number}: not a question of Spec-Bench") from error
    return rows
