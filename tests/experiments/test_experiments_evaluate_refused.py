"""What evaluate refuses of its data and drafts, and which changed data it measures again."""

import dataclasses
import json
import shutil

import pytest

from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.errors import UserError
from experiments import evaluate, measuring
from experiments.bench import Draft, open_bench
from experiments.evaluate import DraftConfig, EvaluateConfig
from experiments.models import Loaded


@pytest.fixture
def folder(stories, tmp_path):
    """13 stories in `train.jsonl` and 7 in `validation.jsonl`, for a test to change."""
    return shutil.copytree(stories, tmp_path / "stories")


@pytest.fixture
def config(folder, models):
    return EvaluateConfig(
        target=str(models / "target"),
        drafts=(DraftConfig(name="a", path=str(models / "draft")),),
        task=TaskConfig(
            name="jsonl",
            vocabulary="arithmetic_stories",
            train_file=str(folder / "train.jsonl"),
            validation_file=str(folder / "validation.jsonl"),
        ),
        split="validation",
        tuning_split="train",
    )


def opened(config, **changes):
    changed = dataclasses.replace(config, **changes)
    return open_bench(changed, load_task(changed.task))


@pytest.mark.parametrize(
    ("split", "tuning_split", "changes", "shared"),
    [
        ("validation", "validation", {}, 7),
        ("validation", "validation[:2]", {}, 2),
        ("validation", "validation[2:]", {"num_prompts": 3}, 1),
        ("validation", "validation[3:]", {"num_prompts": 3}, 0),
        ("validation[:2]", "validation", {"num_tuning_prompts": 1}, 1),
        ("validation[2:]", "validation[:2]", {}, 0),
        ("validation", "validation", {"tune": False}, 0),
        ("validation", "validation", {"verification": "block"}, 0),  # for which nothing is tuned
    ],
)
def test_gamma_is_not_chosen_on_prompts_of_the_claim(config, split, tuning_split, changes, shared):
    changes = {"split": split, "tuning_split": tuning_split, "timed_prompts": 1, **changes}
    if not shared:
        opened(config, **changes)
        return
    with pytest.raises(UserError) as refused:
        opened(config, **changes)
    assert str(refused.value) == (
        f"config.tuning_split '{tuning_split}' would choose gamma on {shared} prompts that "
        f"config.split '{split}' measures; take another tuning_split, or say --config.tune=False"
    )


def test_prompts_are_the_same_by_where_they_are_from_not_by_their_text(config, folder):
    one_file = dataclasses.replace(config.task, train_file=config.task.validation_file)
    with pytest.raises(UserError, match="would choose gamma on 7 prompts"):
        opened(config, task=one_file)
    first = (folder / "validation.jsonl").read_text().splitlines()[0]
    with (folder / "train.jsonl").open("a") as file:
        file.write(first + "\n")
    bench = opened(config)
    assert bench.tuning_prompts.references[-1] == bench.prompts.references[0]


def test_seeds_of_one_name_have_one_shape(config, models):
    small, large = (str(models / name) for name in ("draft", "target"))
    drafts = DraftConfig(name="a", path=small), DraftConfig(name="a", path=large, seed=1)
    with pytest.raises(UserError) as refused:
        opened(config, drafts=drafts)
    assert str(refused.value) == (
        f"config.drafts has models of different shapes under the name 'a': '{small}' and "
        f"'{large}'; give each its own name"
    )
    [draft] = opened(config).drafts
    model = draft.loaded.model
    trained_otherwise = dataclasses.replace(model.config, name="b", dropout_rate=0.1)
    other = Draft(draft.config, Loaded("b", model.clone(config=trained_otherwise), {}))
    assert other.shape == draft.shape


def test_seeds_are_in_their_order_whatever_the_list_s(config, models):
    """So that a gain over another name pairs the same seeds."""
    path = str(models / "draft")
    names = ("a", 1), ("b", 0), ("a", 0), ("b", 1)
    drafts = tuple(DraftConfig(name=name, path=path, seed=seed) for name, seed in names)
    bench = opened(config, drafts=drafts)
    assert [[d.config.seed for d in bench.seeds(name)] for name in bench.names] == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        ("temperatures", (0.0, 0.5, 0.0), "0"),
        ("gammas", (7, 7), "7"),
        ("lenience", (1.0, 0.3, 0.3), "0.3"),
        ("gamma_grid", (5, 2, 5), "5"),
        ("timed_batch_sizes", (1, 1), "1"),
        ("temperatures", (0.1, 0.1 + 1e-9), "0.1"),  # rows and figures would have one name
    ],
)
def test_a_repeated_entry_is_refused(config, field, values, told):
    with pytest.raises(UserError, match=rf"^config\.{field} has {told} more than once; "):
        dataclasses.replace(config, **{field: values})
    with pytest.raises(UserError, match=rf"^config\.{field} is empty, must have"):
        dataclasses.replace(config, **{field: ()})


def test_changed_data_are_measured_again(config, folder, tmp_path, monkeypatch):
    row = {"name": "a", "temperature": 0.0, "gamma": 7, "lossless": True}
    measured = []

    def measure(bench):
        measured.append(bench.data())
        return measuring.Results(drafts=[], pooled=[row], gains=[], records=[])

    monkeypatch.setattr(measuring, "measure", measure)

    def measures():
        before = len(measured)
        evaluate.main(config, tmp_path / "run")
        return len(measured) > before

    def change(split, field):
        path = folder / f"{split}.jsonl"
        *others, last = path.read_text().splitlines()
        record = json.loads(last)
        record[field] = record[field].replace("a", "o", 1)
        path.write_text("\n".join([*others, json.dumps(record)]) + "\n")

    assert [measures(), measures()] == [True, False]
    for split, field in (("validation", "input"), ("validation", "target"), ("train", "input")):
        change(split, field)
        assert [measures(), measures()] == [True, False]
    prompts, tuning = ([data[key] for data in measured] for key in ("prompts", "tuning_prompts"))
    assert (len(set(prompts)), len(set(tuning))) == (3, 2)
    summary = tmp_path / "run" / "summary.json"
    older = json.loads(summary.read_text())  # as it was written before it told its data
    del older["data"]
    summary.write_text(json.dumps(older))
    assert [measures(), measures()] == [True, False]
