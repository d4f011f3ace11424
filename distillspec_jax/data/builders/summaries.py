"""CNN/DailyMail and XSum, from JSONL files with the field names that both are shared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.data.jsonl import JsonlExamples


class _Summaries(FromFiles):
    FILES: ClassVar[Files] = {
        split: [f"{split}.jsonl"] for split in ("train", "validation", "test")
    }
    INPUT_FIELD: ClassVar[str]
    TARGET_FIELD: ClassVar[str]

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for path in self.files(split):
            yield from JsonlExamples(
                path, input_field=self.INPUT_FIELD, target_field=self.TARGET_FIELD
            )


class CnnDailymail(_Summaries):
    """News articles and their highlights (See et al., arXiv 1704.04368)."""

    INPUT_FIELD = "article"
    TARGET_FIELD = "highlights"


class Xsum(_Summaries):
    """News articles and one-sentence summaries (Narayan et al., arXiv 1808.08745)."""

    INPUT_FIELD = "document"
    TARGET_FIELD = "summary"
