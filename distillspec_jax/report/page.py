"""One HTML page of a report: self-contained, without scripts, every text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence

from distillspec_jax.report.headline import Headline, headlines, lines, percent
from distillspec_jax.report.runs import Record, Run, evaluations
from distillspec_jax.report.tables import Table

CSS = """
:root { --ink: #22262d; --soft: #5b6472; --line: #e3e7ec; --page: #f6f7f9; --card: #fff;
  --accent: #0b6e99; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #a3abb8; --line: #343a45; --page: #16191e; --card: #1f232a;
    --accent: #5bb8df; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
.lead, .note, figcaption { color: var(--soft); }
.lead { max-width: 46rem; margin: 0 0 1.8rem; }
.note, figcaption { font-size: .85rem; max-width: 52rem; margin: .6rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.card, figure, .wide { background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }
.card { padding: 1.1rem 1.25rem; }
.card b { display: block; font-size: 2rem; line-height: 1.15; color: var(--accent);
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: .85rem; color: var(--soft); }
figure { margin: 0 0 1.25rem; padding: 1rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem;
  padding: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: left; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
.number { text-align: right; }
ul { padding-left: 1.2rem; }
"""

LEAD = (
    "A draft writes some tokens ahead, the target checks them in one call and keeps what its own "
    "law allows. Block efficiency is the number of tokens that one call of the target yields."
)
LOSSLESS = "The text is exactly what the target alone would have written, or has exactly its law."
PARTLY_LOSSLESS = (
    "In rows without a lenience the text is exactly what the target alone would have written, or "
    "has exactly its law; a lenience gives that up."
)
DIFFERENT = "Some greedy texts differ from what the target alone wrote: how many is counted below."


def page(
    title: str,
    runs: Sequence[Run],
    tables: Sequence[Table],
    figures: Mapping[str, tuple[str, bytes]],
) -> str:
    """The whole page.

    Args:
      title: heading and window title.
      runs: as `find_runs` gives them; each evaluation among them gets its headline figures.
      tables: in the order of the page.
      figures: file name -> (caption, SVG).
    """
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(_lead(runs))}</p>']
    for whose, run in evaluations(runs):
        heading = [f"<h2>{html.escape(run.name)}</h2>"] if whose else []
        body += [*heading, _cards(headlines(run)), _list(lines(run))]
    for name, (caption, svg) in figures.items():
        body.append(_figure(name, caption, svg))
    for table in tables:
        body += [f"<h2>{html.escape(table.title)}</h2>", table.html()]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def _lead(runs: Sequence[Run]) -> str:
    """Claims what the rows of the page claim."""
    summaries = [run.summary for run in runs if run.is_evaluation]
    lossless = [row["lossless"] for summary in summaries for row in summary["pooled"]]
    if not any(lossless):
        return LEAD
    if any(row.get("greedy_mismatches") for summary in summaries for row in summary["drafts"]):
        return f"{LEAD} {DIFFERENT}"
    return f"{LEAD} {LOSSLESS if all(lossless) else PARTLY_LOSSLESS}"


def _cards(found: Sequence[Headline]) -> str:
    cards = []
    for each in found:
        name = each.decoded["name"]
        cards.append(
            _card(
                f"{each.decoded['block_efficiency']:.2f}",
                f"tokens per target call with {name}, {each.mode}, gamma {each.decoded['gamma']}",
                _interval(each.decoded, "block_efficiency"),
            )
        )
        for gain in each.gains_in("block_efficiency"):
            cards.append(
                _card(
                    percent(gain["gain"]),
                    f"block efficiency of {gain['name']} over {gain['over']}, {each.mode}",
                    _interval(gain, "gain", percent),
                )
            )
        if each.timed:
            cards.append(
                _card(
                    f"{each.timed['speedup_wall_clock']:.2f}x",
                    f"wall clock of {name} over no draft, {each.mode}, gamma {each.timed['gamma']}",
                    _interval(each.timed, "speedup_wall_clock"),
                )
            )
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, label: str, detail: str) -> str:
    value, label, detail = (html.escape(text) for text in (value, label, detail))
    return f'<div class="card"><b>{value}</b><span>{label}</span><span>{detail}</span></div>'


def _interval(row: Record, key: str, show: Callable[[float], str] = "{:.2f}".format) -> str:
    if f"{key}_ci95" not in row:
        return "one prompt: no interval"
    low, high = row[f"{key}_ci95"]
    return f"95 % interval {show(low)} to {show(high)}"


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"


def _figure(name: str, caption: str, svg: bytes) -> str:
    # as an image: ids inside one SVG cannot meet those of another
    data = base64.b64encode(svg).decode()
    caption, name = html.escape(caption), html.escape(name)
    image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure id="{name}">{image}<figcaption>{caption}</figcaption></figure>'
