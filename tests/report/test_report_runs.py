"""Reading runs: found where they are, models and broken files told apart."""

import json

import pytest

from distillspec_jax.distill.recipes import LOSSES, Recipe
from distillspec_jax.errors import UserError
from distillspec_jax.report.runs import Run, find_runs


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


def test_an_unfinished_run_has_no_summary(runs_folder, capsys):
    (runs_folder / "control" / "summary.json").unlink()
    assert find_runs(runs_folder)[1].summary == {}
    assert capsys.readouterr().err == ""  # its losses can be drawn


def test_runs_with_nothing_to_draw_are_named(runs_folder, capsys):
    for name, experiment in (("decoded", "decode"), ("killed", "evaluate")):
        (runs_folder / name).mkdir()
        (runs_folder / name / "config.json").write_text(json.dumps({"experiment": experiment}))
    (runs_folder / "decoded" / "summary.json").write_text('{"seed": 0}')
    assert [run.name for run in find_runs(runs_folder)][2:] == ["decoded", "distilled", "killed"]
    assert capsys.readouterr().err.splitlines() == [
        "warning: decoded (experiments.decode): nothing to draw",
        "warning: killed (experiments.evaluate): unfinished: no summary.json yet",
    ]


def test_linked_runs_are_found_each_once(runs_folder, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    (runs_folder / "control").rename(elsewhere)
    (runs_folder / "a link to it").symlink_to(elsewhere)
    (runs_folder / "a second").symlink_to(elsewhere)
    (runs_folder / "a third").symlink_to(runs_folder / "distilled")  # which has its own name
    (runs_folder / "distilled" / "up").symlink_to(runs_folder)
    (runs_folder / "dangling").symlink_to(tmp_path / "nowhere")
    names = [run.name for run in find_runs(runs_folder)]
    assert names == ["quickstart", "a link to it", "distilled"]
    assert capsys.readouterr().err == ""


def warning_without(skipped, folder, capsys):
    """The one warning of a report on all runs but the `skipped` one."""
    whole = {"quickstart", "control", "distilled"} - {skipped}
    assert {run.name for run in find_runs(folder)} == whole
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert warning.endswith("; skipped")
    return warning


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"experiment": ', "is not valid JSON ("),
        (b'{"experiment": "\xff"}', "is not UTF-8 text: invalid start byte"),
        (b'{"seed": ' + b"[" * 100_000, "is not valid JSON (nested too deeply)"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "is not valid JSON (a number is too long)"),
    ],
)
def test_a_run_with_a_broken_file_is_skipped(runs_folder, capsys, name, content, words):
    (runs_folder / "control" / name).write_bytes(content)
    assert f"control/{name} {words}" in warning_without("control", runs_folder, capsys)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"step": 1}\n{"step": \n', ", line 2 is not valid JSON ("),
        ("[1, 2]\n", ", line 1 is not a JSON object"),
        ('{"step": "\xff"}\n', " is not UTF-8 text: invalid start byte"),
        ('{"kind": "train", "loss": 1}\n', ", line 1 has a record of 'train' without 'step'"),
        (
            '{"kind": "eval", "step": null}\n',
            ", line 1 has a record of 'eval' whose 'step' is null",
        ),
        ('{"kind": "train", "step": 1, "loss": "x"}\n', "of 'train' whose 'loss' is \"x\""),
        ('{"kind": "train", "step": 1, "loss": 1%s}\n' % ("0" * 400), "whose 'loss' is 10000"),
        ('{"kind": "curve"}\n', ", line 1 has a record of 'curve' without 'name'"),
        ('{"kind": "curve", "name": 3}\n', "of 'curve' whose 'name' is 3"),
    ],
)
def test_a_run_with_a_broken_line_is_skipped(runs_folder, capsys, lines, words):
    metrics = runs_folder / "control" / "metrics.jsonl"
    metrics.write_text(lines, "latin-1")
    warning = warning_without("control", runs_folder, capsys)
    assert f"{metrics}, line " in warning or f"{metrics} is not UTF-8" in warning
    assert words in warning


def test_a_run_whose_metrics_are_a_folder_is_skipped(runs_folder, capsys):
    metrics = runs_folder / "control" / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    warning = warning_without("control", runs_folder, capsys)
    assert f"{metrics} cannot be read: Is a directory" in warning


def test_broken_runs_alone_are_an_error(runs_folder, capsys):
    (runs_folder / "control" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="holds no run that can be read"):
        find_runs(runs_folder / "control")
    assert "control/summary.json is not valid JSON" in capsys.readouterr().err


def test_a_last_line_cut_short_is_skipped_and_told_once(runs_folder, capsys):
    metrics = runs_folder / "control" / "metrics.jsonl"
    whole = find_runs(runs_folder)[1].records
    metrics.write_text(metrics.read_text()[:-20])
    assert find_runs(runs_folder)[1].records == whole[:-1]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert f"the last line of {metrics} is unfinished" in warnings[0]


def test_a_whole_last_line_counts_without_a_line_break(runs_folder, capsys):
    metrics = runs_folder / "control" / "metrics.jsonl"
    whole = find_runs(runs_folder)[1].records
    metrics.write_text(metrics.read_text().rstrip("\n"))
    assert find_runs(runs_folder)[1].records == whole
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"// not JSON", b"\xff\xfe{", b"[1]"])
def test_a_config_that_is_no_run_s_is_skipped_with_a_word(runs_folder, capsys, content):
    (runs_folder / "hub").mkdir()
    (runs_folder / "hub" / "config.json").write_bytes(content)
    (runs_folder / "other" / "config.json").mkdir(parents=True)  # a folder of that name
    assert [run.name for run in find_runs(runs_folder)] == ["quickstart", "control", "distilled"]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {runs_folder}/hub/config.json is not ")
    assert "skipped" in warning


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda summary: summary.pop("gains"), "no rows in 'gains'"),
        (lambda summary: summary.update(gains=None), "no rows in 'gains'"),
        (lambda summary: summary["pooled"].clear(), "no rows in 'pooled'"),
        (lambda summary: summary["pooled"].append(3), "a row in 'pooled' without 'name'"),
        (lambda summary: summary["pooled"][2].pop("seeds"), "a row in 'pooled' without 'seeds'"),
        (lambda summary: summary["gains"][0].pop("over"), "a row in 'gains' without 'over'"),
        (lambda summary: summary["gains"][1].update(gain=None), "whose 'gain' is null"),
        (lambda summary: summary["pooled"][1].update(seeds=0), "whose 'seeds' is 0"),
        (lambda summary: summary["pooled"][1].update(lossless=1), "whose 'lossless' is 1"),
    ],
)
def test_an_evaluation_without_its_rows_is_skipped(runs_folder, capsys, action, words):
    path = runs_folder / "summary.json"
    summary = json.loads(path.read_text())
    action(summary)
    path.write_text(json.dumps(summary))
    warning = warning_without("quickstart", runs_folder, capsys)
    assert words in warning
    assert str(path) in warning


@pytest.mark.parametrize("loss", LOSSES)
def test_the_kind_of_a_loss(loss):
    expected = "divergence" if Recipe(loss=loss).needs_target_scores else "likelihood"
    assert loss_kind(recipe={"name": "distillspec", "loss": loss}) == expected


def test_the_kind_of_a_fine_tuning():
    assert loss_kind(experiment="finetune") == "likelihood"


def loss_kind(**config):
    return Run("x", None, config, [], {}).loss_kind


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 7}))
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path)
