"""Makes the report of all runs below a folder: one page, figures and tables, from their files.

    python -m experiments.report --workdir=runs/quickstart

Reads what the runs wrote and nothing else; writes `report.html`, `tables.md` and `figures/`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distillspec_jax.report.figures import figures_of, render
from distillspec_jax.report.headline import lines
from distillspec_jax.report.page import page
from distillspec_jax.report.runs import find_runs
from distillspec_jax.report.tables import tables_of
from experiments import door

PAGE, TABLES, FIGURES = "report.html", "tables.md", "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How the page is headed; an empty title is made of the folder's name."""

    title: str = ""


def main(config: ReportConfig, workdir: Path) -> None:
    runs = find_runs(workdir)
    tables = tables_of(runs)
    folder = workdir / FIGURES
    folder.mkdir(exist_ok=True)
    figures = {}
    for name, (caption, figure) in figures_of(runs).items():
        figures[name] = caption, render(figure, "svg")
        (folder / f"{name}.svg").write_bytes(figures[name][1])
        (folder / f"{name}.png").write_bytes(render(figure, "png"))
    (workdir / TABLES).write_text("\n".join(table.markdown() for table in tables), "utf-8")
    title = config.title or f"Report: {workdir.name}"
    (workdir / PAGE).write_text(page(title, runs, tables, figures), "utf-8")
    for run in runs:
        if run.is_evaluation:
            print("\n".join(lines(run)))
    print(f"look: {workdir / PAGE} ({TABLES}, {FIGURES}/)")


if __name__ == "__main__":
    door.run(main, ReportConfig)
