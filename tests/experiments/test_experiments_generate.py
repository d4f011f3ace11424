"""generate: what a target writes is kept whole, resumed exactly, and refused where it misleads."""

import json

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.data.written import WrittenTexts
from distillspec_jax.decoding import keys
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.errors import UserError
from distillspec_jax.models.fingerprint import fingerprint
from experiments import distill, generate, sweep
from experiments.distill import DistillConfig
from experiments.generate import GenerateConfig
from experiments.sweep import SweepConfig

LIMIT, SEED = 11, 4


@pytest.fixture
def task_fields(stories):
    return {
        "name": "jsonl",
        "vocabulary": "arithmetic_stories",
        "train_file": str(stories / "train.jsonl"),
        "validation_file": str(stories / "validation.jsonl"),
        "input_length": 41,
        "target_length": 57,
    }


@pytest.fixture
def run(enter, tmp_path, models, task_fields):
    def run(*overrides, workdir="texts", target="target"):
        config = {
            "target": str(models / target),
            "task": task_fields,
            "max_new_tokens": LIMIT,
            "batch_size": 5,
            "shard_size": 6,
            "samples": 2,
            "seed": SEED,
        }
        path = tmp_path / "generate.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({config!r})\n"
        )
        flags = (f"--config={path}", f"--workdir={tmp_path / workdir}")
        return enter(generate.main, GenerateConfig, *flags, *overrides)

    return run


def test_texts_are_the_target_s_and_keyed_by_their_number(run, tmp_path, models, task_fields):
    code, out, err = run()
    assert code is None, err
    assert "26 texts for 13 prompts" in out
    texts = WrittenTexts(tmp_path / "texts")
    assert len(texts) == 26
    assert len(list((tmp_path / "texts").glob("*.array_record"))) == 5
    model, params = zoo.load(models / "target")
    assert texts.settings.target == fingerprint(model, params)

    task = load_task(TaskConfig(**task_fields))
    [batch] = task.eval_batches("train", batch_size=13)
    assert keys.purpose_key(SEED, "generate") != jax.random.key(SEED)  # by which others decode
    for sample in range(2):
        output = autoregressive_sample(
            model,
            params,
            batch.inputs,
            keys.purpose_key(SEED, "generate"),
            max_new_tokens=LIMIT,
            row_ids=np.arange(13) + 13 * sample,
        )
        for i in range(13):
            text = texts[13 * sample + i]
            assert text.target == output.tokens[i, : output.lengths[i]].tolist()
            assert text.input == [piece for piece in batch.inputs[i].tolist() if piece]
    found = json.loads((tmp_path / "texts" / "summary.json").read_text())
    assert found["num_texts"] == 26
    ended = np.mean([text.target[-1:] == [task.vocabulary.eos_id] for text in texts])
    assert found["eos_rate"] == pytest.approx(ended)
    assert f"warning: only {ended:.0%} of the texts ended by themselves; raise" in out
    assert found["target_length"] == pytest.approx(np.mean([len(t.target) for t in texts]))


def test_metrics_have_a_record_for_each_file_whenever_it_was_written(run, tmp_path):
    assert run()[0] is None
    metrics = tmp_path / "texts" / "metrics.jsonl"
    before = metrics.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    assert [(r["file"], r["num_texts"]) for r in records] == [
        (0, 6),
        (1, 6),
        (2, 6),
        (3, 6),
        (4, 2),
    ]
    last = WrittenTexts(tmp_path / "texts").take(range(24, 26))
    assert records[-1]["target_length"] == np.mean([len(text.target) for text in last])
    (tmp_path / "texts" / "texts-00003-of-00005.array_record").unlink()
    assert run()[0] is None
    assert metrics.read_text() == before


def test_a_full_disk_is_told_and_leaves_no_part_of_a_file(run, tmp_path):
    assert run()[0] is None
    path = tmp_path / "texts" / "texts-00003-of-00005.array_record"
    path.unlink()
    beside = path.with_name(f".{path.name}.tmp")
    beside.symlink_to("/dev/full")
    code, _, err = run()
    assert code == 2
    words = f"error: cannot write {path} (write() failed: No space left on device); make room"
    assert words in err
    assert not path.exists()
    assert not beside.is_symlink()
    assert run()[0] is None


def test_a_file_that_is_missing_is_written_again_to_the_same_bits(run, tmp_path):
    assert run()[0] is None
    folder = tmp_path / "texts"
    before = {path.name: path.read_bytes() for path in folder.glob("*.array_record")}
    (folder / "texts-00003-of-00005.array_record").unlink()
    with pytest.raises(UserError, match=r"has 4 of 5 files of texts; start experiments.generate"):
        WrittenTexts(folder)
    code, out, _ = run("--config.batch_size=3")
    assert code is None
    assert "files: 5, 4 of them done" in out
    assert {path.name: path.read_bytes() for path in folder.glob("*.array_record")} == before


