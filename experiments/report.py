"""Makes the report of all runs below a folder: one page, figures and tables, from their files.

    python -m experiments.report --workdir=runs/quickstart

Reads what the runs wrote and nothing else; writes `report.html`, `tables.md` and `figures/`, in
place of those of an earlier report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from distillspec_jax.errors import UserError, naming
from distillspec_jax.files import write_text
from distillspec_jax.report.figures import figures_of, is_figure, render
from distillspec_jax.report.headline import lines
from distillspec_jax.report.page import page
from distillspec_jax.report.runs import evaluations, find_runs
from distillspec_jax.report.tables import tables_of
from experiments import door

PAGE, TABLES, FIGURES = "report.html", "tables.md", "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How the page is headed; an empty title is made of the folder's name."""

    title: str = ""


def main(config: ReportConfig, workdir: Path) -> None:
    runs = find_runs(workdir)
    for path in (workdir / TABLES, workdir / PAGE):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and the report has a file of that name; move it")
    tables, drawn = tables_of(runs), figures_of(runs)
    svgs = {name: (caption, render(figure, "svg")) for name, (caption, figure) in drawn.items()}
    whole_page = page(config.title or f"Report: {workdir.name}", runs, tables, svgs)
    images = {f"{name}.svg": svg for name, (_, svg) in svgs.items()}
    images |= {f"{name}.png": render(figure, "png") for name, (_, figure) in drawn.items()}
    _write_figures(workdir / FIGURES, images)  # only now: nothing is written if one cannot be drawn
    write_text(workdir / TABLES, "\n".join(table.markdown() for table in tables))
    write_text(workdir / PAGE, whole_page)
    for whose, run in evaluations(runs):
        print("\n".join(whose + line for line in lines(run)))
    print(f"look: {workdir / PAGE} ({TABLES}, {FIGURES}/)")


def plan(config: ReportConfig, memory_gib: float | None) -> None:
    """There is nothing to hold."""
    del config, memory_gib
    print("plan of report: it reads the files of runs, loads no model and compiles nothing")


def _write_figures(folder: Path, images: Mapping[str, bytes]) -> None:
    """Writes them and removes those of an earlier report, which has each as an SVG and as a PNG."""
    earlier = {path.stem for path in folder.glob("*.svg")} & {p.stem for p in folder.glob("*.png")}
    for name, image in images.items():
        folder.mkdir(exist_ok=True)
        with naming(folder / name):
            (folder / name).write_bytes(image)
    for stem in filter(is_figure, earlier):
        if f"{stem}.svg" not in images:
            (folder / f"{stem}.svg").unlink()
            (folder / f"{stem}.png").unlink()


if __name__ == "__main__":
    door.run(main, ReportConfig, plan=plan)
