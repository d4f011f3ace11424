"""Stories: right arithmetic, promised lengths, splits apart, and the very same ones for ever."""

import collections
import hashlib
import re
import zlib

import pytest

from distillspec_jax.data import annotators
from distillspec_jax.data.problems import MAX_NUMBER, Draw, problem
from distillspec_jax.data.stories import (
    MAX_ANSWER_TOKENS,
    MAX_QUESTION_TOKENS,
    SPLIT_SIZES,
    story,
    words,
)
from distillspec_jax.data.vocabulary import load_vocabulary

# Of the first 500 stories of each split. The models in the package were trained on exactly these:
# if a digest changes, those models, their cards and every published figure belong to other data.
DIGESTS = {
    "train": "cd58d93daf4ed8e1",
    "pretrain": "ec21954343357ef4",
    "validation": "22d78e391782e227",
    "tuning": "c7d5dd0cf4b225b1",
    "test": "7f09d7508e21eb77",
}
WRITTEN = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TOLD = re.compile(r"(add|take|subtract|multiply|divide) (\d+) (?:to|from|by) (\d+) \D+(\d+)\.")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "add": lambda a, b: b + a,
    "take": lambda a, b: b - a,
    "subtract": lambda a, b: b - a,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
}


def steps_of(answer):
    """(operation, left, right, result) of each line of an answer, whoever wrote it."""
    told = [(op, int(a), int(b), int(r)) for op, a, b, r in TOLD.findall(answer)]
    written = [(op, int(a), int(b), int(r)) for a, op, b, r in WRITTEN.findall(answer)]
    return told + written


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_stories_never_change(split):
    texts = ["\0".join(story(split, index)) for index in range(500)]
    assert hashlib.sha256("\1".join(texts).encode()).hexdigest()[:16] == DIGESTS[split]


def test_every_line_of_arithmetic_is_right_and_the_last_is_the_answer():
    for index in range(3_000):
        _, answer = story("pretrain", index)
        steps = steps_of(answer)
        assert 2 <= len(steps) <= 4, answer
        for op, left, right, result in steps:
            assert OPERATIONS[op](left, right) == result, answer
            assert 0 < result <= MAX_NUMBER, answer
        assert answer.endswith(f" #### {steps[-1][-1]}")


def test_answers_use_numbers_of_the_question_or_found_before():
    """An answer can be derived: no number falls from the sky but the 2 of `twice` and `half`."""
    for index in range(3_000):
        question, answer = story("pretrain", index)
        known = {int(number) for number in re.findall(r"\d+", question)}
        if re.search("twice|half|doubles|as many again", question):
            known.add(2)
        for _, left, right, result in steps_of(answer):
            assert {left, right} <= known, (question, answer)
            known.add(result)


def test_all_given_numbers_are_needed():
    """A question gives no number that its answer leaves out, so that steps are not forgotten."""
    for index in range(3_000):
        question, answer = story("pretrain", index)
        used = {number for step in steps_of(answer) for number in step[1:]}
        assert {int(number) for number in re.findall(r"\d+", question)} <= used, question


def test_lengths_are_as_promised():
    vocabulary = load_vocabulary("arithmetic_stories")
    lengths = []
    for index in range(3_000):
        question, answer = story("pretrain", index)
        assert len(vocabulary.encode(question)) == len(words(question)) <= MAX_QUESTION_TOKENS
        assert len(vocabulary.encode(answer)) == len(words(answer)) <= MAX_ANSWER_TOKENS
        lengths.append(len(words(answer)) + 1)
    assert 28 < sum(lengths) / len(lengths) < 34
    assert max(lengths) > 50  # the promised bound is not far away


def test_splits_share_no_question():
    seen = {}
    for split, size in SPLIT_SIZES.items():
        for index in range(min(size, 10_000)):
            question, _ = story(split, index)
            assert seen.setdefault(question, split) == split, question


def test_splits_own_checksums():
    """Why they cannot: no checksum bucket serves two splits."""
    owners = collections.defaultdict(set)
    for split in SPLIT_SIZES:
        for index in range(500):
            owners[zlib.crc32(story(split, index)[0].encode()) % 16].add(split)
    assert len(owners) == 16
    assert all(len(splits) == 1 for splits in owners.values()), owners


def test_stories_hardly_repeat():
    questions = {story("test", index)[0] for index in range(SPLIT_SIZES["test"])}
    assert len(questions) >= SPLIT_SIZES["test"] - 5


def test_a_story_does_not_depend_on_those_before():
    forward = [story("tuning", index) for index in range(20)]
    backward = [story("tuning", index) for index in reversed(range(20))]
    assert forward == backward[::-1]


def test_the_annotator_can_be_guessed_but_not_known():
    """P(annotator's own way of asking) = f + (1 - f) / 5; 5 standard deviations of 4,000 draws."""
    expected = annotators.FAITHFULNESS + (1 - annotators.FAITHFULNESS) / 5
    starts = ("How many", "Find", "Tell me", "Can you", "Work out")
    hits = 0
    for seed in range(4_000):
        draw = Draw(seed)
        question, annotator = annotators.ask(draw, problem(draw))
        hits += question.split(". ")[-1].startswith(starts[annotator])
    deviation = (expected * (1 - expected) / 4_000) ** 0.5
    assert abs(hits / 4_000 - expected) < 5 * deviation


def test_each_annotator_has_a_choice_of_words():
    for annotator in range(5):
        drawn = problem(Draw(7))
        answers = {annotators.answer(Draw(seed), drawn, annotator) for seed in range(50)}
        assert len(answers) >= 6, answers


def test_draws_are_those_of_every_python():
    """The first draws of a seed, fixed: the generator is part of the data set."""
    draw = Draw(11)
    drawn = [draw.between(1, 9), draw.pick("abcde"), draw.two("xyz"), draw.swap((0, 1))]
    assert drawn == [5, "c", ("z", "x"), (0, 1)]
