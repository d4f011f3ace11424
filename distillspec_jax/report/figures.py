"""Figures of a report, drawn off screen; each is a matplotlib Figure that knows no run but its own.

A draft keeps its colour through all figures: the headline draft is the last and the strongest.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillspec_jax.report.runs import LOSS_KINDS, Record, Run, evaluations
from distillspec_jax.report.tables import decoded_rows

HEADLINE = "#0b6e99"
OTHERS = ("#9aa5b1", "#e0a43b", "#7b9e5f", "#b07aa1", "#d1605e")
SPARE = ("#4b3f72", "#8c5a3c", "#3fa796", "#c2417c", "#5f6b2f")  # never a draft's
INK, FAINT = "#2b2f36", "#d9dde3"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "distillspec",  # the same figures are the same bytes
}
LETTER, LINE, LEGEND_MARK, BAR = 0.08, 0.18, 0.6, 0.4  # inches, of this size of the font
SLANT = math.radians(30)  # of names too long to stand side by side


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; the last one is the headline's."""
    *others, last = names
    return {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {last: HEADLINE}


def _names(run: Run) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in run.summary["pooled"]))


def _shown(name: str) -> str:
    """A label that reads as `name`: a pair of `$` begins a formula, a `_` in front hides it."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if name.startswith("_") else escaped


def _panels(temperatures: Sequence[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * len(temperatures), 2.9), layout="constrained")
    axes = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for panel, temperature in zip(axes, temperatures, strict=True):
        panel.set_title(_mode(temperature))
    return figure, list(axes)


def _name_bars(figure: Figure, names: Sequence[str]) -> None:
    """Puts names below the bars, slanted where they would touch; the figure makes room."""
    longest, panels = max(map(len, names)) * LETTER, figure.axes
    width, height = figure.get_size_inches()
    slanted: dict[str, Any] = {}
    if longest > 0.8 * width / len(panels) / len(names):  # the rest is the scale's, and gaps
        slanted = {"rotation": math.degrees(SLANT), "ha": "right", "rotation_mode": "anchor"}
        width = max(width, len(panels) * (len(names) * BAR + longest * math.cos(SLANT)))
        figure.set_size_inches(width, height + longest * math.sin(SLANT))
    for panel in panels:
        panel.set_xticks(range(len(names)), [_shown(name) for name in names], **slanted)
        panel.grid(axis="x", visible=False)


def _legend(figure: Figure) -> None:
    """One legend for all panels, above them, where it hides nothing; the figure makes room."""
    handles: dict[str, Artist] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    entry = max(map(len, handles), default=0) * LETTER + LEGEND_MARK
    width, height = figure.get_size_inches()
    width = max(width, entry)
    columns = min(int(width / entry), max(len(handles), 1))
    height += LINE * (math.ceil(len(handles) / columns) - 1)
    figure.set_size_inches(width, height)
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=columns)


def _mode(temperature: float) -> str:
    return "greedy (T = 0)" if temperature == 0 else f"sampled (T = {temperature:g})"


def _temperatures(rows: Sequence[Record]) -> list[float]:
    return sorted({row["temperature"] for row in rows})


def _error(row: Record, key: str) -> list[list[float]]:
    """Lengths of an error bar below and above; rounding may put a value outside its interval."""
    low, high = row.get(f"{key}_ci95", (row[key], row[key]))  # one prompt has no interval
    return [[max(row[key] - low, 0.0)], [max(high - row[key], 0.0)]]


def block_efficiency(run: Run) -> Figure | None:
    """tau of each draft at the widest gamma that all of them share."""
    names, rows = _names(run), [row for row in decoded_rows(run) if row["lossless"]]
    shared = [
        gamma
        for gamma in {row["gamma"] for row in rows}
        if all(any(r["name"] == n and r["gamma"] == gamma for r in rows) for n in names)
    ]
    if not shared:
        return None
    gamma, colours = max(shared), colours_of(names)
    rows = [row for row in rows if row["gamma"] == gamma]
    figure, axes = _panels(_temperatures(rows))
    for panel, temperature in zip(axes, _temperatures(rows), strict=True):
        for row in (each for each in rows if each["temperature"] == temperature):
            x, tau = names.index(row["name"]), row["block_efficiency"]
            error = _error(row, "block_efficiency")
            panel.bar(x, tau, 0.62, color=colours[row["name"]])
            panel.errorbar(x, tau, error, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
            panel.annotate(
                f"{tau:.2f}",
                (x, tau + error[1][0]),
                (0, 3),
                textcoords="offset points",
                ha="center",
            )
        panel.margins(y=0.12)
    _name_bars(figure, names)
    axes[0].set_ylabel(f"tokens per target call (gamma {gamma})")
    return figure


def block_length(run: Run) -> Figure | None:
    """tau against gamma: predicted along the target's texts (line), decoded (points)."""
    return _against_gamma(
        run, "block_efficiency_path", "block_efficiency", "tokens per target call"
    )


