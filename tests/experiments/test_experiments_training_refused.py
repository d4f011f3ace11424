"""finetune and distill on bad input: one sentence, and nothing is written."""

import json

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig
from experiments.finetune import FinetuneConfig

ANSWERS = {"decode_prompts": 2, "loop__best_metric": "quality"}


def bad_line(folder, line):
    good = (folder / "train.jsonl").read_text().splitlines()
    path = folder / "bad.jsonl"
    path.write_text("\n".join([*good[:3], line, *good[3:]]) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["finetune", "distill"])
@pytest.mark.parametrize(
    ("line", "overrides", "words"),
    [
        ('{"input": "x", ', [], "bad.jsonl:4"),
        ('{"input": "x", "target": ""}', [], "bad.jsonl:4"),
        ('{"input": "x"}', [], "bad.jsonl:4"),
        ('{"input": "\\u200b", "target": "x"}', [], "bad.jsonl:4: the input has no piece"),
        ('{"input": "%s", "target": "x"}' % ("the " * 99), [], "bad.jsonl:4"),
        (
            '{"input": "x", "target": "%s"}' % ("the " * 99),
            ["--config.recipe.name=sft"],
            "bad.jsonl:4",
        ),
    ],
    ids=["broken", "empty", "missing", "no piece", "long input", "long target"],
)
def test_bad_lines_are_told_with_their_number(run, tmp_path, stories, kind, line, overrides, words):
    overrides = overrides if kind == "distill" else []
    refused(
        run(kind, *overrides, task__train_file=bad_line(tmp_path_of(stories, tmp_path), line)),
        words,
    )
    assert not (tmp_path / "run").exists()


def test_a_bad_line_of_the_validation_is_told_with_its_number(run, tmp_path, stories):
    path = bad_line(
        tmp_path_of(stories, tmp_path), '{"input": "%s", "target": "x"}' % ("the " * 99)
    )
    refused(run("distill", task__validation_file=path), "bad.jsonl:4")


def tmp_path_of(stories, tmp_path):
    (tmp_path / "train.jsonl").write_text((stories / "train.jsonl").read_text())
    return tmp_path


