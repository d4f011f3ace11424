"""Spec-Bench (Xia et al., arXiv 2401.07851): prompts for measuring speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.data.jsonl import numbered_lines, read_record, read_text
from distillspec_jax.errors import UserError


class Specbench(FromFiles):
    """First turns only; split "test" has all of them, and each category is a split of its name.

    The target is the reference, or the first of several; empty where the file has none.
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
    for number, line in numbered_lines(path):
        if line.strip():
            record = read_record(path, number, line)
            turns, references = record.get("turns"), record.get("reference") or ""
            while isinstance(references, list):  # one question may have several, each a list
                references = references[0] if references else ""
            if not isinstance(turns, list) or not turns or not isinstance(references, str):
                raise UserError(
                    f"{path}:{number}: not a question of Spec-Bench: it needs `category`, a list "
                    "`turns`, and as `reference` a text, a list of texts or nothing"
                )
            category = read_text(path, number, record, "category")
            prompt = read_text(path, number, {"turns[0]": turns[0]}, "turns[0]")
            rows.append((category, prompt, references))
    return rows