def speed(run: Run) -> Figure | None:
    """Speed-up against gamma: predicted from measured costs (line), by the clock (points)."""
    if not any("speedup_wall_clock" in row for row in run.summary["pooled"]):
        return None
    figure = _against_gamma(
        run, "speedup_predicted_verification", "speedup_wall_clock", "speed-up over no draft"
    )
    for panel in figure.axes if figure else []:
        panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    return figure


def _against_gamma(run: Run, line: str, point: str, label: str) -> Figure | None:
    curves = run.of_kind("curve")
    if not curves:
        return None
    colours, rows = colours_of(_names(run)), _measured(run, point)
    figure, axes = _panels(_temperatures(curves))
    for panel, temperature in zip(axes, _temperatures(curves), strict=True):
        for name, colour in colours.items():
            _line(panel, _matching(curves, name, temperature), line, colour, _shown(name))
            for row in _matching(rows, name, temperature):
                error = _error(row, point)
                panel.errorbar(
                    row["gamma"], row[point], error, fmt="o", color=colour, markersize=5, capsize=2
                )
        panel.set_xlabel("gamma, drafted tokens per block")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(label)
    _legend(figure)
    return figure


def _measured(run: Run, key: str) -> list[Record]:
    """Lossless rows that have the figure, at the first timed batch, as the predictions."""
    rows = [row for row in run.summary["pooled"] if row["lossless"] and key in row]
    return [row for row in rows if row.get("batch_size") == rows[0].get("batch_size")]


def _matching(rows: Sequence[Record], name: str, temperature: float) -> list[Record]:
    return [row for row in rows if row["name"] == name and row["temperature"] == temperature]


def _line(panel: Axes, rows: Sequence[Record], key: str, colour: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row["gamma"])
    gammas = [row["gamma"] for row in rows]
    panel.plot(gammas, [row[key] for row in rows], color=colour, label=label, linewidth=1.6)
    if rows and all(f"{key}_ci95" in row for row in rows):
        low, high = np.array([row[f"{key}_ci95"] for row in rows]).T
        panel.fill_between(gammas, low, high, color=colour, alpha=0.18, linewidth=0)


def accepted_lengths(run: Run) -> Figure | None:
    """How many drafted tokens a block keeps, as shares of all blocks, at the widest gamma."""
    rows = [row for row in decoded_rows(run) if row["lossless"]]
    if not rows:
        return None
    gamma, names = max(row["gamma"] for row in rows), _names(run)
    rows = [row for row in rows if row["gamma"] == gamma]
    colours, width = colours_of(names), 0.8 / len(names)
    figure, axes = _panels(_temperatures(rows))
    for panel, temperature in zip(axes, _temperatures(rows), strict=True):
        for i, name in enumerate(names):
            for row in _matching(rows, name, temperature):
                blocks = np.array(row["accepted_histogram"], float)
                places = np.arange(len(blocks)) + (i - (len(names) - 1) / 2) * width
                share = 100 * blocks / max(blocks.sum(), 1)
                panel.bar(places, share, width * 0.92, color=colours[name], label=_shown(name))
        panel.set_xticks(range(gamma + 1))
        panel.set_xlabel(f"accepted tokens of a block (gamma {gamma})")
        panel.grid(axis="x", visible=False)
    axes[0].set_ylabel("% of blocks")
    _legend(figure)
    return figure


