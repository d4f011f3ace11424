"""A trained target with and without its draft, and Hugging Face with the same two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.data.pipeline import trimmed
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.block_length import Tuning, efficiency_by_gamma, tune
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.decoding.state import SpeculativeOutput
from distillspec_jax.evaluation.acceptance import block_efficiency
from distillspec_jax.evaluation.intervals import estimate, ratio_of_ratios
from distillspec_jax.evaluation.latency import (
    DRAFT_STEP,
    TARGET_STEP,
    Clock,
    race,
    read_source,
    step_costs,
    step_loops,
    verify,
)
from distillspec_jax.models.transformer import Transformer
from experiments.bench import read_prompts
from experiments.benchmarks.decode import Config, Found, Row
from experiments.models import load

READ_TARGET, READ_DRAFT = "read target", "read draft"  # the source, which no formula knows
PAIRS = {  # figure: (decoder, decoder it is held against)
    "speculative_over_plain": ("speculative", "plain"),
    "speculative_over_huggingface": ("speculative", "huggingface"),
    "speculative_over_huggingface_assisted": ("speculative", "huggingface_assisted"),
    "huggingface_assisted_over_huggingface": ("huggingface_assisted", "huggingface"),
}


def measure(config: Config, seed: int, has_peers: bool) -> Found:
    """Chooses gamma on the tuning split, then times every batch size on the test split."""
    del seed  # nothing is drawn: greedy, and prompts in order
    return _Run(config, has_peers).measure()


class _Run:
    """Target and draft, ours and Hugging Face's."""

    def __init__(self, config: Config, has_peers: bool) -> None:
        task = load_task(TaskConfig())
        self._config = config
        self._target, self._draft = load(config.target, task), load(config.draft, task)
        self._tuning = read_prompts(task, "tuning", config.tuning_prompts).inputs
        self._prompts = read_prompts(task, "test", config.prompts).inputs
        self._key = jax.random.key(0)
        self._peers: dict[str, Any] = {}
        if has_peers:
            from experiments.benchmarks.torch_decode import HuggingFace

            for role, loaded in (("target", self._target), ("draft", self._draft)):
                self._peers[role] = HuggingFace(loaded.model, loaded.params)

    def measure(self) -> Found:
        print(f"drafted: {self._config.target} with {self._config.draft}", flush=True)
        tried = self._speculative(self._tuning, max(self._config.gammas))
        efficiency = efficiency_by_gamma(np.sum(tried.statistics.emitted_histogram, axis=0))
        summary: Row = {
            "temperature": 0.0,
            "num_prompts": len(self._prompts),
            **self._block_gain(),
        }
        records: list[Row] = []
        for batch_size in self._config.batch_sizes:
            tuned, costs = self._tune(batch_size, efficiency)
            print(f"drafted: batch {batch_size}, gamma {tuned.gamma}", flush=True)
            figures, row = self._timed(batch_size, tuned.gamma)
            place = "" if batch_size == 1 else f"_batch{batch_size}"
            for key, value in {**costs, **figures}.items():
                stem, interval, _ = key.partition("_ci95")
                summary[stem + place + interval] = value
            predicted = {f"predicted_gamma{g}": value for g, value in tuned.speedups.items()}
            records.append({**costs, **row, **predicted})
        return summary, records

    @property
    def _models(self) -> tuple[Transformer, Any, Transformer, Any]:
        target, draft = self._target, self._draft
        return target.model, target.params, draft.model, draft.params

    def _loops(self, gamma: int) -> dict[str, Callable[[np.ndarray], Any]]:
        """Single steps as entrants of a race: what they cost in the very seconds of the decoders.

        On a shared machine c and v drift from minute to minute, and the prediction with them.
        """
        steps, inputs = self._config.cost_steps, jnp.asarray(trimmed(self._prompts[:1]))
        loops = step_loops(*self._models, inputs, [gamma], steps=steps)

        def entrant(call: Callable[[], Any]) -> Callable[[np.ndarray], Any]:
            return lambda _: (call(), np.array([steps]))

        limit = self._config.max_new_tokens

        def reader(loaded: Any) -> Callable[[np.ndarray], Any]:
            call = functools.partial(read_source, loaded.model, loaded.params)
            return lambda prompt: (call(prompt, limit), np.zeros(1))

        readers = {READ_TARGET: reader(self._target), READ_DRAFT: reader(self._draft)}
        return {name: entrant(call) for name, call in loops.items()} | readers

    def _tune(self, batch_size: int, efficiency: Mapping[int, float]) -> tuple[Tuning, Row]:
        """The gamma of the highest predicted speed for so many rows, and what it is made of.

        On prompts that nothing is claimed of. More rows make a verified position dearer.
        """
        costs = step_costs(
            *self._models,
            jnp.asarray(trimmed(self._prompts[:batch_size])),
            self._config.gammas,
            steps=self._config.cost_steps,
        )
        verification = {gamma: costs.verification_cost(gamma) for gamma in self._config.gammas}
        tuned = tune(efficiency, costs.cost_ratio, verification)
        return tuned, {
            "gamma": tuned.gamma,
            "cost_ratio": costs.cost_ratio,
            "verification_cost": verification[tuned.gamma],
        }

    def _speculative(
        self, inputs: np.ndarray, gamma: int, verification: str = "token", temperature: float = 0.0
    ) -> SpeculativeOutput:
        return speculative_sample(
            *self._models,
            inputs,
            self._key,
            gamma=gamma,
            max_new_tokens=self._config.max_new_tokens,
            sampling=Sampling(temperature),
            verification=verification,
        )

    def _block_gain(self) -> Row:
        """Block efficiency of block verification over token verification, at temperature 1."""
        gamma = max(self._config.gammas)
        columns = []
        for rule in ("block", "token"):
            counts = self._speculative(self._prompts, gamma, rule, temperature=1.0).statistics
            columns += [np.asarray(counts.emitted), np.asarray(counts.target_calls)]
        block_tokens, block_calls, token_tokens, token_calls = columns
        gain = ratio_of_ratios(block_tokens, block_calls, token_tokens, token_calls)
        return gain.keys("block_verification_gain")

    def _decoders(self, batch_size: int, gamma: int) -> dict[str, Callable[[np.ndarray], Any]]:
        limit = self._config.max_new_tokens

        def plain(inputs: np.ndarray) -> Any:
            output = autoregressive_sample(
                self._target.model,
                self._target.params,
                inputs,
                self._key,
                sampling=Sampling(temperature=0.0),
                max_new_tokens=limit,
            )
            return output.tokens, output.lengths

        def speculative(inputs: np.ndarray) -> Any:
            output = self._speculative(inputs, gamma)
            return output.tokens, output.lengths

        decoders: dict[str, Callable[[np.ndarray], Any]] = {
            "plain": plain,
            "speculative": speculative,
        }
        if self._peers:
            generate, draft = self._peers["target"].generate, self._peers["draft"]
            decoders["huggingface"] = functools.partial(generate, max_new_tokens=limit)
            if batch_size == 1:
                decoders["huggingface_assisted"] = functools.partial(
                    generate, max_new_tokens=limit, assistant=draft, gamma=gamma
                )
        return decoders

    def _timed(self, batch_size: int, gamma: int) -> tuple[Row, Row]:
        """(Figures of the summary, the record) of one batch size."""
        count = len(self._prompts) // batch_size
        groups = self._prompts[: count * batch_size].reshape(count, batch_size, -1)
        batches = [trimmed(group) for group in groups]  # as `decode` reads them
        decoders = self._decoders(batch_size, gamma)
        loops = self._loops(gamma) if batch_size == 1 else {}
        clock = race({**decoders, **loops}, batches, repeats=self._config.repeats)
        figures: Row = {}
        for key, (name, over) in PAIRS.items():
            if name in decoders and over in decoders:
                figures |= clock.speedup([name], [over]).keys(key)
        blocks = [self._speculative(batch, gamma).statistics for batch in batches]
        emitted = np.array([np.sum(each.emitted) for each in blocks])
        calls = np.array([np.sum(each.target_calls) for each in blocks])
        figures |= block_efficiency(emitted, calls, gamma).keys("block_efficiency")
        if batch_size == 1:  # in larger batches rows wait for each other
            figures |= _over_prediction(clock, emitted, calls, gamma)
        rates = {
            f"{name}_tokens_per_second": clock.tokens_per_second([name]).value for name in decoders
        }
        row = {
            "name": f"batch {batch_size}",
            "target": self._config.target,
            "draft": self._config.draft,
            "batch_size": batch_size,
            "gamma": gamma,
            **rates,
            **_equal(decoders, batches),
            **{f"{name}_compile_seconds": clock.compile_seconds[name] for name in decoders},
            **figures,
        }
        return figures, row


