"""Estimates with 95 % intervals: a bootstrap over prompts (and seeds), and an exact one.

Rates of decoding are ratios of sums over prompts (tokens over target calls, accepted over
tested), so prompts are what is resampled: tokens of one text are not independent of each other.
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

    def overlaps(self, other: Estimate) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Resamples prompts, and seeds where there are several, with replacement.

    Seeds and prompts are crossed (every seed meets the same prompts), so they are drawn
    independently of each other. All columns of one bootstrap see the same draws: ratios of two
    drafts measured on the same prompts are paired.
    """

    draws: int = 2000
    seed: int = 0

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums of values [prompts] or [seeds, prompts] in every resample: [draws] float64."""
        table = np.atleast_2d(np.asarray(values, np.float64))
        seeds, prompts = _weights(self.draws, self.seed, *table.shape)
        return np.einsum("ds,ds->d", seeds, prompts @ table.T)


@functools.lru_cache(maxsize=8)  # the same prompts are resampled for every figure of a run
def _weights(
    draws: int, seed: int, num_seeds: int, num_prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw takes each seed [draws, seeds] and each prompt [draws, prompts]."""
    rng = np.random.default_rng(seed)
    # prompts first: their draws then do not depend on how many seeds there are
    prompts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), draws)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), draws)
    return seeds.astype(np.float64), prompts.astype(np.float64)


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
    """A function of column sums with its percentile bootstrap interval, if there are two prompts.

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
    return Estimate(float(value), float(low), float(high), count)


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
