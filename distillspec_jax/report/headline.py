"""What a run of `evaluate` says in a few words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distillspec_jax.report.runs import Record, Run


@dataclasses.dataclass(frozen=True)
class Headline:
    """One temperature of an evaluation, for its last draft.

    decoded: its row at the first gamma of the config, which all drafts share.
    timed: its row at the tuned gamma, else at the first one; None where the clock was off.
    gains: ratios over the other drafts, in block efficiency and in speed, of those two rows.
    """

    decoded: Record
    timed: Record | None
    gains: list[Record]

    @property
    def mode(self) -> str:
        temperature = self.decoded["temperature"]
        return "greedy" if temperature == 0 else f"T = {temperature:g}"

    def gains_in(self, figure: str) -> list[Record]:
        return [gain for gain in self.gains if gain["figure"] == figure]


def headlines(run: Run) -> list[Headline]:
    """One headline per temperature; none where every setting gave the target's law up."""
    # in the order of the config; the last row may be any draft's, at the gamma chosen for it
    name = list(dict.fromkeys(row["name"] for row in run.summary["pooled"]))[-1]
    rows = [row for row in run.summary["pooled"] if row["name"] == name and row["lossless"]]
    found = []
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        mine = [row for row in rows if row["temperature"] == temperature]
        size = mine[0].get("batch_size")  # to which predictions and gains belong
        clocked = [
            row for row in mine if "speedup_wall_clock" in row and row.get("batch_size") == size
        ]
        gains = [
            gain
            for gain in run.summary["gains"]
            if (gain["name"], gain["temperature"]) == (name, temperature)
            and gain.get("batch_size", size) == size
        ]
        timed = _timed(clocked, gains)
        row_of = {"block_efficiency": mine[0], "tokens_per_second": timed or {}}
        gains = [g for g in gains if g["gamma"] == row_of.get(g["figure"], {}).get("gamma")]
        found.append(Headline(mine[0], timed, gains))
    return found


def _timed(rows: Sequence[Record], gains: Sequence[Record]) -> Record | None:
    """The row at the tuned gamma, which gains in speed tell; by default the first one."""
    # never the fastest: that would choose gamma on the prompts of the claim
    tuned = [gain["gamma"] for gain in gains if gain["figure"] == "tokens_per_second"]
    return next((row for row in rows if row["gamma"] in tuned), rows[0] if rows else None)


def percent(gain: float) -> str:
    return f"{100 * (gain - 1):+.1f} %"


def lines(run: Run) -> list[str]:
    """Three lines: tokens per target call, wall clock, and what proves that nothing was lost.

    Or one, where no setting is lossless: a headline would compare what is not the same.
    """
    found = headlines(run)
    if not found:
        return ["no lossless setting was measured; the tables show the others"]
    name = found[0].decoded["name"]
    decoded = [
        f"{each.mode} {each.decoded['block_efficiency']:.2f}{_over(each, 'block_efficiency')}"
        for each in found
    ]
    timed = [
        f"{each.mode} {each.timed['speedup_wall_clock']:.2f}x at gamma {each.timed['gamma']}"
        f"{_over(each, 'tokens_per_second')}"
        for each in found
        if each.timed
    ]
    gamma = found[0].decoded["gamma"]
    return [
        f"block efficiency of '{name}', gamma {gamma}: {'; '.join(decoded)}",
        f"wall clock over no draft: {'; '.join(timed) or 'not measured'}",
        f"lossless: {_proof(run)}",
    ]


def _over(headline: Headline, figure: str) -> str:
    gains = [f"{percent(gain['gain'])} over {_base(gain)}" for gain in headline.gains_in(figure)]
    return f" ({', '.join(gains)})" if gains else ""


def _base(gain: Record) -> str:
    """What a gain is over, and at which gamma where that is another one."""
    gamma = gain.get("gamma_over", gain["gamma"])
    return gain["over"] if gamma == gain["gamma"] else f"{gain['over']} at its gamma {gamma}"


def _proof(run: Run) -> str:
    """How many greedy texts equal plain greedy decoding's, over all drafts; and the quality."""
    greedy = [row for row in run.summary["drafts"] if "greedy_mismatches" in row]
    rows = {(r["name"], r["seed"], r["gamma"]): r for r in greedy}.values()
    texts = sum(row["num_prompts"] for row in rows)
    equal = texts - sum(row["greedy_mismatches"] for row in rows)
    parts = [f"{equal:,} of {texts:,} greedy texts equal plain decoding's"] if texts else []
    for headline in headlines(run):
        row = headline.decoded
        if row.get("quality") is not None:
            metric = row["quality_metric"].replace("_", " ")
            parts.append(f"{metric} {row['quality']:.1f} % ({headline.mode})")
    return ", ".join(parts) or "not checked (no greedy decoding)"
