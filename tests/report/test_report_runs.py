"""Reading runs: found where they are, models and broken files told apart."""

import json

import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.report.runs import find_runs


def test_runs_are_found_below_the_folder(runs_folder):
    # a checkpoint and an exported model have a config.json, but are no runs
    model = runs_folder / "distilled" / "checkpoints" / "100"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"d_model": 7}')
    runs = find_runs(runs_folder)
    assert [run.name for run in runs] == ["quickstart", "control", "distilled"]
    assert [run.is_training for run in runs] == [False, True, True]
    assert [run.is_evaluation for run in runs] == [True, False, False]
    assert runs[2].experiment == "distill"


def test_a_single_run_is_a_folder_of_runs_too(runs_folder):
    [run] = find_runs(runs_folder / "control")
    assert run.name == "control"


def test_series_leave_out_what_was_not_finite(runs_folder):
    metrics = runs_folder / "control" / "metrics.jsonl"
    metrics.write_text(
        '{"kind": "train", "step": 2, "loss": 0.5}\n'
        '{"kind": "train", "step": 4, "loss": null}\n\n'
        '{"kind": "eval", "step": 4, "loss": 9}\n'
        '{"kind": "train", "step": 6, "loss": 0.25}\n'
    )
    run = find_runs(runs_folder)[1]
    assert run.series("train", "loss") == ([2, 6], [0.5, 0.25])


def test_an_unfinished_run_has_no_summary(runs_folder):
    (runs_folder / "control" / "summary.json").unlink()
    assert find_runs(runs_folder)[1].summary == {}


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_broken_file_is_named(runs_folder, name):
    path = runs_folder / "control" / name
    path.write_text('{"experiment": ')
    with pytest.raises(UserError, match=f"control/{name} is not JSON"):
        find_runs(runs_folder)


def test_a_broken_line_is_named(runs_folder):
    metrics = runs_folder / "control" / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not JSON"):
        find_runs(runs_folder)
    metrics.write_text("[1, 2]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is not a JSON object"):
        find_runs(runs_folder)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 7}))
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path)
