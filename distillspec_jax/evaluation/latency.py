"""Wall clock: what a step costs, what speed-up that predicts, and what the clock says.

Everything that is compared is timed side by side in one process, interleaved, after a warm-up
whose time is reported apart; the middle of the repeats stands for each prompt, and intervals
resample prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import isotonic_regression

from distillspec_jax.evaluation.intervals import Estimate, ratio, ratio_of_ratios
from distillspec_jax.models import cache as caches
from distillspec_jax.models.transformer import Params, Transformer, extend, in_compute_dtype, start

Call = Callable[[], Any]
ROUNDS = 9, 25  # of timing single steps, at least and at most
ENOUGH = 5.0  # seconds of them
STRETCH = 8  # prompts that a decoder takes in a row
DRAFT_STEP, TARGET_STEP = "draft step", "target step"  # names of loops, as verify(gamma)


def predicted_speedup(
    block_efficiency: float, gamma: int, cost_ratio: float, verification_cost: float = 1.0
) -> float:
    """tau / (c gamma + v): tokens per block over its cost in target steps.

    With v = 1 the formula of the papers (arXiv 2211.17192, theorem 3.8); with
    c = params(draft) / params(target) the memory-bound speed-up MBSU of arXiv 2404.08856.
    """
    return block_efficiency / (cost_ratio * gamma + verification_cost)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of calls that were timed side by side: [repeats], first call apart."""

    seconds: np.ndarray
    first_call: float  # compilation included

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def side_by_side(calls: Mapping[str, Call], *, repeats: int, seed: int = 0) -> dict[str, Timing]:
    """Times calls in rounds; in each round every call runs once, in a fresh random order.

    Args:
      calls: functions that return arrays; a call ends when its arrays are ready.
      repeats: rounds, after one round of warm-up.
      seed: of the order, which must not favour the call that follows a cheap one.
    """
    first = {name: _timed(call)[0] for name, call in calls.items()}
    rounds = [_round(calls, np.random.default_rng([seed, i])) for i in range(repeats)]
    seconds = {name: np.array([taken[name] for taken in rounds]) for name in calls}
    return {name: Timing(seconds[name], first[name]) for name in calls}


def _round(calls: Mapping[str, Call], rng: np.random.Generator) -> dict[str, float]:
    return {name: _timed(calls[name])[0] for name in rng.permutation(list(calls))}


def _timed(call: Call) -> tuple[float, Any]:
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


@functools.partial(jax.jit, static_argnames=("model", "limit"))
def read_source(model, params, inputs, limit):
    """`transformer.start`, compiled: what a decoder does before its first step."""
    return start(model, params, inputs, limit)


