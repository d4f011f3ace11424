"""Estimates with 95 % intervals: a bootstrap over prompts, wider for few seeds, and an exact one.

Rates of decoding are ratios of sums over prompts (tokens over target calls, accepted over
tested), so prompts are what is resampled: tokens of one text are not independent of each other.
Seeds are too few to be resampled (of three, a bootstrap sees two thirds of the variance, and knows
no quantile of Student's): what they differ by is added as a variance with its degrees of freedom.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from distillspec_jax.errors import UserError

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the number of prompts that it rests on.

    The interval is all numbers where nothing is known of the spread: one prompt resampled is
    always itself.
    """

    value: float
    low: float
    high: float
    n: int

    def keys(self, name: str) -> dict[str, float | list[float]]:
        """The entries of a summary: `name`, and `name_ci95` where there is an interval."""
        if not np.isfinite([self.low, self.high]).all():
            return {name: self.value}
        return {name: self.value, f"{name}_ci95": [self.low, self.high]}

    def within(self, lowest: float, highest: float) -> Estimate:
        """The same with an interval, where there is one, that goes no further than is possible."""
        if not np.isfinite([self.low, self.high]).all():
            return self
        low, high = (float(np.clip(end, lowest, highest)) for end in (self.low, self.high))
        return dataclasses.replace(self, low=low, high=high)

    def overlaps(self, other: Estimate) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Resamples prompts with replacement, the same ones for all seeds, which meet all of them.

    All columns of one bootstrap see the same draws: ratios of two drafts measured on the same
    prompts are paired.
    """

    draws: int = 2000
    seed: int = 0

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums of values [prompts] or [seeds, prompts] in every resample: [draws] float64."""
        sums = np.sum(np.atleast_2d(np.asarray(values, np.float64)), axis=0)
        return _weights(self.draws, self.seed, sums.size) @ sums


@functools.lru_cache(maxsize=8)  # the same prompts are resampled for every figure of a run
def _weights(draws: int, seed: int, num_prompts: int) -> np.ndarray:
    """How often each draw takes each prompt: [draws, prompts]."""
    shares = np.full(num_prompts, 1 / num_prompts)
    return np.random.default_rng(seed).multinomial(num_prompts, shares, draws).astype(np.float64)


def worded(figures: Mapping[str, Any], name: str, form: str = ".3g") -> str:
    """A figure that `Estimate.keys` gave, with its interval, which one prompt does not have."""
    value, interval = format(figures[name], form), figures.get(f"{name}_ci95")
    if interval is None:
        return f"{value} (n=1)"
    low, high = (format(bound, form) for bound in interval)
    return f"{value} [{low}, {high}]"


def estimate(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[np.ndarray],
    bootstrap: Bootstrap | None = None,
) -> Estimate:
    """A function of column sums with its interval over prompts and seeds, if there are two prompts.

    One seed: the percentiles of the bootstrap. Several: Var = Var_prompts + Var_seeds / S, with
    Student's quantile at the degrees of freedom of such a sum (Satterthwaite 1946), and as skewed
    as the bootstrap. Where seeds are paired with those of a base, so are their ratios.

    Args:
      statistic: takes one array of sums per column and works elementwise.
      columns: each [prompts] or [seeds, prompts], the same prompts in the same order.
      bootstrap: draws and seed; by default 2000 and 0.

    Raises:
      UserError: no prompts, or columns that do not broadcast to one shape.
    """
    bootstrap = bootstrap or Bootstrap()
    try:
        tables = np.broadcast_arrays(*(np.atleast_2d(column) for column in columns))
    except ValueError:
        shapes = ", ".join(str(np.shape(column)) for column in columns)
        raise UserError(
            f"columns of a bootstrap differ in their prompts: shapes {shapes}"
        ) from None
    if not tables[0].size:
        raise UserError("an interval needs at least one prompt, got none")
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no test at all
        value = statistic(*(table.sum(dtype=np.float64) for table in tables))
        draws = statistic(*(bootstrap.totals(table) for table in tables))
    count, (low, high) = tables[0].shape[1], (-np.inf, np.inf)
    if count > 1:
        low, high = np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        with np.errstate(divide="ignore", invalid="ignore"):
            each = statistic(*(table.sum(axis=1, dtype=np.float64) for table in tables))
        low, high = _over_seeds(float(value), low, high, draws, each, count)
    return Estimate(float(value), float(low), float(high), count)


def _over_seeds(
    value: float, low: float, high: float, draws: np.ndarray, each: np.ndarray, num_prompts: int
) -> tuple[float, float]:
    """The interval [low, high] over prompts, widened by what the seeds' own values differ by."""
    each = each[np.isfinite(each)]
    of_seeds = np.var(each, ddof=1) / each.size if each.size > 1 else 0.0
    if of_seeds == 0:
        return low, high
    of_prompts = np.nanvar(draws)
    freedom = (of_prompts + of_seeds) ** 2 / (
        of_prompts**2 / (num_prompts - 1) + of_seeds**2 / (each.size - 1)
    )
    width = 2 * stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(of_prompts + of_seeds)
    below = np.clip((value - low) / (high - low), 0, 1) if high > low else 0.5
    return value - below * width, value + (1 - below) * width


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, bootstrap: Bootstrap | None = None
) -> Estimate:
    """sum(numerator) / sum(denominator) over prompts, never a mean of per-prompt ratios."""
    return estimate(np.divide, [numerator, denominator], bootstrap)


def ratio_of_ratios(
    numerator: np.ndarray,
    denominator: np.ndarray,
    base_numerator: np.ndarray,
    base_denominator: np.ndarray,
    bootstrap: Bootstrap | None = None,
) -> Estimate:
    """One rate over another one measured on the same prompts, resampled together."""
    columns = [numerator, denominator, base_numerator, base_denominator]
    return estimate(lambda a, b, c, d: (a / b) / (c / d), columns, bootstrap)


def exact_proportion(successes: int, trials: int) -> Estimate:
    """A share of independent trials with the exact interval of Clopper and Pearson (1934)."""
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"{successes} successes in {trials} trials are not a proportion")
    tail = (1 - LEVEL) / 2
    low = 0.0 if successes == 0 else stats.beta.ppf(tail, successes, trials - successes + 1)
    high = 1.0
    if successes < trials:
        high = stats.beta.ppf(1 - tail, successes + 1, trials - successes)
    return Estimate(successes / trials, float(low), float(high), trials)
