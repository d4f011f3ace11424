"""sweep: its cells learn what single runs learn, are kept, and are compared as they should be."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.distill.data_sources import source_probabilities
from distillspec_jax.distill.step import make_distill_step
from distillspec_jax.errors import UserError
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments import cells, sweep
from experiments.cell_tables import Results, markdown, summary
from experiments.cells import MAX_SKIPPED, Cell, Trained, Trainer
from experiments.models import Loaded
from experiments.sweep import FinetuneStage, SweepConfig
from experiments.watching import DecoderConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.01, schedule="cosine")
LENGTH, BATCH = 11, 4


@pytest.fixture(scope="module")
def task(stories):
    return load_task(
        TaskConfig(
            name="jsonl",
            vocabulary="arithmetic_stories",
            train_file=str(stories / "train.jsonl"),
            validation_file=str(stories / "validation.jsonl"),
            input_length=41,
            target_length=57,
        )
    )


@pytest.fixture(scope="module")
def pair(models):
    return [Loaded(name, *zoo.load(models / name)) for name in ("target", "draft")]


@pytest.fixture
def trainer(task, pair):
    target, draft = pair
    settings = {"batch_size": BATCH, "rollout_length": LENGTH, "beta": 0.3}
    return Trainer(task, target, draft.model, **settings)


@pytest.mark.parametrize("source", ["mixed", "teacher"])
def test_a_cell_is_a_run_of_the_distillation_step(source, trainer, task, pair):
    target, draft = pair
    for seed in (5, 6):  # the second one must not get the texts of the first
        cell = Cell("train", 4, "jsd", source, seed)
        trained = trainer.train(cell, draft.params, OPTIMIZER, lambda step: None)
        assert 0 <= trained.means["eos_rate"] < 0.5
        rule = make_optimizer(OPTIMIZER, 4)
        step = make_distill_step(
            draft.model, target.model, cell.recipe(0.3), rule, rollout_length=LENGTH
        )
        state = TrainState.create(draft.params, rule, seed=seed)
        batches = task.batches("train", batch_size=BATCH, seed=seed)
        for _ in range(4):
            state, _ = step(state, target.params, next(batches))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained.params, state.params
        )


def test_the_target_s_texts_are_written_once_for_all_losses(trainer, pair, monkeypatch):
    rollout, written = trainer._rollout("teacher"), []
    monkeypatch.setattr(
        trainer, "_rollout", lambda source: lambda *a: written.append(source) or rollout(*a)
    )
    for loss, steps in (("tvd", 2), ("nll", 3)):
        cell = Cell("train", steps, loss, "teacher")
        trainer.train(cell, pair[1].params, OPTIMIZER, lambda step: None)
    assert len(written) == 3


@pytest.fixture
def run(enter, tmp_path, stories, models):
    path = tmp_path / "sweep.py"

    def run(*overrides):
        task = {
            "name": "jsonl",
            "vocabulary": "arithmetic_stories",
            "train_file": str(stories / "train.jsonl"),
            "validation_file": str(stories / "validation.jsonl"),
            "input_length": 41,
            "target_length": 57,
        }
        decoder = {"num_prompts": 5, "batch_size": 3, "gamma": 3, "temperatures": (1.0,)}
        config = {
            "target": str(models / "target"),
            "draft": str(models / "draft"),
            "task": task,
            "divergences": ("tvd",),
            "sources": ("fixed",),
            "train_splits": ("train", "train[:6]"),
            "steps": (2,),
            "seeds": (0,),
            "batch_size": BATCH,
            "split": "validation",
            "decoder": decoder,
            "finetune": {"steps": 2},
        }
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({config!r})\n"
        )
        flags = (f"--config={path}", f"--workdir={tmp_path / 'run'}")
        return enter(sweep.main, SweepConfig, *flags, *overrides)

    return run


def test_what_is_done_is_kept_and_what_is_new_is_added(run, tmp_path, monkeypatch):
    trained = []
    real = Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, cell, *a: trained.append(cell.key) or real(self, cell, *a)
    )
    code, out, err = run()
    assert code is None, err
    first = ["control-0", "tvd-fixed-0"]
    expected = [f"{split}-2-{name}" for split in ("train", "train_to_6") for name in first]
    fine_tuned = ["train-2-control-0", "train_to_6-2-control-0"]  # the same recipe, before any cell
    assert sorted(trained) == sorted(expected + fine_tuned)
    files = {file: file.read_bytes() for file in (tmp_path / "run" / "cells").iterdir()}
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(found["cells"]) == 2 * 3
    assert found["num_prompts"] == 5
    assert found["best_cell_t1"]["name"] == "tvd-fixed"
    table = (tmp_path / "run" / "table.md").read_text()
    assert table in out
    assert "| tvd |" in table

    trained.clear()
    code, out, err = run("--config.seeds=(0,1)")
    assert code is None, err
    assert sorted(trained) == [key[:-1] + "1" for key in sorted(expected)]
    assert all(file.read_bytes() == content for file, content in files.items())
    assert "10 cells, 6 of them done" in out

    trained.clear()
    damaged = next(iter(files))
    damaged.write_text('{"name": "con')
    code, out, err = run("--config.seeds=(0,1)")
    assert code is None, err
    assert trained == [damaged.stem]
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {row["seeds"] for row in found["cells"] if row["steps"]} == {2}


def test_cells_of_other_data_are_trained_anew(run, tmp_path, stories, monkeypatch):
    begun, counts = [], np.ones((4, 5), int)

    def train(self, cell, params, *_):
        begun.append(cell.name)
        return Trained(params, 0, {})

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(sweep, "make_counts", lambda *_, **__: lambda *_: counts)
    lines = {name: (stories / f"{name}.jsonl").read_text() for name in ("train", "validation")}
    for name, text in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    overrides = [f"--config.task.{name}_file={tmp_path}/{name}.jsonl" for name in lines]
    overrides.append("--config.train_splits=('train',)")
    cells = ["control", "tvd-fixed"]
    changes = ((None, ["control", *cells]), (None, []), ("train", ["control", *cells]))
    for changed, expected in (*changes, ("validation", cells)):
        if changed:
            text = "".join(reversed(lines[changed].splitlines(keepends=True)))
            (tmp_path / f"{changed}.jsonl").write_text(text)
        code, _, err = run(*overrides)
        assert code is None, err
        assert begun == expected
        begun.clear()


def test_a_draft_whose_weights_changed_is_fine_tuned_anew(run, tmp_path, models, monkeypatch):
    begun, counts = [], np.ones((4, 5), int)

    def train(self, cell, params, *_):
        begun.append((cell.name, float(params["embedding"][0, 0])))
        return Trained(params, 0, {})

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(sweep, "make_counts", lambda *_, **__: lambda *_: counts)
    draft, (model, params) = tmp_path / "draft", zoo.load(models / "draft")
    card = {"vocabulary_fingerprint": load_vocabulary("arithmetic_stories").fingerprint}
    value = float(params["embedding"][0, 0])
    names = ["control", "control", "tvd-fixed"]  # the first is the start
    for factor, expected in ((1, names), (1, []), (2, names), (2, [])):
        shutil.rmtree(draft, ignore_errors=True)
        changed = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        zoo.save_native(model, changed, draft, card, dtype="float32")
        code, _, err = run(f"--config.draft={draft}", "--config.train_splits=('train',)")
        assert code is None, err
        assert begun == [(name, factor * value) for name in expected]
        begun.clear()


def test_a_cell_whose_samples_seldom_end_says_so(run, monkeypatch):
    rates = {"draft": {"eos_rate": 0.2}, "teacher": {"eos_rate": 0.5}, "fixed": {}}
    monkeypatch.setattr(
        Trainer, "train", lambda self, cell, params, *_: Trained(params, 0, rates[cell.source])
    )
    counts = np.ones((4, 5), int)
    monkeypatch.setattr(sweep, "make_counts", lambda *_, **__: lambda params, temperature: counts)
    code, _, err = run("--config.sources=('draft','teacher')", "--config.train_splits=('train',)")
    assert code is None, err
    lines = [line for line in err.splitlines() if ": block efficiency" in line]
    few = "; warning: only 20% of its samples ended by themselves; raise config.rollout_length or"
    assert [few in line for line in lines] == [False, False, True, False]
    assert "warning" not in lines[3]


def test_rows_pool_seeds_and_gains_are_paired(task):
    """Two prompts: tokens and calls by hand."""

    def counts(emitted, calls):
        return {"counts": {"0": [emitted, calls, [3, 1], [4, 4]]}, "train_seconds": 1.0}

    start, control = Cell("train", 0), Cell("train", 7)
    best = Cell("train", 7, "tvd", "draft")
    measured = {
        start: counts([8, 4], [4, 2]),
        control: counts([9, 6], [3, 3]),
        best: counts([10, 8], [2, 4]),
        dataclasses.replace(best, seed=1): counts([14, 4], [2, 4]),
        Cell("train", 9): counts([1, 1], [1, 1]),
    }
    rows = Results(DecoderConfig(gamma=7, temperatures=(0.0,)), task, measured).rows()
    by_name = {(row["name"], row["steps"]): row for row in rows}
    row = by_name["tvd-draft", 7]
    assert (row["seeds"], row["references"]) == (2, 13)
    assert row["block_efficiency"] == pytest.approx(36 / 12)
    assert row["acceptance_rate"] == pytest.approx(0.5)
    assert row["gain_over_finetuned"] == pytest.approx(3 / 2)
    assert row["gain_over_control"] == pytest.approx(3 / 2.5)
    low, high = row["gain_over_finetuned_ci95"]
    assert low < row["gain_over_finetuned"] < high
    assert by_name["control", 7]["gain_over_finetuned"] == pytest.approx(1.25)
    assert "gain_over_finetuned" not in by_name["finetuned", 0]

    found = summary(rows, DecoderConfig(gamma=7, temperatures=(0.0,)))
    assert found["best_cell_t0"] == {"name": "tvd-draft", "train_split": "train", "steps": 7}
    assert found["gain_over_control_t0"] == pytest.approx(1.2)
    assert "| tvd | 3.00 [" in markdown(rows)
    assert "fine-tuned 2.00 [" in markdown(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("on_policy",)}, "unknown source 'on_policy' in config.sources; known: "),
        ({"divergences": ("jds",)}, "unknown loss 'jds'.* did you mean 'jsd'"),
        ({"beta": 1.0}, "beta"),
        ({"seeds": (1, 1)}, "config.seeds has 1 more than once; give each"),
        ({"sources": ("fixed", "fixed")}, "config.sources has fixed more than once; give each"),
        ({"divergences": ()}, "config.divergences is empty, must have at least one"),
        ({"seeds": (0, -1)}, "config.seeds is -1, must be within 0"),
        ({"finetune": FinetuneStage(seed=2**32)}, "config.finetune.seed is 4294967296"),
        ({"steps": (0,)}, "config.steps is 0, must be at least 1"),
        ({"batch_size": 0}, "config.batch_size is 0, must be at least 1"),
        ({"task": TaskConfig(teacher_data="x")}, "have config.train_splits name 'teacher'"),
        ({"divergences": ("nll",), "sources": ("fixed",)}, "name nothing but the control"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(changes, message):
    with pytest.raises(UserError, match=message):
        SweepConfig(target="t", draft="d", **changes)


def test_what_the_sources_are():
    found = {
        name: list(source_probabilities(Cell("", 1, "tvd", name).recipe(0.5)).values())
        for name in cells.SOURCES
    }  # references, draft, target
    assert found == {
        "fixed": [1, 0, 0],
        "teacher": [0, 0, 1],
        "draft": [0, 1, 0],
        "mixed": [0.5, 0.5, 0],
    }


def test_names_of_files():
    cell = Cell("pretrain[:30000]", 500, "jsd", "draft", 2)
    assert cell.key == "pretrain_to_30000-500-jsd-draft-2"
    assert cells.slug("train") == "train"
    parts = ["train", "train[:3]", "train[3:]", "train[-3:]", "train[:-3]", "train[1:3]"]
    assert len({cells.slug(part) for part in parts}) == len(parts)


def test_likelihood_is_the_control_on_references_alone():
    config = SweepConfig(target="t", draft="d", divergences=("tvd", "nll"), seeds=(0,))
    names = [cell.name for cell in config.cells]
    assert names[0] == "control"
    assert {"nll-teacher", "nll-draft", "nll-mixed", "tvd-fixed"} < set(names)
    assert len(set(names)) == len(names) == 2 * 4


def test_a_grid_shows_the_control_as_likelihood_on_references(task):
    def counts(emitted):
        two_prompts = [[emitted] * 2, [2] * 2, [1] * 2, [2] * 2]
        return {"counts": {"0": two_prompts}, "train_seconds": 1.0}

    by = {"teacher": 8, "fixed": 6}
    measured = {
        Cell("train", 7, loss, source): counts(n)
        for loss in ("nll", "tvd")
        for source, n in by.items()
    }
    measured |= {Cell("train", 0): counts(4)}
    rows = Results(DecoderConfig(gamma=7, temperatures=(0.0,)), task, measured).rows()
    assert "| nll | 3.00 [3.00, 3.00] | 4.00 [4.00, 4.00] |" in markdown(rows)
    found = summary(rows, DecoderConfig(gamma=7, temperatures=(0.0,), num_prompts=500))
    assert found["best_cell_t0"]["name"] == "nll-teacher"
    assert found["num_prompts"] == 2


def test_steps_that_were_skipped_are_in_no_mean(trainer, pair, monkeypatch, tmp_path):
    """One gradient of three is not finite; the cell can be written down."""
    real, steps = trainer._update, []

    def broken(*settings):
        update = real(*settings)

        def call(state, target_params, batch):
            state, metrics = update(state, target_params, batch)
            steps.append(metrics["loss"])
            if len(steps) == 2:
                metrics = {**metrics, "loss": (jnp.float32(jnp.nan), jnp.float32(1))}
            return state, metrics

        return call

    monkeypatch.setattr(trainer, "_update", broken)
    trained = trainer.train(
        Cell("train", 3, "tvd", "fixed"), pair[1].params, OPTIMIZER, lambda step: None
    )
    kept = [steps[0], steps[2]]
    expected = sum(float(total) for total, _ in kept) / sum(float(count) for _, count in kept)
    assert trained.means["loss"] == pytest.approx(expected)


def test_a_cell_whose_gradients_are_not_finite_stops_early(trainer, pair, monkeypatch):
    real, taken = trainer._update, []

    def broken(*settings):
        update = real(*settings)

        def call(state, target_params, batch):
            taken.append(state.step)
            before = jnp.copy(state.skipped_in_row)
            state, metrics = update(state, target_params, batch)
            return state.replace(skipped_in_row=before + 1), metrics

        return call

    monkeypatch.setattr(trainer, "_update", broken)
    words = f"'train-50-tvd-fixed-0' was not finite in {MAX_SKIPPED} steps in a row, up to step 5"
    with pytest.raises(UserError, match=words):
        trainer.train(Cell("train", 50, "tvd", "fixed"), pair[1].params, OPTIMIZER, lambda _: None)
    assert len(taken) == MAX_SKIPPED + 1, "it is told while the next one runs"
    with pytest.raises(UserError, match="not finite in 2 steps in a row, up to step 2 of 2"):
        trainer.train(Cell("train", 2, "tvd", "fixed"), pair[1].params, OPTIMIZER, lambda _: None)


def test_a_control_needs_references(run):
    code, _, err = run("--config.task.target_field=")
    assert code == 2
    assert "the split 'train' of task 'jsonl' has no references to learn from" in err
