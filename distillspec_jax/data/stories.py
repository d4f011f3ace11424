"""`arithmetic_stories`: word problems with worked answers, a pure function of (split, index).

A story is a problem (problems.py) written up by one of five annotators (annotators.py). The splits
cannot share a question, whatever the draws: a question belongs to the split whose bucket its
checksum falls in, and a draw that falls elsewhere is drawn again.
"""

from __future__ import annotations

import re
import zlib

from distillspec_jax.data import annotators
from distillspec_jax.data.problems import MAX_NUMBER, Draw, problem

SPLIT_SIZES = {
    "train": 3_000,
    "pretrain": 150_000,
    "validation": 500,
    "tuning": 1_000,
    "test": 2_000,
}
MAX_QUESTION_TOKENS = 40
MAX_ANSWER_TOKENS = 55  # the end of sequence makes it 56

_NUM_BUCKETS = 16
_BUCKETS = {
    "test": range(0, 1),
    "tuning": range(1, 2),
    "validation": range(2, 3),
    "train": range(3, 4),
    "pretrain": range(4, _NUM_BUCKETS),
}


def story(
    split: str, index: int, *, longest: tuple[int, int] = (MAX_QUESTION_TOKENS, MAX_ANSWER_TOKENS)
) -> tuple[str, str]:
    """Story number `index` of a split: (question, answer); the answer ends in `#### N`.

    Longer ones than `longest` allows, in words of question and answer, are drawn again.
    """
    buckets = _BUCKETS[split]
    draw = Draw((buckets.start << 40) + index)
    while True:
        drawn = problem(draw)
        question, annotator = annotators.ask(draw, drawn)
        if zlib.crc32(question.encode()) % _NUM_BUCKETS not in buckets:
            continue
        answer = annotators.answer(draw, drawn, annotator)
        lengths = len(words(question)), len(words(answer))
        small = all(step.result <= MAX_NUMBER for step in drawn.steps)
        if small and lengths[0] <= longest[0] and lengths[1] <= longest[1]:
            return question, answer


def words(text: str) -> list[str]:
    """A story's text as the packaged vocabulary cuts it: words, numbers and punctuation marks."""
    return re.findall(r"▁[^▁.,:?]+|[.,:?]", "▁" + text.replace(" ", "▁"))
