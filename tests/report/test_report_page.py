"""Tables, figures and the page: every number where it belongs, nothing from elsewhere."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from distillspec_jax.report.figures import _measured, figures_of, render
from distillspec_jax.report.headline import headlines, lines
from distillspec_jax.report.page import page
from distillspec_jax.report.runs import find_runs
from distillspec_jax.report.tables import (
    Table,
    agreement_table,
    drafts_table,
    figure,
    gains_table,
    sources_table,
    speed_table,
    tables_of,
    training_table,
)
from experiments import report


@pytest.fixture(scope="module")
def runs(quickstart):
    return find_runs(quickstart)


@pytest.fixture(scope="module")
def evaluation(runs):
    return runs[0]


@pytest.fixture(scope="module")
def drawn(runs):
    return figures_of(runs)


@pytest.fixture(scope="module")
def svgs(drawn):
    return {name: (caption, render(figure, "svg")) for name, (caption, figure) in drawn.items()}


@pytest.fixture(scope="module")
def text(runs, svgs):
    return page("Report: quickstart", runs, tables_of(runs), svgs)


def change(runs_folder, name, action):
    path = runs_folder / name / "summary.json"
    summary = json.loads(path.read_text())
    action(summary)
    path.write_text(json.dumps(summary))
    return find_runs(runs_folder)


def test_figures_of_a_row():
    row = {"tau": 4.126, "tau_ci95": [4.01, 4.2], "c": 0.0512}
    assert figure(row, "tau") == "4.13 [4.01, 4.20]"
    assert figure(row, "c", 3) == "0.051"
    assert figure(row, "speed") == "-"


def test_tables_escape_in_both_languages():
    table = Table("t", ["a|b", "<i>"], [["x|y", "<script>"]], numbers=frozenset({1}))
    markdown = "## t\n\n| a\\|b | &lt;i&gt; |\n| --- | ---: |\n| x\\|y | &lt;script&gt; |\n"
    assert table.markdown() == markdown
    assert "<script>" not in table.html()
    assert '<td class="number">&lt;script&gt;</td>' in table.html()


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("two\nlines\r\nor three", "two lines or three"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("&lt;", "&amp;lt;"),
        ("a\\|b", "a\\\\\\|b"),
    ],
)
def test_a_name_is_one_cell_of_plain_markdown(name, cell):
    assert Table("t", ["a", "b"], [[name, "1"]]).markdown().splitlines()[4] == f"| {cell} | 1 |"


def test_drafts_table_has_one_row_per_setting(evaluation):
    table = drafts_table(evaluation)
    assert len(table.rows) == 3 * 2 * 2
    assert table.rows[0][:4] == ["finetuned", "3", "0", "7"]
    assert table.rows[0][4] == "0.700 [0.690, 0.710]"
    assert table.header[-1] == "exact match number"
    assert all(len(row) == len(table.header) for row in table.rows)


def test_drafts_table_has_no_column_for_a_task_without_a_metric(runs_folder):
    def take_the_metric(summary):
        for row in summary["pooled"]:
            row["quality_metric"] = "none"
            del row["quality"]

    table = drafts_table(change(runs_folder, ".", take_the_metric)[0])
    assert table.header[-1] == "i.i.d."
    assert all(len(row) == len(table.header) for row in table.rows)
    assert "percent" not in table.note


def test_drafts_table_says_over_what_its_intervals_are(runs_folder, evaluation):
    def leave_one_seed(summary):
        for row in summary["pooled"]:
            row["seeds"] = [0]

    assert "intervals over prompts and seeds." in drafts_table(evaluation).note
    one = drafts_table(change(runs_folder, ".", leave_one_seed)[0])
    assert "intervals by bootstrap over prompts; one seed." in one.note


def test_drafts_table_tells_of_texts_that_the_limit_cuts(evaluation):
    assert "No block is cut by the length limit" in drafts_table(evaluation).note


def test_drafts_table_tells_the_draft_s_own_sampling(runs_folder, evaluation):
    assert "its own" not in drafts_table(evaluation).note
    config = json.loads((runs_folder / "config.json").read_text())
    config |= {"draft_temperature": 0.7, "draft_top_k": None, "draft_top_p": 0.9}
    (runs_folder / "config.json").write_text(json.dumps(config))
    note = drafts_table(find_runs(runs_folder)[0]).note
    assert note.endswith("The draft samples with its own temperature 0.7, top_p 0.9.")


def test_another_timed_batch_adds_a_row_of_speed_only(runs_folder, evaluation):
    def add_batch(summary):
        summary["pooled"] += [row | {"batch_size": 8} for row in summary["pooled"]]

    again = change(runs_folder, ".", add_batch)[0]
    assert len(speed_table(again).rows) == 2 * len(speed_table(evaluation).rows)
    assert drafts_table(again).rows == drafts_table(evaluation).rows


def test_headline_and_figures_are_of_the_first_timed_batch(runs_folder):
    """Predictions and gains are; another batch may be faster or slower."""

    def add_batches(summary):
        rows = [row | {"batch_size": 8} for row in summary["pooled"]]
        for row in summary["pooled"]:
            row["speedup_wall_clock"] *= 9
        summary["pooled"] = [
            row for pair in zip(rows, summary["pooled"], strict=True) for row in pair
        ]

    again = change(runs_folder, ".", add_batches)[0]
    assert {each.timed["batch_size"] for each in headlines(again)} == {8}
    assert {row["batch_size"] for row in _measured(again, "speedup_wall_clock")} == {8}


def first_cells(table):
    return dict(zip(table.header, table.rows[0], strict=True))


def test_each_column_of_the_speed_table_has_its_figure(evaluation):
    assert first_cells(speed_table(evaluation)) == {
        **{"draft": "finetuned", "T": "0", "gamma": "7", "batch": "1", "c": "0.050", "v": "1.84"},
        **{"predicted": "2.33", "with v": "1.43", "measured": "1.36 [1.31, 1.41]"},
        "tokens/s alone": "1000 [970, 1030]",
        "tokens/s with draft": "1363 [1313, 1413]",
    }


def test_each_column_of_the_agreement_table_has_its_figure(evaluation):
    assert first_cells(agreement_table(evaluation)) == {
        **{"draft": "finetuned", "T": "0", "gamma": "7", "counted": "0.700 [0.690, 0.710]"},
        "sum of min(p, q)": "0.701 [0.691, 0.711]",
        "from the blocks": "0.702 [0.692, 0.712]",
    }


def test_speed_table_says_over_what_its_intervals_are(runs_folder, evaluation):
    def leave_one_seed(summary):
        for row in summary["pooled"]:
            row["seeds"] = [0]

    assert "intervals over batches and seeds." in speed_table(evaluation).note
    one = speed_table(change(runs_folder, ".", leave_one_seed)[0])
    assert "intervals by bootstrap over batches; one seed." in one.note


def test_gains_say_at_which_gamma(evaluation):
    rows = gains_table(evaluation).rows
    assert rows[0] == [
        *("distilled", "finetuned", "0", "7", "block efficiency"),
        *("1.200 [1.180, 1.220]", "yes"),
    ]
    assert rows[-2][3:5] == ["5 against 4", "tokens per second"]
    assert rows[-1][3:5] == ["5", "tokens per second"]


def test_training_table(runs):
    rows = training_table([run for run in runs if run.is_training]).rows
    assert rows[1] == [
        *("distilled", "distill", "distillspec", "0", "1000", "900", "62", "0.075"),
    ]


def test_training_table_of_a_run_without_a_recipe(runs):
    [row] = training_table([dataclasses.replace(runs[1], config={"recipe": None})]).rows
    assert row[2] == "-"


def test_sources_table_tells_what_is_unfinished(runs):
    killed = dataclasses.replace(runs[0], summary={})
    commands = [row[1] for row in sources_table([killed, runs[1]]).rows]
    assert commands == ["experiments.evaluate, unfinished", "experiments.distill"]


@pytest.mark.parametrize(
    ("loss", "text"), [(1.5551e-05, "1.56e-05"), (-2.04e-05, "-2.04e-05"), (7.1364, "7.14")]
)
def test_training_table_shows_a_small_loss(runs, loss, text):
    records = [{"kind": "train", "step": 1, "loss": loss}]
    [row] = training_table([dataclasses.replace(runs[1], records=records)]).rows
    assert row[-1] == text


def test_tables_without_rows_are_left_out(runs_folder):
    def stop_the_clock(summary):
        for row in summary["pooled"]:
            del row["speedup_wall_clock"]
        summary["gains"] = []

    titles = [table.title for table in tables_of(change(runs_folder, ".", stop_the_clock))]
    assert "Speed" not in titles
    assert "Gains" not in titles
    assert "Training" in titles


def test_lossy_rows_say_so_and_stay_out_of_the_headline(runs_folder):
    def add_lossy(summary):
        lossy = summary["pooled"][-1] | {"lenience": 0.5, "lossless": False}
        del lossy["block_efficiency_path"]
        summary["pooled"].append(lossy | {"block_efficiency": 7.9, "speedup_wall_clock": 9.0})

    evaluation = change(runs_folder, ".", add_lossy)[0]
    assert drafts_table(evaluation).rows[-1][0] == "distilled, lenience 0.5"
    assert drafts_table(evaluation).rows[-1][6] == "-"
    assert "9.00x" not in " ".join(lines(evaluation))
    assert all(7.9 not in panel for panel in heights(figures_of([evaluation]), "block_efficiency"))


def give_the_law_up(summary):
    for row in summary["pooled"]:
        row |= {"lenience": 0.5, "lossless": False}


def test_an_evaluation_without_a_lossless_setting_has_tables_and_no_headline(runs_folder):
    evaluation = change(runs_folder, ".", give_the_law_up)[0]
    assert lines(evaluation) == ["no lossless setting was measured; the tables show the others"]
    drawn = figures_of([evaluation])
    assert "accepted_lengths" not in drawn
    svgs = {name: (caption, render(figure, "svg")) for name, (caption, figure) in drawn.items()}
    text = page("x", [evaluation], tables_of([evaluation]), svgs)
    assert "distilled, lenience 0.5" in text
    assert "no lossless setting was measured" in text


EXACT = "exactly what the target alone would have written"


def test_the_page_claims_of_lossless_runs_that_the_text_is_the_target_s(text):
    assert f"The text is {EXACT}" in text


def test_the_page_claims_nothing_of_runs_that_gave_the_law_up(runs_folder):
    runs = change(runs_folder, ".", give_the_law_up)
    assert EXACT not in page("x", runs, tables_of(runs), {})
    assert EXACT not in page("x", runs[1:], [], {})  # no evaluation at all


def test_the_page_claims_it_of_the_lossless_rows_where_others_are_not(runs_folder):
    def give_it_up_once(summary):
        summary["pooled"].append(summary["pooled"][-1] | {"lenience": 0.5, "lossless": False})

    runs = change(runs_folder, ".", give_it_up_once)
    found = page("x", runs, tables_of(runs), {})
    assert f"In rows without a lenience the text is {EXACT}" in found
    assert f"The text is {EXACT}" not in found


@pytest.mark.parametrize("is_partly_lossy", [False, True])
def test_the_page_does_not_claim_it_where_greedy_texts_differ(runs_folder, is_partly_lossy):
    def spoil(summary):
        summary["drafts"][-1] |= {"greedy_mismatches": 3}
        if is_partly_lossy:
            summary["pooled"].append(summary["pooled"][-1] | {"lenience": 0.5, "lossless": False})

    runs = change(runs_folder, ".", spoil)
    found = page("x", runs, tables_of(runs), {})
    assert EXACT not in found
    assert "Some greedy texts differ from what the target alone wrote" in found


def test_nothing_is_written_where_something_cannot_be_drawn(runs_folder, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    before = sorted(runs_folder.rglob("*"))
    monkeypatch.setattr(report, "page", fail)
    with pytest.raises(ZeroDivisionError):
        report.main(report.ReportConfig(), runs_folder)
    assert sorted(runs_folder.rglob("*")) == before


def test_three_lines_say_what_was_gained(evaluation):
    gained, clock, proof = lines(evaluation)
    assert gained.startswith("block efficiency of 'distilled', gamma 7: greedy 4.42 (+20.0 % over")
    assert "+20.0 % over control" in gained
    gains = "+10.0 % over finetuned at its gamma 4, +10.0 % over control"
    assert f"greedy 1.99x at gamma 5 ({gains})" in clock
    assert proof.startswith("lossless: 9,000 of 9,000 greedy texts")


def test_the_speed_of_the_headline_is_at_the_tuned_gamma_though_another_is_faster(runs_folder):
    """The clock ran on the prompts of the claim, and what is fastest there was not known before."""

    def make_the_shared_gamma_fastest(summary):
        for row in summary["pooled"]:
            row["speedup_wall_clock"] = 2.1 if row["gamma"] == 7 else 2.05
        summary["pooled"].append(summary["pooled"][-1] | {"gamma": 9, "speedup_wall_clock": 3.0})

    runs = change(runs_folder, ".", make_the_shared_gamma_fastest)
    assert [each.timed["gamma"] for each in headlines(runs[0])] == [5, 5]
    assert "greedy 2.05x at gamma 5 (+10.0 % over finetuned" in lines(runs[0])[1]
    label = "wall clock of distilled over no draft, greedy, gamma 5"
    assert f"<b>2.05x</b><span>{label}</span>" in page("x", runs, [], {})


def test_the_speed_of_the_headline_is_at_the_first_gamma_where_none_was_tuned(runs_folder):
    def leave_no_gain_in_speed(summary):
        gains = summary["gains"]
        summary["gains"] = [gain for gain in gains if gain["figure"] == "block_efficiency"]

    evaluation = change(runs_folder, ".", leave_no_gain_in_speed)[0]
    assert [each.timed["gamma"] for each in headlines(evaluation)] == [7, 7]
    assert "greedy 1.92x at gamma 7;" in lines(evaluation)[1]


def test_a_gain_whose_speed_was_not_timed_is_not_said_of_another_gamma(runs_folder):
    def drop_the_tuned_gamma(summary):
        summary["pooled"] = [row for row in summary["pooled"] if row["gamma"] == 7]

    evaluation = change(runs_folder, ".", drop_the_tuned_gamma)[0]
    assert "greedy 1.92x at gamma 7;" in lines(evaluation)[1]


def test_a_gain_of_an_older_summary_has_one_gamma(runs_folder):
    def forget_the_other_gamma(summary):
        for gain in summary["gains"]:
            gain.pop("gamma_over", None)

    evaluation = change(runs_folder, ".", forget_the_other_gamma)[0]
    assert "1.99x at gamma 5 (+10.0 % over finetuned, +10.0 %" in lines(evaluation)[1]


def test_the_headline_is_the_last_draft_s_though_its_row_is_not_the_last(runs_folder):
    """As where the gamma chosen for it is the shared one, and another draft's is not."""

    def drop_its_own_gamma(summary):
        mine = [row["name"] == "distilled" and row["gamma"] == 5 for row in summary["pooled"]]
        summary["pooled"] = [
            row for row, drop in zip(summary["pooled"], mine, strict=True) if not drop
        ]
        assert summary["pooled"][-1]["name"] != "distilled"

    evaluation = change(runs_folder, ".", drop_its_own_gamma)[0]
    assert "'distilled', gamma 7: greedy 4.42" in lines(evaluation)[0]


