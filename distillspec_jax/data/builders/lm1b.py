"""The One Billion Word benchmark (Chelba et al., arXiv 1312.3005), for decoder-only models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from distillspec_jax.data.builders.base import Files, FromFiles
from distillspec_jax.errors import UserError

PROMPT_WORDS = 5


class Lm1b(FromFiles):
    """One sentence a line; its first five words are the prompt, the rest is the target.

    Shorter sentences are left out. Both the published folders and plain `train.txt`,
    `validation.txt`, `test.txt` are found; the published test set is the first held-out file.
    """

    FILES: ClassVar[Files] = {
        "train": ["train.txt|training-monolingual*/news.en-*"],
        "validation": ["validation.txt|heldout-monolingual*/news.en.heldout-*[1-9]*-of-*"],
        "test": ["test.txt|heldout-monolingual*/news.en.heldout-00000-of-*"],
    }

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        for path in self.files(split):
            with path.open(encoding="utf-8", newline="\n") as lines:
                try:
                    for line in lines:
                        words = line.split()
                        if len(words) > PROMPT_WORDS:
                            yield " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])
                except UnicodeDecodeError as error:
                    raise UserError(f"'{path}' is not valid UTF-8") from error
