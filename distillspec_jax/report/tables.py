"""Tables of a report: rows of figures with their intervals, as Markdown and as HTML."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distillspec_jax.report.runs import Record, Run, evaluations


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; `numbers` are the columns set to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    numbers: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """GitHub's Markdown, with the title as a heading."""
        rules = ["---:" if i in self.numbers else "---" for i in range(len(self.header))]
        lines = [_markdown_row(row) for row in (self.header, rules, *self.rows)]
        note = ["", self.note] if self.note else []
        return "\n".join([f"## {_markdown_cell(self.title)}", "", *lines, *note, ""])

    def html(self) -> str:
        """A `<table>`, every text escaped; the first column is the heading of its row."""
        header = "".join(self._cell("th", i, text) for i, text in enumerate(self.header))
        body = "".join(
            "<tr>" + "".join(self._cell("td", i, text) for i, text in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        head = f"<thead><tr>{header}</tr></thead>"
        return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>{note}'

    def _cell(self, tag: str, column: int, text: str) -> str:
        kind = ' class="number"' if column in self.numbers else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |"


def _markdown_cell(text: str) -> str:
    """On one line, with what would begin a tag, an entity, an escape or a cell as plain text."""
    escaped = html.escape(" ".join(text.splitlines()), quote=False)
    return escaped.replace("\\", "\\\\").replace("|", "\\|")


def figure(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """A figure with its interval where it has one, `-` where it was not measured."""
    value = row.get(key)
    if value is None:
        return "-"
    if f"{key}_ci95" not in row:
        return f"{value:.{digits}f}"
    low, high = row[f"{key}_ci95"]
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def decoded_rows(evaluation: Run) -> list[Record]:
    """Pooled rows, one per setting: the batch size of the clock changes nothing that is decoded."""
    rows: dict[tuple[Any, ...], Record] = {}
    for row in evaluation.summary["pooled"]:
        rows.setdefault((row["name"], row["temperature"], row["gamma"], row["lenience"]), row)
    return list(rows.values())


def drafts_table(evaluation: Run) -> Table:
    """What each draft reached, in each setting, pooled over seeds."""
    rows = decoded_rows(evaluation)
    metric = next((row["quality_metric"] for row in rows), "none").replace("_", " ")
    has_metric = metric != "none"
    return Table(
        title="Acceptance and block efficiency",
        header=[
            *("draft", "seeds", "T", "gamma", "acceptance rate", "block efficiency"),
            *("from the text", "i.i.d.", *([metric] if has_metric else [])),
        ],
        rows=[
            [
                _name(row),
                str(len(row["seeds"])),
                f"{row['temperature']:g}",
                str(row["gamma"]),
                figure(row, "acceptance_rate", 3),
                figure(row, "block_efficiency"),
                figure(row, "block_efficiency_path"),
                figure(row, "block_efficiency_iid"),
                *([figure(row, "quality", 1)] if has_metric else []),
            ]
            for row in rows
        ],
        note=" ".join(
            [
                f"{_count(rows, 'num_prompts')} prompts, 95 % intervals "
                f"{_sampled(rows, 'prompts')}. Block "
                "efficiency is tokens per target call, by the real decoder; beside it what the "
                "target's own texts predict, and the formula for independent acceptances. No "
                "block is cut by the length limit: the decoder's last one counts whole, and the "
                "prediction leaves out what begins too late to be seen whole.",
                *(["Quality in percent."] if has_metric else []),
                *_draft_sampling(evaluation),
            ]
        ),
        numbers=frozenset(range(1, 9)),
    )


def _sampled(rows: Sequence[Record], units: str) -> str:
    if all(len(row["seeds"]) == 1 for row in rows):
        return f"by bootstrap over {units}; one seed"
    return f"over {units} and seeds"


def _draft_sampling(evaluation: Run) -> list[str]:
    """A sentence where the draft does not sample as the target does."""
    options = {
        option: evaluation.config.get(f"draft_{option}")
        for option in ("temperature", "top_k", "top_p")
    }
    own = [f"{option} {value:g}" for option, value in options.items() if value is not None]
    return [f"The draft samples with its own {', '.join(own)}."] if own else []


def agreement_table(evaluation: Run) -> Table:
    """The acceptance rate in its three ways."""
    keys = ("acceptance_rate", "acceptance_rate_overlap", "acceptance_rate_blocks")
    rows = [row for row in decoded_rows(evaluation) if row["lossless"]]
    return Table(
        title="Acceptance rate in three ways",
        header=["draft", "T", "gamma", "counted", "sum of min(p, q)", "from the blocks"],
        rows=[
            [_name(row), f"{row['temperature']:g}", str(row["gamma"])]
            + [figure(row, key, 3) for key in keys]
            for row in rows
        ],
        note=(
            "Counted: accepted over tested tokens in the sampler. Sum of min(p, q): along the "
            "target's own texts, where every position counts. From the blocks: read off the "
            "decoded texts."
        ),
        numbers=frozenset(range(1, 6)),
    )


def speed_table(evaluation: Run) -> Table:
    """Predicted and measured speed; empty where the clock was off."""
    rows = [row for row in evaluation.summary["pooled"] if "speedup_wall_clock" in row]
    return Table(
        title="Speed",
        header=[
            *("draft", "T", "gamma", "batch", "c", "v", "predicted", "with v", "measured"),
            *("tokens/s alone", "tokens/s with draft"),
        ],
        rows=[
            [
                _name(row),
                f"{row['temperature']:g}",
                str(row["gamma"]),
                str(row["batch_size"]),
                figure(row, "cost_ratio", 3),
                figure(row, "verification_cost"),
                figure(row, "speedup_predicted"),
                figure(row, "speedup_predicted_verification"),
                figure(row, "speedup_wall_clock"),
                figure(row, "tokens_per_second_target", 0),
                figure(row, "tokens_per_second_speculative", 0),
            ]
            for row in rows
        ],
        note=(
            f"{_count(rows, 'timed_prompts')} timed prompts, decoders in turns over a few of "
            "them after a warm-up, the median of the repeats of each batch, intervals "
            f"{_sampled(rows, 'batches')}. "
            "c: draft step over target step. v: verifying gamma + 1 positions over a target step. "
            "Predicted: tau / (c gamma + 1), and tau / (c gamma + v)."
        ),
        numbers=frozenset(range(1, 11)),
    )


def _of_batch(row: Mapping[str, Any]) -> str:
    size = row.get("batch_size", 1)
    return "" if size == 1 else f", batch {size}"


def gains_table(evaluation: Run) -> Table:
    """The headline draft over the others, paired by prompt."""
    words = {"block_efficiency": "block efficiency", "tokens_per_second": "tokens per second"}
    return Table(
        title="Gains",
        header=["draft", "over", "T", "gamma", "figure", "ratio", "intervals apart"],
        rows=[
            [
                row["name"],
                row["over"],
                f"{row['temperature']:g}",
                _gammas(row),
                words.get(row["figure"], row["figure"]) + _of_batch(row),
                figure(row, "gain", 3),
                {True: "yes", False: "no", None: "-"}[row.get("intervals_apart")],
            ]
            for row in evaluation.summary["gains"]
        ],
        note=(
            "Ratios on the same prompts, resampled together. Intervals apart: whether those of "
            "the two block efficiencies themselves leave a gap. Speeds are compared each at its "
            "own chosen gamma."
        ),
        numbers=frozenset({2, 3, 5}),
    )


def training_table(runs: Sequence[Run]) -> Table:
    """What was trained, how long, and what it gained on held-out prompts."""
    return Table(
        title="Training",
        header=["run", "experiment", "recipe", "seed", "steps", "best", "seconds", "loss"],
        rows=[
            [
                run.name,
                run.experiment,
                str(run.recipe.get("name", "-")),
                str(run.config.get("seed", "-")),
                str(run.summary.get("steps", "unfinished")),
                str(run.summary.get("best_step", "-")),
                figure(run.summary, "train_seconds", 0),
                _last_loss(run),
            ]
            for run in runs
        ],
        note="Seconds are those of the steps, without evaluation, saving and compiling apart.",
        numbers=frozenset({3, 4, 5, 6, 7}),
    )


def sources_table(runs: Sequence[Run]) -> Table:
    """Which run wrote which numbers, with what."""
    keys = ("distillspec_jax_version", "jax_version", "flax_version", "device_kind", "device_count")
    return Table(
        title="Where the numbers come from",
        header=["run", "command", "package", "jax", "flax", "device", "devices"],
        rows=[
            [run.name, f"experiments.{run.experiment}{'' if run.summary else ', unfinished'}"]
            + [str(run.summary.get(key, "-")) for key in keys]
            for run in runs
        ],
        note=(
            "Each folder holds config.json (the whole config), metrics.jsonl (every record) and "
            "summary.json; this page was made of nothing else."
        ),
        numbers=frozenset({6}),
    )


def tables_of(runs: Sequence[Run]) -> list[Table]:
    """Every table that the runs have rows for, in the order of the page."""
    tables = []
    for whose, run in evaluations(runs):
        for table in (gains_table, drafts_table, speed_table, agreement_table):
            of_run = table(run)
            tables.append(dataclasses.replace(of_run, title=whose + of_run.title))
    tables += [training_table([run for run in runs if run.is_training]), sources_table(runs)]
    return [table for table in tables if table.rows]


def _name(row: Record) -> str:
    lossy = "" if row["lossless"] else f", lenience {row['lenience']:g}"
    return f"{row['name']}{lossy}"


def _gammas(row: Record) -> str:
    over = row.get("gamma_over", row["gamma"])
    return str(row["gamma"]) if over == row["gamma"] else f"{row['gamma']} against {over}"


def _count(rows: Sequence[Record], key: str) -> str:
    counts = sorted({row[key] for row in rows})
    return " or ".join(f"{count:,}" for count in counts)


def _last_loss(run: Run) -> str:
    values = run.series("train", "loss")[1]
    return f"{values[-1]:.3g}" if values else "-"