def _over_prediction(clock: Clock, emitted: np.ndarray, calls: np.ndarray, gamma: int) -> Row:
    """Measured speed-up over tau / (c gamma + v), prompts resampled together; c and v.

    Once by the whole clock, once without the reading of the source, which the formula leaves out.
    """
    names = ("speculative", "plain", DRAFT_STEP, TARGET_STEP, verify(gamma))
    spent, base_spent, *steps = (clock.seconds[name] for name in names)
    source = clock.seconds[READ_TARGET]
    sources = source + clock.seconds[READ_DRAFT]

    def over_prediction(tokens, spent, base_tokens, base_spent, emitted, calls, draft, target, v):
        speedup = tokens / spent / (base_tokens / base_spent)
        return speedup / (emitted / calls) * (draft * gamma + v) / target

    def found(spent: np.ndarray, base_spent: np.ndarray, key: str) -> Row:
        columns = [clock.tokens["speculative"], spent, clock.tokens["plain"], base_spent]
        return estimate(over_prediction, [*columns, emitted, calls, *steps]).keys(key)

    draft, target, verification = (float(column.sum()) for column in steps)
    return {
        "cost_ratio": draft / target,
        "verification_cost": verification / target,
        **found(spent, base_spent, "speculative_over_prediction"),
        **found(spent - sources, base_spent - source, "speculative_over_prediction_decoding"),
    }


def _equal(decoders: Mapping[str, Callable[[np.ndarray], Any]], batches: list[np.ndarray]) -> Row:
    """Texts of every decoder that are those of plain decoding to the last token."""
    equal = dict.fromkeys(decoders, 0)
    for batch in batches:
        texts = {name: np.asarray(decode(batch)[0]) for name, decode in decoders.items()}
        for name, tokens in texts.items():
            equal[name] += int(np.all(tokens == texts["plain"], axis=1).sum())
    counts = {f"{name}_equal_texts": count for name, count in equal.items() if name != "plain"}
    return {**counts, "compared_texts": sum(map(len, batches))}
