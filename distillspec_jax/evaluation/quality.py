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
from distillspec_jax.evaluation.intervals import Estimate, estimate, exact_proportion

_FINAL_NUMBER = re.compile(r"####\s*([-+]?[$€£]?\s*\d[\d,]*(?:\.\d+)?)")


def final_number(text: str) -> float | None:
    """The number behind the last `####` that has one, without signs of currency and thousands."""
    found = _FINAL_NUMBER.findall(text)
    return float(re.sub(r"[$€£,\s]", "", found[-1])) if found else None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of a corpus: columns of numbers per text, and what their sums make.

    columns: (predictions, references) -> arrays [texts].
    statistic: sums of the columns -> share of 1; elementwise.
    is_proportion: whether the first column counts successes.
    """

    columns: Callable[[Sequence[str], Sequence[str]], list[np.ndarray]]
    statistic: Callable[..., np.ndarray] = np.divide
    is_proportion: bool = False


Where = Callable[[int], str]


def _numbers(references: Sequence[str], where: Where = "reference {}".format) -> list[float | None]:
    wanted = [final_number(reference) for reference in references]
    if None in wanted:
        row = wanted.index(None)
        raise UserError(
            f"{where(row)} has no final number '#### N', as metric 'exact_match_number' wants it: "
            f"{references[row]!r}"
        )
    return wanted


def _number_matches(predictions: Sequence[str], references: Sequence[str]) -> list[np.ndarray]:
    pairs = zip(predictions, _numbers(references), strict=True)
    return _mean_of([final_number(text) == number for text, number in pairs])


def _mean_of(values: Sequence[float]) -> list[np.ndarray]:
    return [np.array(values, np.float64), np.ones(len(values))]


def _rouge(kind: str) -> Metric:
    """Mean F-measure of rouge1, rouge2, rougeL or rougeLsum, unstemmed as in T5."""

    def columns(predictions: Sequence[str], references: Sequence[str]) -> list[np.ndarray]:
        scorer = rouge_scorer.RougeScorer([kind])
        pairs = zip(predictions, references, strict=True)
        return _mean_of(
            [
                scorer.score(target=_sentences(reference), prediction=_sentences(text))[
                    kind
                ].fmeasure
                for text, reference in pairs
            ]
        )

    return Metric(columns)


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")  # what rougeLsum takes for the end of a sentence


def _bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> list[np.ndarray]:
    """Matching and all n-grams of each order, and both lengths: what corpus BLEU is made of."""
    # effective order keeps sacrebleu from warning of sentence scores; only the counts are used
    scorer = BLEU(tokenize="intl", smooth_method="exp", effective_order=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.sentence_score(text, [reference]) for text, reference in pairs]
    return list(np.array([s.counts + s.totals + [s.sys_len, s.ref_len] for s in scores]).T)


def _bleu(*sums: np.ndarray) -> np.ndarray:
    rows = np.stack(sums, axis=-1).astype(int)
    return np.apply_along_axis(_bleu_of_sums, -1, rows) / 100


def _bleu_of_sums(sums: np.ndarray) -> float:
    correct, total = sums[:-2].reshape(2, -1).tolist()
    sys_len, ref_len = sums[-2:].tolist()
    return BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score


METRICS = {
    "exact_match_number": Metric(_number_matches, is_proportion=True),
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "bleu": Metric(_bleu_counts, _bleu),
}


def has_references(
    metric: str, references: Sequence[str], where: Where = "reference {}".format
) -> bool:
    """Whether texts can be scored: by a metric, against references, of which none is missing.

    `where` says where a reference is from. Raises UserError for an unknown metric, and if only
    some have a reference that it can read.
    """
    if metric == "none":
        return False
    if metric not in METRICS:
        raise unknown_name("metric", metric, [*METRICS, "none"])
    empty = [row for row, reference in enumerate(references) if not reference.strip()]
    if empty and len(empty) < len(references):
        raise UserError(
            f"{len(empty)} of {len(references)} references are empty, the first is "
            f"{where(empty[0])}; metric '{metric}' needs all of them, or give metric 'none'"
        )
    if empty:
        return False
    if metric == "exact_match_number":
        _numbers(references, where)
    return True


def quality(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Estimate | None:
    """Scores texts by a task's metric; None for a task that has none, or no references.

    Args:
      metric: `exact_match_number` (number behind the last `####`), `rouge1`, `rouge2`, `rougeL`,
        `rougeLsum` (mean F-measure, no stemming), `bleu` (of the corpus, international tokens,
        exponential smoothing, cased) or `none`.
      predictions, references: texts, pairwise.

    Returns:
      Percent; the interval is exact for a proportion, else resampled by text.

    Raises:
      UserError: unknown metric, no texts or unequal numbers of them, a reference without number.
    """
    return pooled_quality(metric, [predictions], references)


def pooled_quality(
    metric: str, seeds: Sequence[Sequence[str]], references: Sequence[str]
) -> Estimate | None:
    """`quality` of several seeds' texts on the same prompts; the interval is over both."""
    for predictions in seeds:
        if len(predictions) != len(references) or not references:
            raise UserError(
                f"quality needs as many predictions as references and at least one, "
                f"got {len(predictions)} and {len(references)}"
            )
    if not has_references(metric, references):
        return None
    kind = METRICS[metric]
    tables = [kind.columns(predictions, references) for predictions in seeds]
    columns = [np.stack(column) for column in zip(*tables, strict=True)]
    if kind.is_proportion and not np.ptp(columns[0], axis=0).any():  # one seed, or all alike
        share = exact_proportion(int(columns[0][0].sum()), len(references))
    else:
        share = estimate(kind.statistic, columns)
    share = share.within(0.0, 1.0)
    return dataclasses.replace(
        share, value=100 * min(share.value, 1.0), low=100 * share.low, high=100 * share.high
    )
