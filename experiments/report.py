"""Makes the report of all runs below a folder: one page, figures and tables, from their files.

    python -m experiments.report --workdir=runs/quickstart

Reads what the runs wrote and nothing else; writes `report.html`, `tables.md` and `figures/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from distillspec_jax.errors import naming
from distillspec_jax.report.figures import figures_of, render
from distillspec_jax.report.headline import lines
from distillspec_jax.report.page import page
from distillspec_jax.report.runs import Run, find_runs
from distillspec_jax.report.tables import tables_of
from experiments import door

PAGE, TABLES, FIGURES = "report.html", "tables.md", "figures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How the page is headed; an empty title is made of the folder's name."""

    title: str = ""


def main(config: ReportConfig, workdir: Path) -> None:
    runs = find_runs(workdir)
    for path, content in _files(config, workdir, runs).items():  # all drawn before one is written
        path.parent.mkdir(exist_ok=True)
        with naming(path):
            path.write_bytes(content)
    for run in runs:
        if run.is_evaluation:
            print("\n".join(lines(run)))
    print(f"look: {workdir / PAGE} ({TABLES}, {FIGURES}/)")


def plan(config: ReportConfig, memory_gib: float | None) -> None:
    """There is nothing to hold."""
    del config, memory_gib
    print("plan of report: it reads the files of runs, loads no model and compiles nothing")


def _files(config: ReportConfig, workdir: Path, runs: Sequence[Run]) -> dict[Path, bytes]:
    tables, drawn = tables_of(runs), figures_of(runs)
    svgs = {name: (caption, render(figure, "svg")) for name, (caption, figure) in drawn.items()}
    title = config.title or f"Report: {workdir.name}"
    files = {workdir / FIGURES / f"{name}.svg": svg for name, (_, svg) in svgs.items()}
    for name, (_, figure) in drawn.items():
        files[workdir / FIGURES / f"{name}.png"] = render(figure, "png")
    files[workdir / TABLES] = "\n".join(table.markdown() for table in tables).encode()
    files[workdir / PAGE] = page(title, runs, tables, svgs).encode()
    return files


if __name__ == "__main__":
    door.run(main, ReportConfig, plan=plan)