def test_mismatches_are_not_hidden(runs_folder):
    def spoil(summary):
        summary["drafts"][0]["greedy_mismatches"] = 3

    evaluation = change(runs_folder, ".", spoil)[0]
    assert "8,997 of 9,000" in lines(evaluation)[2]


def test_headline_without_a_clock(runs_folder):
    def stop_the_clock(summary):
        for row in summary["pooled"]:
            del row["speedup_wall_clock"]

    evaluation = change(runs_folder, ".", stop_the_clock)[0]
    assert [each.timed for each in headlines(evaluation)] == [None, None]
    assert lines(evaluation)[1] == "wall clock over no draft: not measured"
    assert "speed" not in figures_of([evaluation])


def test_every_figure_is_drawn_and_always_the_same(runs, drawn):
    assert list(drawn) == [
        *("block_efficiency", "speed", "block_length", "accepted_lengths", "training"),
    ]
    first, second = (figures_of(runs[1:])["training"][1] for _ in range(2))
    assert render(first, "svg") == render(second, "svg")
    assert render(first, "png").startswith(b"\x89PNG")


def heights(drawn, name):
    """Heights of the bars of a figure's panels."""
    return [[bar.get_height() for bar in panel.patches] for panel in drawn[name][1].axes]


def test_bars_show_the_figures_of_their_draft(drawn, evaluation):
    rows = [r for r in evaluation.summary["pooled"] if r["gamma"] == 7]
    expected = [
        [r["block_efficiency"] for r in rows if r["temperature"] == temperature]
        for temperature in (0, 1)
    ]
    assert heights(drawn, "block_efficiency") == expected
    shares = heights(drawn, "accepted_lengths")[0]
    assert sum(shares) == pytest.approx(300)  # three drafts, each adds up to all its blocks


