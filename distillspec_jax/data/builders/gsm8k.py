"""GSM8K, grade-school mathematics with worked answers (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.data.jsonl import JsonlExamples

_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


class Gsm8k(FromFiles):
    """`question` and `answer` of the published files; the calculator's `<<...>>` are taken out.

    Answers end in `#### N`. T5's vocabulary has no line break: it reads one as a space.
    """

    FILES: ClassVar[Files] = {"train": ["train.jsonl"], "test": ["test.jsonl"]}

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for path in self.files(split):
            examples = JsonlExamples(path, input_field="question", target_field="answer")
            for question, answer in examples:
                yield question, _CALCULATOR_NOTE.sub("", answer)
