"""What a run of `evaluate` says in a few words."""

from __future__ import annotations

import dataclasses

from distillspec_jax.report.runs import Record, Run


@dataclasses.dataclass(frozen=True)
class Headline:
    """One temperature of an evaluation, for its last draft.

    decoded: its row at the first gamma of the config, which all drafts share.
    timed: its row of the highest measured speed; None where the clock was off.
    gains: ratios over the other drafts, in block efficiency and in speed.
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
        timed = [r for r in mine if "speedup_wall_clock" in r and r["batch_size"] == size]
        gains = [
            gain
            for gain in run.summary["gains"]
            if gain["temperature"] == temperature and gain.get("batch_size", size) == size
        ]
        fastest = max(timed, key=lambda row: row["speedup_wall_clock"], default=None)
        gamma = mine[0]["gamma"]
        shared = [g for g in gains if g["figure"] != "block_efficiency" or g["gamma"] == gamma]
        found.append(Headline(mine[0], fastest, shared))
    return found


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
    gains = [f"{percent(gain['gain'])} over {gain['over']}" for gain in headline.gains_in(figure)]
    return f" ({', '.join(gains)})" if gains else ""


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