def refused(result, words):
    code, out, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert out == ""


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("finetune", {"task__train_file": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ("finetune", {"task__name": "jsonnl"}, "did you mean 'jsonl'"),
        ("finetune", {"train_split": "trian"}, "did you mean 'train'"),
        ("finetune", {"model": "cpu_targt"}, "did you mean 'cpu_target'"),
        ("finetune", {"model": "nowhere/run"}, "no model at 'nowhere/run'"),
        ("finetune", {"model": "FOREIGN"}, "have different vocabularies: fingerprint"),
        ("finetune", {"task__target_field": ""}, "no references to learn from"),
        ("finetune", {"optimizer__name": "adam"}, "did you mean 'adamw'"),
        ("finetune", {"steps": 0}, "config.steps is 0"),
        ("finetune", {"loss_chunk": -1}, "config.loss_chunk is -1, must be at least 0"),
        ("distill", {"recipe": {"eta": 1.0}}, "eta belongs to loss 'lk_hybrid'"),
        ("distill", {"length_bucket": 8}, "recipe 'distillspec' reads none"),
        ("finetune", {"micro_batches": 3}, "must divide the batch size 4"),
        ("finetune", {"average_decay": 1.0}, "config.average_decay is 1.0"),
        ("finetune", {"seed": -1}, "config.seed is -1, must be within 0 and 2**32 - 1"),
        ("distill", {"seed": 2**32}, "config.seed is 4294967296"),
        ("distill", {"target": "FOREIGN"}, "have different vocabularies: fingerprint"),
        ("distill", {"draft": "FOREIGN"}, "have different vocabularies: fingerprint"),
        ("distill", {"recipe": {"name": "distilspec"}}, "did you mean 'distillspec'"),
        ("distill", {"recipe": {"lambda1": 1.5}}, "must be within 0 and 1"),
        ("distill", {"recipe": {"beta": 1.0}}, "beta"),
        ("distill", {"recipe": {"name": "adaspec"}}, "needs config.reference"),
        ("distill", {"recipe": {"name": "sft"}, "task__target_field": ""}, "no references"),
        ("distill", {"decoder__gamma": 0}, "decoder.gamma is 0"),
        ("distill", {"loop__best_metric": "loss"}, "unknown metric 'loss' in config.loop.best_me"),
        ("distill", {"loop__best_metric": "block_efficiency_t0_ci95"}, "unknown metric 'block_eff"),
        ("finetune", {"loop__best_metric": "quality"}, "unknown metric 'quality'"),
        ("finetune", {"reduction": "mean"}, "unknown reduction 'mean' in config.reduction; known:"),
        ("finetune", {"decode_prompts": -1}, "config.decode_prompts is -1, must be at least 0"),
        ("finetune", ANSWERS | {"task__metric": "none"}, "task 'jsonl' has no metric to score"),
        ("finetune", {"validation_examples": 0}, "config.validation_examples is 0, must be at le"),
        ("distill", {"validation_examples": 5}, "unknown config key 'config.validation_examples'"),
        ("distill", {"reference": "stories-draft"}, "recipe 'distillspec' learns from all: leave"),
        (
            "distill",
            {"task__teacher_data": "x"},
            "have config.train_split name 'teacher', or leave",
        ),
        ("finetune", {"task__teacher_data": "x"}, "this run reads 'train', 'validation'"),
        ("finetune", {"train_split": "train[:50%]"}, "'train[:50%]' of task 'jsonl' is no part of"),
        ("distill", {"decoder__temperatures": ()}, "decoder.temperatures"),
        ("distill", {"decoder__temperatures": (0.0, 0.0, 1.0)}, "has 0 more than once; give each"),
        ("distill", {"decoder__temperatures": (0.1, 0.1 + 1e-9)}, "has 0.1 more than once"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, models, kind, changes, words):
    changes = {
        key: str(models / "foreign") if value == "FOREIGN" else value
        for key, value in changes.items()
    }
    refused(run(kind, **changes), words)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_checkpoint_is_refused(run, tmp_path, stories):
    refused(run("distill", draft=str(stories)), f"no model in '{stories}'")
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_shape_is_refused(run, models):
    changes = {"recipe": {"name": "adaspec"}, "reference": str(models / "target")}
    refused(run("distill", **changes), "must have the shape of the draft")


def test_another_run_in_the_workdir_is_refused_and_untouched(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"experiment": "finetune", "steps": 9}))
    (workdir / "metrics.jsonl").write_text("")
    code, _, err = run("distill")
    assert code == 2
    assert "holds a run of 'finetune', this is 'distill'" in err
    assert sorted(p.name for p in workdir.iterdir()) == ["config.json", "metrics.jsonl"]


def test_texts_of_a_teacher_may_be_a_part_or_validate():
    fields = dict(task=TaskConfig(teacher_data="x"), steps=1, batch_size=1, model="x")
    FinetuneConfig(**fields, train_split="teacher[:7]")
    FinetuneConfig(**fields, validation_split="teacher")


def test_a_run_that_was_begun_with_a_key_since_retired_goes_on(run, tmp_path):
    short = ("distill", "--config.steps=1", "--config.recipe.name=sft")
    assert run(*short)[0] is None
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"validation_examples": 8}))
    code, _, err = run(*short)
    assert code is None, err
    assert "validation_examples" not in json.loads(file.read_text())


@pytest.mark.parametrize("every", [0, 3])
def test_broken_weights_are_told_before_the_first_step(run, tmp_path, models, every):
    model, params = zoo.load(models / "draft")
    broken = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), params)
    card = {"vocabulary_fingerprint": zoo.describe(models / "draft")["vocabulary_fingerprint"]}
    zoo.save_native(model, broken, tmp_path / "broken", card, dtype="float32")
    code, out, err = run("finetune", model=str(tmp_path / "broken"), loop__evaluate_every=every)
    assert code == 2
    assert "gave NaN logits; its weights are broken (NaN or far too large)" in err
    assert "step 0" not in out + err
