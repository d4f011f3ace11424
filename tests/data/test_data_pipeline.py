"""The pipeline by drawings: rows of small integers in, rows out; and the laws of its order."""

import itertools

import numpy as np
import pytest

from distillspec_jax.data import pipeline
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import EncodedExample, Example
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.data.vocabulary import Vocabulary
from distillspec_jax.errors import UserError


class Numbers(Vocabulary):
    """A text is its own list of ids: "3 5" is [3, 5]."""

    def __init__(self):
        super().__init__([str(number) for number in range(100)])

    def _encode(self, text):
        return [int(word) for word in text.split()]

    def _decode(self, ids):
        return " ".join(map(str, ids))


NUMBERS = Numbers()
FIVE = [
    Example("3 4", "5"),
    Example("6", "7 8"),
    Example("9 10 11", ""),
    Example("12", "13 14 15"),
    Example("16 17", "18"),
]
FIELDS = ("inputs", "targets", "example_ids")
LENGTHS = {"input_length": 3, "target_length": 4}


SHORT = {"input_length": 1, "target_length": 8, "batch_size": 6}


def many(count):
    """Example n is asked by n and answered by n % 7 + 1 numbers."""
    return [Example(str(10 + n % 90), " ".join(["5"] * (n % 7 + 1))) for n in range(count)]


def train(examples=FIVE, **settings):
    return pipeline.batches(examples, NUMBERS, **{"seed": 0, **LENGTHS, **settings})


def evaluate(examples=FIVE, **settings):
    return pipeline.eval_batches(examples, NUMBERS, **{**LENGTHS, **settings})


def first(batches, count):
    return list(itertools.islice(batches, count))


def ids_of(batches):
    return [batch.example_ids.tolist() for batch in batches]


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_drawing_in_order():
    one, two = first(train(batch_size=3, shuffle=False), 2)
    assert one.inputs.tolist() == [[3, 4, 0], [6, 0, 0], [9, 10, 11]]
    assert one.targets.tolist() == [[5, 1, 0, 0], [7, 8, 1, 0], [1, 0, 0, 0]]
    assert one.example_ids.tolist() == [0, 1, 2]
    assert two.inputs.tolist() == [[12, 0, 0], [16, 17, 0], [3, 4, 0]]  # the second pass begins
    assert two.targets.tolist() == [[13, 14, 15, 1], [18, 1, 0, 0], [5, 1, 0, 0]]
    assert {getattr(one, name).dtype for name in FIELDS} == {np.dtype("int32")}


def test_drawing_with_ends_on_inputs():
    batch = next(train(FIVE[:2], batch_size=2, shuffle=False, input_eos=True))
    assert batch.inputs.tolist() == [[3, 4, 1], [6, 1, 0]]


def test_drawing_truncated():
    batch = next(evaluate(FIVE[2:4], batch_size=2, truncate=True, input_length=2, target_length=3))
    assert batch.inputs.tolist() == [[9, 10], [12, 0]]
    assert batch.targets.tolist() == [[1, 0, 0], [13, 14, 1]]  # cut, but it still ends


def test_truncated_inputs_keep_their_end():
    batch = next(evaluate(FIVE[2:3], batch_size=1, truncate=True, input_eos=True))
    assert batch.inputs.tolist() == [[9, 10, 1]]


def test_a_written_text_is_cut_without_an_end_of_its_own():
    texts = [EncodedExample([9, 10, 11], [5, 6, 7, 8])]
    batch = next(evaluate(texts, batch_size=1, truncate=True, input_length=2, target_length=3))
    assert (batch.inputs.tolist(), batch.targets.tolist()) == ([[9, 10]], [[5, 6, 7]])


def test_drawing_of_an_evaluation():
    one, two = evaluate(batch_size=3)
    assert one.example_ids.tolist() == [0, 1, 2]
    assert two.inputs.tolist() == [[12, 0, 0], [16, 17, 0], [0, 0, 0]]
    assert two.targets.tolist() == [[13, 14, 15, 1], [18, 1, 0, 0], [0, 0, 0, 0]]
    assert two.example_ids.tolist() == [3, 4, -1]


def test_golden_order():
    """The order of seed 3. If it changes, resumed runs no longer see what they would have seen."""
    assert ids_of(first(train(batch_size=5, seed=3), 4)) == [
        [4, 1, 0, 2, 3],
        [2, 1, 3, 4, 0],
        [4, 0, 1, 2, 3],
        [2, 0, 3, 1, 4],
    ]


