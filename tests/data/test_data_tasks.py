"""Tasks: what a config resolves to, and what it is refused for."""

import dataclasses

import pytest

from distillspec_jax.data import tasks
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation import quality


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "ab", "a": "c"}\n{"q": "d", "a": "ef"}\n')
    return TaskConfig(
        name="jsonl",
        vocabulary="bytes",
        train_file=str(path),
        input_field="q",
        target_field="a",
        input_length=5,
        target_length=4,
    )


def test_stories_are_the_default():
    task = load_task(TaskConfig())
    assert task.splits == ("train", "validation", "tuning", "test", "pretrain")
    assert (task.metric, task.input_length, task.target_length) == ("exact_match_number", 40, 56)
    assert not task.input_eos
    assert len(task.examples("train")) == 3_000
    batch = next(task.batches("train", batch_size=2, seed=0))
    assert (batch.inputs.shape, batch.targets.shape) == ((2, 40), (2, 56))
    example = task.examples("train")[int(batch.example_ids[1])]
    assert task.vocabulary.decode(batch.inputs[1]) == example.input
    assert task.vocabulary.decode(batch.targets[1]) == example.target


@pytest.mark.parametrize("field", ["input_length", "target_length"])
def test_lengths_below_1_are_refused(own, field):
    with pytest.raises(UserError, match=rf"task.{field} is -1, must be at least 1, or 0 for the t"):
        dataclasses.replace(own, **{field: -1})


@pytest.mark.parametrize(
    ("part", "inputs"), [("train[:1]", ["ab"]), ("train[1:]", ["d"]), ("train[-2:-1]", ["ab"])]
)
def test_a_split_can_be_taken_in_part(own, part, inputs):
    assert [example.input for example in load_task(own).examples(part)] == inputs


@pytest.mark.parametrize("part", ["train[2:]", "train[:0]", "train[-9:-5]"])
def test_an_empty_part_of_a_split_is_refused(own, part):
    with pytest.raises(UserError, match=r"the part 'train\[.*\]' of .* is empty: 'train' has 2 "):
        load_task(own).examples(part)


@pytest.mark.parametrize("part", ["train[-:]", "train[:-]", "train[:50%]", "train[1]", "train[:1"])
def test_a_part_that_is_no_range_of_whole_numbers_is_refused(own, part):
    with pytest.raises(UserError, match=r"no part of one: write NAME\[a:b\] with whole numbers"):
        load_task(own).examples(part)


def test_the_name_before_a_part_is_looked_for(own):
    with pytest.raises(UserError, match=r"unknown split 'trian' in .* did you mean 'train'"):
        load_task(own).examples("trian[:1]")


def test_own_files(own):
    task = load_task(own)
    assert (task.splits, task.metric) == (("train",), "none")
    (batch,) = task.eval_batches("train", batch_size=2)
    assert batch.inputs.tolist() == [[100, 101, 1, 0, 0], [103, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [[102, 1, 0, 0], [104, 105, 1, 0]]


def test_inputs_end_as_the_models_were_trained(own):
    def ends(**changes):
        task = load_task(TaskConfig(**{**vars(own), **changes}))
        return task.input_eos

    assert ends()
    assert not ends(input_eos=False)
    assert not ends(vocabulary="arithmetic_stories")
    assert ends(vocabulary="arithmetic_stories", input_eos=True)


def test_every_metric_that_is_scored_can_be_asked_for(own):
    assert set(quality.METRICS) | {"none"} == set(tasks.METRICS)
    assert load_task(dataclasses.replace(own, metric="rougeL")).metric == "rougeL"


def test_first_examples_alone(own):
    task = load_task(own)
    (batch,) = task.eval_batches("train", batch_size=3, count=1)
    assert batch.example_ids.tolist() == [0, -1, -1]
    with pytest.raises(UserError, match="count is -1; it must be an integer of at least 1"):
        task.eval_batches("train", batch_size=3, count=-1)


def test_prefix_and_its_default(tmp_path, own):
    assert load_task(own).examples("train")[0].input == "ab"
    task = load_task(TaskConfig(**{**vars(own), "prefix": "x: "}))
    assert task.examples("train")[0].input == "x: ab"
    (tmp_path / "src-test.txt").write_text("Yes .\n")
    config = TaskConfig(name="wmt14_ende", vocabulary="bytes", source_dir=str(tmp_path))
    assert load_task(config).examples("test")[0].input == "translate English to German: Yes."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "arithmetic_storys"}, "did you mean 'arithmetic_stories'"),
        ({"metric": "rouge3"}, "did you mean 'rouge"),
        ({"name": "jsonl"}, "task 'jsonl' has no vocabulary of its own"),
        (
            {"name": "jsonl", "vocabulary": "bytes"},
            "needs train_file, validation_file or test_file",
        ),
        (
            {"name": "jsonl", "vocabulary": "bytes", "test_file": "gone.jsonl"},
            "test_file 'gone.jsonl' does not exist",
        ),
        ({"name": "gsm8k", "vocabulary": "bytes"}, "needs source_dir"),
        ({"vocabulary": "gone.model"}, "'gone.model' is neither a file"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_task(TaskConfig(**changes))


def test_unknown_splits_are_refused():
    with pytest.raises(UserError, match=r"unknown split 'valid' in task .*'validation'"):
        load_task(TaskConfig()).examples("valid")


def test_evaluation_data_cannot_be_trained_on(tmp_path):
    (tmp_path / "snarks.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    task = load_task(TaskConfig(name="bbh", vocabulary="bytes", source_dir=str(tmp_path)))
    assert len(list(task.eval_batches("snarks", batch_size=1))) == 1
    with pytest.raises(UserError, match="'bbh' is for evaluation only"):
        task.batches("test", batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("name", "splits", "sizes"),
    [
        ("gsm8k", ("train", "test"), (7_473, 1_319)),
        ("wmt14_ende", ("train", "validation", "test"), (10_000, 3_000, 2_737)),
        ("bbh", ("test", "snarks"), (6_511, 178)),
        ("specbench", ("test", "rag"), (480, 80)),
    ],
)
def test_real_data_go_through(shared_data, name, splits, sizes):
    """Every example is read, and fits the task's own lengths untruncated."""
    vocabulary = str(shared_data / "t5_sentencepiece/spiece.model")
    task = load_task(
        TaskConfig(name=name, vocabulary=vocabulary, source_dir=str(shared_data / name))
    )
    for split, size in zip(splits, sizes, strict=True):
        examples = task.examples(split)
        assert len(examples) == size
        batches = list(task.eval_batches(split, batch_size=500))
        assert sum((batch.example_ids >= 0).sum() for batch in batches) == size
        assert batches[0].inputs.shape == (500, task.input_length)
