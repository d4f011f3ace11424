"""Figures: names are shown as they are, each loss has an axis of its own, no colour twice."""

import dataclasses
import json
import math

import pytest
from matplotlib.colors import same_color

from distillspec_jax.report.figures import _run_colours, colours_of, figures_of, render, training
from distillspec_jax.report.runs import Run, find_runs


def run_of(name, loss=0.5, **config):
    records = [{"kind": "train", "step": step, "loss": loss} for step in (1, 2)]
    return Run(name, None, config, records, {})


@pytest.mark.parametrize("name", [r"$\frac$", "_control", "_$a", r"a\$b$"])
def test_names_that_matplotlib_would_read_are_shown_as_they_are(runs_folder, name):
    """A pair of `$` is a formula to it, a broken one an error; a label with a `_` is hidden."""
    for path in (runs_folder / "summary.json", runs_folder / "metrics.jsonl"):
        path.write_text(path.read_text().replace('"control"', json.dumps(name)))
    (runs_folder / "control").rename(runs_folder / name)
    for figure_name, (_, figure) in figures_of(find_runs(runs_folder)).items():
        drawn = render(figure, "svg").decode()  # letters are paths, each text beside its own
        assert f"<!-- {name} -->" in drawn or f"<!--  {name} -->" in drawn, figure_name


def test_each_kind_of_loss_has_a_panel_of_its_own():
    runs = [
        run_of("draft", 7.0),
        run_of("control", 6.0, recipe={"name": "sft", "loss": "nll"}),
        run_of("distilled", 0.02, recipe={"name": "distillspec", "loss": "jsd"}),
    ]
    figure = training(runs)
    assert {panel.get_title(): drawn_in(panel) for panel in figure.axes} == {
        "training loss, likelihood": {"draft", "control"},
        "training loss, divergence": {"distilled"},
    }
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"draft", "control", "distilled"}


def test_runs_of_one_kind_have_one_panel_of_their_loss():
    assert len(training([run_of("a"), run_of("b")]).axes) == 1


def test_four_panels_stand_in_two_rows(runs_folder):
    figure = figures_of(find_runs(runs_folder))["training"][1]
    places = [panel.get_subplotspec() for panel in figure.axes]
    assert [(each.rowspan.start, each.colspan.start) for each in places] == [
        *((0, 0), (0, 1), (1, 0), (1, 1)),
    ]
    assert [drawn_in(panel) for panel in figure.axes] == [
        *({"control"}, {"distilled"}, {"control", "distilled"}, {"control", "distilled"}),
    ]


def test_no_empty_panel_fills_the_last_row():
    watched = {f"block_efficiency_t{t}": 4.0 for t in (0, 0.5, 1)}
    run = run_of("distilled", recipe={"name": "distillspec", "loss": "jsd"})
    run.records.append({"kind": "eval", "step": 1, **watched})
    assert len(training([run, run_of("draft")]).axes) == 5  # in two rows of three


@pytest.mark.parametrize("count", [3, 5, 12])
def test_long_names_of_drafts_do_not_touch(quickstart, count):
    names = [f"a-draft-of-25-letters-{i:03}" for i in range(count)]
    run = find_runs(quickstart)[0]
    rows = [row for row in run.summary["pooled"] if row["name"] == "control"]
    curves = [row for row in run.of_kind("curve") if row["name"] == "control"]
    summary = run.summary | {"pooled": [row | {"name": name} for name in names for row in rows]}
    curves = [row | {"name": name} for name in names for row in curves]
    run = dataclasses.replace(run, summary=summary, records=curves)
    drawn = figures_of([run])
    for _, figure in drawn.values():
        figure.draw_without_rendering()
        whole = figure.bbox.padded(1)
        for legend in figure.legends:
            assert whole.containsx(legend.get_window_extent().x0)
        for panel in figure.axes:
            box = panel.get_window_extent()
            assert box.width > 2 * figure.dpi  # names leave room for what they name
            assert box.height > 1.8 * figure.dpi
    assert distance_of_ticks(drawn["block_efficiency"][1]) > 9 / 72  # inches, a line of text


def test_a_long_name_of_a_run_is_shown_whole():
    figure = training([run_of("a-run-of-a-grid/" * 5)])
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 > 0


def distance_of_ticks(figure):
    """Of slanted names, across their direction."""
    first, second, *_ = figure.axes[0].get_xticklabels()
    apart = second.get_window_extent().x1 - first.get_window_extent().x1
    return apart * math.sin(math.radians(first.get_rotation())) / figure.dpi


def test_short_names_of_drafts_stand_upright(quickstart):
    panel = figures_of(find_runs(quickstart))["block_efficiency"][1].axes[0]
    assert {text.get_rotation() for text in panel.get_xticklabels()} == {0}


def drawn_in(panel):
    return {line.get_label() for line in panel.lines}


def test_a_run_has_the_colour_of_its_draft_and_no_other():
    drafts = ["sft", "finetuned", "distilled"]
    names = ["draft", "distilled", "notsft", "grid/sft/seed1", "distilled-twice"]
    colours = _run_colours([run_of(name) for name in names], drafts)
    of_drafts = colours_of(drafts)
    assert colours["distilled"] == of_drafts["distilled"]
    assert colours["grid/sft/seed1"] == of_drafts["sft"]
    strangers = [colours[name] for name in ("draft", "notsft", "distilled-twice")]
    assert len(set(strangers)) == 3
    assert not any(same_color(a, b) for a in strangers for b in of_drafts.values())


def test_colours_are_left_for_runs_of_no_draft_beside_many_drafts():
    drafts = [f"draft{i}" for i in range(9)]
    colours = _run_colours([run_of("a"), run_of("b")], drafts)
    assert len(set(colours.values())) == 2
    assert not set(colours.values()) & set(colours_of(drafts).values())
