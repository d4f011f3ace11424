"""WMT14 English to German, from line-aligned text that went through the Moses tokeniser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from sacremoses import MosesDetokenizer

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.data.jsonl import numbered_lines
from distillspec_jax.errors import UserError


class Wmt14Ende(FromFiles):
    """English `src-*` and German `tgt-*`; both sides are detokenised, entities unescaped.

    The test set may come without its German side; its targets are empty then.
    """

    FILES: ClassVar[Files] = {
        "train": ["src-train.txt", "tgt-train.txt"],
        "validation": ["src-val.txt", "tgt-val.txt"],
        "test": ["src-test.txt"],
    }

    @classmethod
    def code(cls) -> list[bytes]:
        return [*super().code(), metadata.version("sacremoses").encode()]

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        found = super().sources(source_dir)
        references = Path(source_dir) / "tgt-test.txt"
        if "test" in found and references.exists():
            found["test"].append(references)
        return found

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        source_path, *target_path = self.files(split)
        english = _lines(source_path)
        german = _lines(target_path[0]) if target_path else [""] * len(english)
        if len(english) != len(german):
            raise UserError(
                f"'{source_path}' has {len(english)} lines and '{target_path[0]}' has "
                f"{len(german)}; they must be aligned line by line"
            )
        clean_english, clean_german = detokenizer("en"), detokenizer("de")
        for source, target in zip(english, german, strict=True):
            yield clean_english(source), clean_german(target)


def detokenizer(language: str) -> Callable[[str], str]:
    """Undoes the Moses tokeniser for a line of text: `Guten Tag , Welt !` -> `Guten Tag, Welt!`."""
    moses = MosesDetokenizer(lang=language)
    return lambda line: moses.detokenize(line.split(), unescape=True)


def _lines(path: Path) -> list[str]:
    lines = [line.strip("\r") for _, line in numbered_lines(path)]
    return lines if lines[-1] else lines[:-1]  # nothing follows the last line's end
