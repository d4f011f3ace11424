"""Task quality of decoded texts, in percent, with 95 % intervals.

The metrics are those of T5 and of the paper: exact match of the final number (GSM8K), ROUGE
(summaries) and BLEU (translation), by `rouge-score` and `sacrebleu` with T5's settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.evaluation.intervals import Estimate, estimate, exact_proportion, ratio

_FINAL_NUMBER = re.compile(r"####\s*([-+]?[$€£]?\s*\d[\d,]*(?:\.\d+)?)")


def final_number(text: str) -> float | None:
    """The number behind the last `####`, thousands separators and currency signs dropped."""
    found = _FINAL_NUMBER.findall(text)
    return float(re.sub(r"[$€£,\s]", "", found[-1])) if found else None


def exact_match_number(predictions: Sequence[str], references: Sequence[str]) -> Estimate:
    """Share of answers whose final number is the reference's, with the exact interval."""
    _check_pairs(predictions, references)
    wanted = [final_number(reference) for reference in references]
    if None in wanted:
        row = wanted.index(None)
        raise UserError(f"reference {row} has no final number '#### N': {references[row]!r}")
    right = sum(
        final_number(text) == number for text, number in zip(predictions, wanted, strict=True)
    )
    return _percent(exact_proportion(right, len(wanted)))


def rouge(
    predictions: Sequence[str], references: Sequence[str], kind: str = "rouge2"
) -> Estimate:
    """Mean F-measure of `rouge1`, `rouge2`, `rougeL` or `rougeLsum`, unstemmed as in T5."""
    _check_pairs(predictions, references)
    scorer = rouge_scorer.RougeScorer([kind])
    scores = [
        scorer.score(target=_sentences(reference), prediction=_sentences(text))[kind].fmeasure
        for text, reference in zip(predictions, references, strict=True)
    ]
    return _percent(ratio(np.array(scores), np.ones(len(scores))))


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")  # what rougeLsum takes for the end of a sentence


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Estimate:
    """Corpus BLEU (international tokens, exponential smoothing, cased), resampled by sentence."""
    _check_pairs(predictions, references)
    # effective order keeps sacrebleu from warning of sentence scores; only the counts are used
    scorer = BLEU(tokenize="intl", smooth_method="exp", effective_order=True)
    scores = [
        scorer.sentence_score(text, [reference])
        for text, reference in zip(predictions, references, strict=True)
    ]
    counts = np.array([s.counts + s.totals + [s.sys_len, s.ref_len] for s in scores])

    def corpus(*sums: np.ndarray) -> np.ndarray:
        rows = np.stack(np.atleast_1d(*sums), axis=-1).astype(int).tolist()
        values = np.array([_bleu_of_sums(row) for row in rows])
        return values if np.ndim(sums[0]) else values[0]

    return estimate(corpus, list(counts.T))


def _bleu_of_sums(sums: list[int]) -> float:
    orders = (len(sums) - 2) // 2
    score = BLEU.compute_bleu(
        sums[:orders], sums[orders:-2], sums[-2], sums[-1], smooth_method="exp"
    )
    return score.score


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Estimate]] = {
    "exact_match_number": exact_match_number,
    "rouge2": rouge,
    "bleu": bleu,
}


def quality(
    metric: str, predictions: Sequence[str], references: Sequence[str]
) -> Estimate | None:
    """Scores texts by a task's metric; None for a task that has none.

    Args:
      metric: `exact_match_number`, `rouge2`, `bleu` or `none`.
      predictions, references: texts, pairwise.

    Returns:
      Percent with its interval.

    Raises:
      UserError: unknown metric, no texts or unequal numbers of them, a reference without number.
    """
    if metric == "none":
        return None
    if metric not in METRICS:
        raise unknown_name("metric", metric, [*METRICS, "none"])
    return METRICS[metric](predictions, references)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise UserError(
            f"quality needs as many predictions as references and at least one, "
            f"got {len(predictions)} and {len(references)}"
        )


def _percent(share: Estimate) -> Estimate:
    return dataclasses.replace(
        share, value=100 * share.value, low=100 * share.low, high=100 * share.high
    )