def test_points_of_the_clock_lie_at_their_gamma(drawn, evaluation):
    panel = drawn["speed"][1].axes[0]
    points = {
        (float(x), float(y))
        for line in panel.lines
        if line.get_marker() == "o"
        for x, y in zip(*line.get_data(), strict=True)
    }
    rows = [r for r in evaluation.summary["pooled"] if r["temperature"] == 0]
    assert points == {(r["gamma"], r["speedup_wall_clock"]) for r in rows}


class Checker(HTMLParser):
    """Collects what a page loads, and checks that its tags close."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert not checker.tags & {"script", "iframe", "link", "object"}
    assert len(checker.loads) == 5
    assert all(each.startswith("data:image/svg+xml;base64,") for each in checker.loads)
    assert "@import" not in text
    assert "url(" not in text


def test_page_embeds_the_figures_themselves(text, svgs):
    embedded = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)
    assert [base64.b64decode(each) for each in embedded] == [svg for _, svg in svgs.values()]


def test_a_card_names_the_draft_of_its_number(text):
    for label in (
        "tokens per target call with distilled, greedy, gamma 7",
        "block efficiency of distilled over control, T = 1",
        "wall clock of distilled over no draft, greedy, gamma 5",
    ):
        assert f"<span>{label}</span>" in text


def test_page_shows_the_headline_and_the_tables(text):
    for expected in (
        "4.42",
        "+20.0 %",
        "1.99x",
        "Where the numbers come from",
        "experiments.distill",
    ):
        assert expected in text


def test_page_escapes_what_files_say(runs_folder):
    def attack(summary):
        for row in summary["pooled"] + summary["gains"]:
            row["name"] = row["name"].replace("distilled", "<script>alert(1)</script>")

    runs = change(runs_folder, ".", attack)
    text = page("<i>", runs, tables_of(runs), {})
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