def test_a_file_that_is_damaged_is_not_taken_for_done(run, tmp_path):
    assert run()[0] is None
    path = tmp_path / "texts" / "texts-00003-of-00005.array_record"
    whole = path.read_bytes()
    used = [index for index, byte in enumerate(whole) if byte]  # the rest is padding
    middle = used[len(used) // 2]
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    code, _, err = run()
    assert code == 2
    assert f"error: {path} is no file of texts, or broken" in err
    path.unlink()
    assert run()[0] is None
    assert path.read_bytes() == whole


def test_the_split_teacher_gives_these_pieces(run, tmp_path, task_fields):
    assert run()[0] is None
    task = load_task(TaskConfig(**task_fields, teacher_data=str(tmp_path / "texts")))
    texts = WrittenTexts(tmp_path / "texts")
    [batch] = task.eval_batches("teacher[6:20]", batch_size=14)
    for row in range(14):
        length = len(texts[6 + row].target)
        assert batch.targets[row, :length].tolist() == texts[6 + row].target
        assert not batch.targets[row, length:].any()
    drawn = next(task.batches("teacher", batch_size=4, seed=1))
    assert [batch.targets.shape[1] for batch in (batch, drawn)] == [57, 57]
    for example, row in zip(drawn.example_ids, drawn.inputs, strict=True):
        assert row[row > 0].tolist() == texts[int(example)].input


def test_other_makers_are_refused(run, tmp_path, models, task_fields):
    assert run()[0] is None
    task = load_task(TaskConfig(**task_fields, teacher_data=str(tmp_path / "texts")))
    task.check_teacher(fingerprint(*zoo.load(models / "target")))
    with pytest.raises(UserError, match=r"were made with another target .*target'.*generate them"):
        task.check_teacher(fingerprint(*zoo.load(models / "draft")))
    fields = task_fields | {"vocabulary": "bytes", "teacher_data": str(tmp_path / "texts")}
    with pytest.raises(UserError, match="were made with another vocabulary"):
        load_task(TaskConfig(**fields))
    code, _, err = run("--config.seed=5")
    assert code == 2
    assert "seed is 4, yours is 5" in err

    with pytest.raises(UserError, match="no texts in"):
        WrittenTexts(tmp_path)
    (tmp_path / "texts" / "texts-00000-of-00005.array_record").write_bytes(b"no records")
    with pytest.raises(UserError, match="is no file of texts, or broken"):
        WrittenTexts(tmp_path / "texts")


def test_other_prompts_behind_the_same_path_are_refused(run, tmp_path, stories, monkeypatch):
    assert run()[0] is None
    (tmp_path / "texts" / "texts-00003-of-00005.array_record").unlink()
    lines = (stories / "train.jsonl").read_text()
    try:
        (stories / "train.jsonl").write_text("".join(sorted(lines.splitlines(keepends=True))))
        code, _, err = run()
    finally:
        (stories / "train.jsonl").write_text(lines)
    assert code == 2
    assert "texts-00000-of-00005.array_record was made with another data; choose" in err


def test_distill_refuses_texts_of_another_target(run, enter, config_file, tmp_path):
    assert run(target="draft")[0] is None
    path = config_file(
        "distill",
        recipe={"name": "sft"},
        train_split="teacher",
        task__teacher_data=str(tmp_path / "texts"),
    )
    workdir = tmp_path / "distilled"
    code, _, err = enter(distill.main, DistillConfig, f"--config={path}", f"--workdir={workdir}")
    assert code == 2
    assert "were made with another target" in err
    assert not workdir.exists()


def test_sweep_refuses_texts_of_another_target(run, enter, tmp_path, models, task_fields):
    assert run(target="draft")[0] is None
    config = {
        "target": str(models / "target"),
        "draft": str(models / "draft"),
        "task": task_fields | {"teacher_data": str(tmp_path / "texts")},
        "train_splits": ("teacher",),
    }
    path, workdir = tmp_path / "sweep.py", tmp_path / "swept"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    code, _, err = enter(sweep.main, SweepConfig, f"--config={path}", f"--workdir={workdir}")
    assert code == 2
    assert "were made with another target" in err
    assert not workdir.exists()


def test_other_weights_behind_the_same_path_are_refused(run, tmp_path, models, monkeypatch):
    assert run()[0] is None
    monkeypatch.setattr("experiments.models.fingerprint", lambda model, params: "ab" * 32)
    code, _, err = run()
    assert code == 2
    assert "was made with another target; choose another folder" in err