def training(runs: Sequence[Run], drafts: Sequence[str] = ()) -> Figure | None:
    """Losses of the training runs, and block efficiency on held-out prompts where it was watched.

    `drafts` are the names of an evaluation, whose colours runs of such a name take.
    """
    runs = [run for run in runs if run.is_training]
    if not runs:
        return None
    panels = _training_panels(runs)
    rows = math.ceil(len(panels) / 3)  # of panels large enough to read
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    colours = _run_colours(runs, drafts)
    for panel, (title, kind, key, shown) in zip(axes, panels, strict=False):
        for run in shown:
            steps, values = run.series(kind, key)
            if steps:
                colour, label = colours[run.name], _shown(run.name)
                panel.plot(steps, values, color=colour, label=label, linewidth=1.4)
        panel.set_xlabel("step")
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for left_over in axes[len(panels) :]:
        left_over.remove()
    _legend(figure)
    return figure


def _training_panels(runs: Sequence[Run]) -> list[tuple[str, str, str, list[Run]]]:
    """Title, kind of record, its key, and the runs; a divergence beside a likelihood looks flat."""
    of_kind = {kind: [run for run in runs if run.loss_kind == kind] for kind in LOSS_KINDS}
    losses = [(f"training loss, {kind}", "train", "loss", own) for kind, own in of_kind.items()]
    watched = sorted(
        {key for run in runs for r in run.of_kind("eval") for key in r if _is_tau(key)}
    )
    return [
        *(panel for panel in losses if panel[-1]),
        *((_watched_title(key), "eval", key, list(runs)) for key in watched),
    ]


def _run_colours(runs: Sequence[Run], drafts: Sequence[str]) -> dict[str, str]:
    """That of the draft whose name is a part of the run's path; to the others what is free."""
    if not drafts:
        return colours_of([run.name for run in runs])
    of_drafts = colours_of(drafts)
    free = itertools.cycle(
        colour for colour in (*OTHERS, *SPARE) if colour not in of_drafts.values()
    )
    colours = {}
    for run in runs:
        own = [of_drafts[name] for name in drafts if f"/{name}/" in f"/{run.name}/"]
        colours[run.name] = own[-1] if own else next(free)
    return colours


TAU_AT = "block_efficiency_t"


def _is_tau(key: str) -> bool:
    return key.startswith(TAU_AT) and not key.endswith("_ci95")


def _watched_title(key: str) -> str:
    return f"held-out block efficiency, {_mode(float(key.removeprefix(TAU_AT)))}"


OF_EVALUATION: dict[str, tuple[str, Callable[[Run], Figure | None]]] = {
    "block_efficiency": ("Block efficiency of the drafts with 95 % intervals.", block_efficiency),
    "speed": (
        "Speed-up over decoding without a draft: predicted from the measured costs of a step "
        "(lines), and by the clock (points).",
        speed,
    ),
    "block_length": (
        "Block efficiency against the block length: along the target's own texts (lines), "
        "and by the real decoder (points).",
        block_length,
    ),
    "accepted_lengths": ("How much of a block is kept.", accepted_lengths),
}


def figures_of(runs: Sequence[Run]) -> dict[str, tuple[str, Figure]]:
    """File name -> (caption, figure), for everything that the runs have data for."""
    drawn: dict[str, tuple[str, Figure]] = {}
    evaluated = evaluations(runs)
    slugs = _slugs([run for _, run in evaluated])
    with matplotlib.rc_context(STYLE):
        for (whose, run), slug in zip(evaluated, slugs, strict=True):
            for name, (caption, draw) in OF_EVALUATION.items():
                figure = draw(run)
                if figure is not None:
                    drawn[f"{name}_{slug}" if whose else name] = whose + caption, figure
        names = [name for _, run in evaluated for name in _names(run)]
        curves = training(runs, list(dict.fromkeys(names)))
        if curves is not None:
            drawn["training"] = "Training, and what the real decoder made of it on the way.", curves
    return drawn


def _slugs(runs: Sequence[Run]) -> list[str]:
    """The runs' names as parts of file names; the second of a kind ends in `-2`, as none else."""
    plain = ["".join(c if c.isalnum() else "_" for c in run.name) for run in runs]
    numbers = [plain[:i].count(slug) + 1 for i, slug in enumerate(plain)]
    return [s if n == 1 else f"{s}-{n}" for s, n in zip(plain, numbers, strict=True)]


def is_figure(name: str) -> bool:
    """Whether `figures_of` gives such names."""
    return re.fullmatch(rf"training|({'|'.join(OF_EVALUATION)})(_[\w-]+)?", name) is not None


def render(figure: Figure, file_format: str) -> bytes:
    """The bytes of an SVG or PNG file; the same runs give the same bytes."""
    metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=file_format, dpi=160, metadata=metadata)
    return buffer.getvalue()
