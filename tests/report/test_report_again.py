"""Reports on several evaluations, which say which is which; and one made in place of another."""

import shutil

import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.report.figures import figures_of
from distillspec_jax.report.page import page
from distillspec_jax.report.runs import find_runs
from distillspec_jax.report.tables import tables_of
from experiments import report

OF_ONE = {"block_efficiency", "speed", "block_length", "accepted_lengths"}


@pytest.fixture
def quick(monkeypatch):
    """Files of figures without the figures, which take their seconds."""
    monkeypatch.setattr(report, "render", lambda figure, file_format: file_format.encode())


def test_tables_and_captions_say_of_which_evaluation_they_are(two_evaluations):
    runs = find_runs(two_evaluations)
    titles = [table.title for table in tables_of(runs)]
    captions = [caption for caption, _ in figures_of(runs).values()]
    assert titles[0] == "a/<b>: Gains"
    for found, count in ((titles[:-1], 4), (captions, 4)):
        assert [text.split(": ")[0] for text in found] == ["a/<b>"] * count + ["a__b_"] * count
    assert titles[-1] == "Where the numbers come from"


def test_cards_stand_below_the_name_of_their_evaluation(two_evaluations, quickstart):
    text = page("x", find_runs(two_evaluations), [], {})
    blocks = text.split("<h2>")
    assert [block.split("</h2>")[0] for block in blocks[1:]] == ["a/&lt;b&gt;", "a__b_"]
    assert [block.count('<div class="cards">') for block in blocks] == [0, 1, 1]
    assert "<h2>" not in page("x", find_runs(quickstart), [], {})


def test_the_terminal_and_markdown_name_the_evaluation(two_evaluations, quick, capsys):
    report.main(report.ReportConfig(), two_evaluations)
    *said, _ = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == ["a/<b>"] * 3 + ["a__b_"] * 3
    assert said[0].startswith("a/<b>: block efficiency of 'distilled', gamma 7: greedy 4.42")
    assert "\n## a/&lt;b&gt;: Speed\n" in (two_evaluations / "tables.md").read_text()


def test_each_evaluation_has_files_of_its_own(two_evaluations):
    names = {f"{figure}_a__b_{number}" for figure in OF_ONE for number in ("", "-2")}
    assert set(figures_of(find_runs(two_evaluations))) == names


def test_figures_of_an_earlier_report_are_removed_and_nothing_else(two_evaluations, quick):
    figures = two_evaluations / "figures"
    report.main(report.ReportConfig(), two_evaluations)
    assert stems(figures) == {f"{name}_a__b_{n}" for name in OF_ONE for n in ("", "-2")}
    others = {figures / name for name in ("speed.txt", "speed_notes.png", "mine.svg", "mine.png")}
    for path in others:
        path.write_text("a user's")
    shutil.rmtree(two_evaluations / "a")
    report.main(report.ReportConfig(), two_evaluations)
    written = {figures / f"{name}.{ending}" for name in OF_ONE for ending in ("svg", "png")}
    assert set(figures.iterdir()) == written | others


def test_a_page_is_never_half_written(runs_folder, quick):
    """A reader that has the old page open, by a link say, keeps it whole."""
    report.main(report.ReportConfig(title="old"), runs_folder)
    for name in ("report.html", "tables.md"):
        (runs_folder / f"old {name}").hardlink_to(runs_folder / name)
    before = {path: path.read_bytes() for path in runs_folder.glob("old *")}
    (runs_folder / "control" / "summary.json").unlink()
    report.main(report.ReportConfig(title="new"), runs_folder)
    assert {path: path.read_bytes() for path in runs_folder.glob("old *")} == before
    assert "<h1>new</h1>" in (runs_folder / "report.html").read_text()
    assert "unfinished" in (runs_folder / "tables.md").read_text()


def stems(folder):
    return {path.stem for path in folder.iterdir()}


def test_a_folder_in_place_of_the_page_is_told_before_anything_is_written(runs_folder):
    (runs_folder / report.PAGE).mkdir()
    with pytest.raises(UserError, match=r"report\.html is a folder, and the report has a file"):
        report.main(report.ReportConfig(), runs_folder)
    assert not (runs_folder / report.FIGURES).exists()
