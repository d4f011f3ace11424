"""BIG-Bench Hard (Suzgun et al., arXiv 2210.09261): evaluation only, as its canary demands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.errors import UserError


class Bbh(FromFiles):
    """Split "test" is every task one after the other; each task is a split of its name as well."""

    FILES: ClassVar[Files] = {"test": ["*.json"]}

    @classmethod
    def sources(cls, source_dir: str) -> dict[str, list[Path]]:
        paths = super().sources(source_dir)["test"]
        return {"test": paths, **{path.stem: [path] for path in paths}}

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for path in self.files(split):
            try:
                examples = json.loads(path.read_text("utf-8"))["examples"]
                rows = [(str(row["input"]), str(row["target"])) for row in examples]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"'{path}' is not a BBH task: it needs a list `examples` with `input` and "
                    "`target`"
                ) from error
            yield from rows