@functools.partial(jax.jit, static_argnames=("model", "width", "steps"))
def _steps(model, params, cache, pending, width, steps):
    """`steps` calls of the model on blocks of `width` tokens, one token kept after each."""

    def step(_, carry):
        cache, block = carry
        logits, longer = extend(model, params, cache, block)
        # the next block depends on all logits, so that no position is optimised away
        return caches.rollback(longer, cache.lengths + 1), jnp.argmax(logits, axis=-1)

    params = in_compute_dtype(model, params)
    block = jnp.broadcast_to(pending[:, None], (pending.shape[0], width))
    return jax.lax.fori_loop(0, steps, step, (cache, block))[1]


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Seconds of one model call, timed inside a compiled loop as decoding runs it.

    draft_step, target_step: one token.
    verification: seconds of one target call on gamma + 1 tokens, by gamma.
    """

    draft_step: float
    target_step: float
    verification: dict[int, float]

    @property
    def cost_ratio(self) -> float:
        """c, one draft step over one target step."""
        return self.draft_step / self.target_step

    def verification_cost(self, gamma: int) -> float:
        """v(gamma), verifying gamma + 1 positions over one target step."""
        return self.verification[gamma] / self.target_step


def step_costs(
    target: Transformer,
    target_params: Params,
    draft: Transformer,
    draft_params: Params,
    inputs: jax.Array,
    gammas: Iterable[int],
    *,
    steps: int = 32,
) -> StepCosts:
    """Measures draft step, target step and verification side by side; encoding is left out.

    More positions never cost less: where the medians say so, by the noise of a shared machine,
    they are pooled (isotonic regression). Else the gamma with the luckiest timing would be chosen.

    Args:
      inputs: [B, S] int32, a typical batch of prompts; B = 1 is what the papers report.
      gammas: block lengths whose verification is to be timed.
      steps: model calls in one timed loop, which keeps dispatch out of the figure.
    """
    gammas = sorted(set(gammas))
    models = target, target_params, draft, draft_params
    calls = step_loops(*models, inputs, gammas, steps=steps)
    one_round = sum(timing.median for timing in side_by_side(calls, repeats=1).values())
    timings = side_by_side(calls, repeats=int(np.clip(ENOUGH / one_round, *ROUNDS)))
    second = {name: timing.median / steps for name, timing in timings.items()}
    costs = [second[TARGET_STEP], *(second[verify(gamma)] for gamma in gammas)]
    target_step, *verification = isotonic_regression(costs).x.tolist()
    by_gamma = dict(zip(gammas, verification, strict=True))
    return StepCosts(second[DRAFT_STEP], target_step, by_gamma)


def step_loops(
    target: Transformer,
    target_params: Params,
    draft: Transformer,
    draft_params: Params,
    inputs: jax.Array,
    gammas: Sequence[int],
    *,
    steps: int,
) -> dict[str, Call]:
    """The compiled loops of `steps` model calls that `step_costs` times, by name."""
    limit = steps + max(gammas, default=0) + 1
    calls: dict[str, Call] = {}

    def add(name: str, model: Transformer, params: Params, width: int) -> None:
        cache, pending = read_source(model, params, inputs, limit)
        calls[name] = lambda: _steps(model, params, cache, pending, width, steps)

    add(DRAFT_STEP, draft, draft_params, 1)
    add(TARGET_STEP, target, target_params, 1)
    for gamma in gammas:
        add(verify(gamma), target, target_params, gamma + 1)
    return calls


def verify(gamma: int) -> str:
    """Name of the loop that verifies gamma + 1 positions."""
    return f"verify {gamma}"


@dataclasses.dataclass(frozen=True)
class Clock:
    """Decoders timed on the same prompts; rows are batches of them, in the order given.

    seconds: by decoder, [P], median over the repeats of each batch.
    tokens: by decoder, [P], tokens emitted for it.
    spread: by decoder, (max - min) / median of the repeats, median over batches.
    compile_seconds: by decoder, its first calls, one of each shape, less the medians after.
    batch_size: prompts of a batch.
    """

    seconds: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    spread: dict[str, float]
    compile_seconds: dict[str, float]
    batch_size: int = 1

    @classmethod
    def join(cls, clocks: Sequence[Clock]) -> Clock:
        """One clock of several whose decoders have different names, on batches of one size."""

        def joined(column: str) -> dict[str, Any]:
            return dict(ChainMap(*(getattr(clock, column) for clock in clocks)))

        return cls(
            seconds=joined("seconds"),
            tokens=joined("tokens"),
            spread=joined("spread"),
            compile_seconds=joined("compile_seconds"),
            batch_size=clocks[0].batch_size,
        )

    def tokens_per_second(self, names: Sequence[str]) -> Estimate:
        """Tokens over seconds; several names are seeds of one decoder, and widen the interval."""
        return ratio(_stack(self.tokens, names), _stack(self.seconds, names))

    def speedup(self, names: Sequence[str], over: Sequence[str]) -> Estimate:
        """Rate of a decoder (of its seeds) over another's, paired by prompt."""
        return ratio_of_ratios(
            _stack(self.tokens, names),
            _stack(self.seconds, names),
            _stack(self.tokens, over),
            _stack(self.seconds, over),
        )

    def keys(self, names: Sequence[str], target: str) -> dict[str, Any]:
        """Entries of a summary: rates of the target alone and with a draft, and their ratio."""
        return {
            **self.tokens_per_second([target]).keys("tokens_per_second_target"),
            **self.tokens_per_second(names).keys("tokens_per_second_speculative"),
            **self.speedup(names, [target]).keys("speedup_wall_clock"),
            "timed_prompts": len(self.seconds[target]) * self.batch_size,
            "timing_spread": max(self.spread[name] for name in [*names, target]),
            "compile_seconds": max(self.compile_seconds[name] for name in names),
        }


def _stack(column: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.stack([column[name] for name in names])


Decoder = Callable[[Any], tuple[jax.Array, jax.Array]]


def race(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Any],
    *,
    batch_size: int = 1,
    repeats: int = 3,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> Clock:
    """Decodes each prompt with every decoder, interleaved, `repeats` times after a warm-up.

    The warm-up is one prompt of each shape, on which decoders compile.

    The decoders take turns, in a fresh random order, over a few prompts at a time: right behind
    another program a call also brings back what that drove out of the caches, milliseconds that
    are no part of decoding in use.

    Args:
      decoders: by name, prompt -> (tokens [B, T], lengths [B]).
      prompts: what the decoders take, one at a time: batches of `batch_size` prompts.
      repeats: timed rounds per prompt; their median counts.
      on_prompt: told again and again about how many of them are done.
    """
    shapes = [str(jax.tree.map(np.shape, prompt)) for prompt in prompts]
    of_each = sorted({shapes.index(shape) for shape in shapes})
    first = {
        name: {i: _timed(functools.partial(f, prompts[i]))[0] for i in of_each}
        for name, f in decoders.items()
    }
    seconds = {name: np.zeros((len(prompts), repeats)) for name in decoders}
    tokens = {name: np.zeros(len(prompts), np.int64) for name in decoders}
    turns = list(_turns(list(decoders), len(prompts), repeats))
    for done, (rows, repeat, name) in enumerate(turns, 1):
        for row in rows:
            call = functools.partial(decoders[name], prompts[row])
            seconds[name][row, repeat], (_, lengths) = _timed(call)
            tokens[name][row] = np.sum(lengths)
        on_prompt(len(prompts) * done // len(turns))
    middle = {name: np.median(table, axis=1) for name, table in seconds.items()}
    return Clock(
        seconds=middle,
        tokens=tokens,
        spread={n: float(np.median(np.ptp(seconds[n], axis=1) / middle[n])) for n in decoders},
        compile_seconds={
            name: sum(max(taken - float(middle[name][i]), 0.0) for i, taken in calls.items())
            for name, calls in first.items()
        },
        batch_size=batch_size,
    )


def _turns(names: Sequence[str], count: int, repeats: int) -> Iterator[tuple[range, int, str]]:
    """(Prompts, repeat, name) of every turn: each name once for each repeat of each stretch."""
    for begin in range(0, count, STRETCH):
        rows = range(begin, min(begin + STRETCH, count))
        for repeat in range(repeats):
            for name in np.random.default_rng([begin, repeat]).permutation(names):
                yield rows, repeat, name