def test_every_pass_sees_each_example_once_in_an_order_of_its_own():
    passes = ids_of(first(train(many(23), **SHORT | {"batch_size": 23}), 5))
    assert all(sorted(one) == list(range(23)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5


@pytest.mark.parametrize("bucket", [0, 4])
def test_order_is_a_function_of_seed_and_step(bucket):
    def run(seed, start_step=0):
        batches = train(many(53), seed=seed, start_step=start_step, bucket=bucket, **SHORT)
        return first(batches, 40 - start_step)

    whole = run(5)
    assert all(map(same, whole, run(5)))
    assert not any(map(same, whole, run(6)))
    for step in (1, 15, 16, 17, 31, 39):
        assert all(map(same, run(5, step), whole[step:]))


@pytest.mark.parametrize("bucket", [0, 4])
def test_hosts_together_are_one_host(bucket):
    settings = {"seed": 5, "start_step": 2, "bucket": bucket, **SHORT}
    hosts = [train(many(53), process_index=n, process_count=3, **settings) for n in range(3)]
    for batch in first(train(many(53), **settings), 20):
        parts = [next(host) for host in hosts]
        assert [len(part.example_ids) for part in parts] == [2, 2, 2]
        assert same(batch, joined(parts))


def test_hosts_together_are_one_host_in_evaluation():
    whole = list(evaluate(many(13), **SHORT))
    hosts = [list(evaluate(many(13), process_index=n, process_count=2, **SHORT)) for n in range(2)]
    assert [len(host) for host in hosts] == [3, 3]
    assert all(same(batch, joined(parts)) for batch, *parts in zip(whole, *hosts, strict=True))


def joined(parts):
    return Batch(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


def test_buckets_lose_nothing_and_save_padding():
    examples = many(6 * pipeline.GROUP)
    plain = first(train(examples, **SHORT), pipeline.GROUP)
    bucketed = first(train(examples, bucket=3, **SHORT), pipeline.GROUP)
    rows = {
        index: target
        for batch in plain
        for index, target in zip(batch.example_ids.tolist(), batch.targets, strict=True)
    }
    widths = [batch.targets.shape[1] for batch in bucketed]
    for batch, width in zip(bucketed, widths, strict=True):
        assert width in (3, 6, 8)  # multiples of 3, or all of T
        for index, target in zip(batch.example_ids.tolist(), batch.targets, strict=True):
            assert np.array_equal(target, rows[index][:width])
            assert not rows[index][width:].any()
    assert sorted(itertools.chain(*ids_of(bucketed))) == list(range(len(examples)))
    assert sum(widths) < 0.8 * 8 * len(widths)
    assert widths != sorted(widths)  # lengths come mixed, not growing


def test_a_written_text_with_padding_in_its_middle_keeps_its_end():
    texts = [EncodedExample([9, 0, 10], [5, 0, 0, 6])] * pipeline.GROUP
    batch = next(train(texts, batch_size=1, bucket=1))
    assert batch.targets.tolist() == [[5, 0, 0, 6]]
    assert pipeline.trimmed(batch.inputs, 1).tolist() == [[9, 0, 10]]


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize(("input_length", "target_length"), [(2, 4), (3, 3), (2, 3)])
def test_over_long_examples_are_named(make, input_length, target_length, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"input": "3", "target": "4"}\n\n{"input": "9 10 11", "target": "5 6 7"}\n')
    examples = JsonlExamples(path)
    excess = []
    if input_length < 3:
        excess.append(f"3 input pieces, where input_length is {input_length}")
    if target_length < 4:
        excess.append(f"4 target pieces, where target_length is {target_length}")
    message = rf"long\.jsonl:3 is too long: {' and '.join(excess)}; raise"
    with pytest.raises(UserError, match=message):
        make(examples, batch_size=1, input_length=input_length, target_length=target_length)


def test_prompts_lose_the_columns_that_all_of_them_pad():
    inputs = np.zeros((2, 11), np.int32)
    inputs[0, :3], inputs[1, :5] = 7, 8
    np.testing.assert_array_equal(pipeline.trimmed(inputs, 4), inputs[:, :8])
    np.testing.assert_array_equal(pipeline.trimmed(inputs, 5), inputs[:, :5])
    np.testing.assert_array_equal(pipeline.trimmed(inputs, 16), inputs)
    empty = np.zeros((2, 11), np.int32)
    assert pipeline.trimmed(empty, 4).shape == (2, 4)  # no shape of its own for no piece at all


def test_over_long_examples_far_behind_are_found_when_drawn(monkeypatch):
    monkeypatch.setattr(pipeline, "CHECKED_AHEAD", 2)
    batches = train(batch_size=1, shuffle=False, target_length=3)
    first(batches, 3)
    with pytest.raises(UserError, match="example 3 is too long"):
        next(batches)


@pytest.mark.parametrize("make", [train, evaluate])
def test_bad_settings_are_refused(make):
    with pytest.raises(UserError, match="holds no examples"):
        make([], batch_size=1)
    with pytest.raises(UserError, match="multiple of the number of hosts, 2"):
        make(batch_size=3, process_count=2)
    with pytest.raises(UserError, match="batch_size is 0"):
        make(batch_size=0)


@pytest.mark.parametrize("make", [train, evaluate])
def test_settings_that_would_drop_examples_or_pieces_are_refused(make):
    with pytest.raises(UserError, match="process_index is 5, must be below the number of hosts, 2"):
        make(batch_size=2, process_index=5, process_count=2)
    with pytest.raises(UserError, match="process_index is -1; it must be an integer of at least 0"):
        make(batch_size=2, process_index=-1)
    with pytest.raises(UserError, match="process_count is 0; it must be an integer of at least 1"):
        make(batch_size=2, process_count=0)
    with pytest.raises(UserError, match=r"batch_size is 2\.0"):
        make(batch_size=2.0)


def test_a_bucket_or_a_first_step_below_zero_is_refused():
    with pytest.raises(UserError, match=r"bucket is -8; it must be 0 \(off\) or a positive int"):
        train(batch_size=2, bucket=-8)
    with pytest.raises(UserError, match="start_step is -1; it must be an integer of at least 0"):
        train(batch_size=2, start_step=-1)


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("empty", [Example(" ", "5"), EncodedExample([0], [5])])
def test_an_input_without_a_piece_is_named(make, truncate, empty):
    examples = [Example("3", "4"), empty]
    with pytest.raises(UserError, match="example 1: the input has no piece of the vocabulary"):
        next(make(examples, batch_size=2, truncate=truncate))


def test_an_end_of_sequence_is_a_piece_of_an_input():
    assert next(train([Example("", "5")], batch_size=1, input_eos=True)).inputs.any()
