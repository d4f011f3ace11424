"""What the training entrypoints look at every so many steps, on examples that are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distillspec_jax import hosts
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.evaluation.acceptance import acceptance_rate, block_efficiency
from distillspec_jax.evaluation.quality import has_references, quality
from distillspec_jax.models.transformer import Transformer
from experiments.checks import check_entries, check_least
from experiments.models import Loaded

LOW_EOS_RATE = 0.5  # below it most texts are cut by the limit, and little is learnt of the end
MEND_ENDS = "config.rollout_length or fine-tune the model that writes them"
TRIAL = 0x7A0  # folded into the seed: no other purpose draws these numbers
TAU, ALPHA = "block_efficiency", "acceptance_rate"  # of a temperature, as block_efficiency_t0
MEAN = "block_efficiency_mean"  # over the temperatures: what the best draft is chosen by

Place = Callable[[Batch], Batch]
Watch = Callable[[Any], dict[str, Any]]  # params -> figures


def told_of_ends(rate: float, texts: str, mend: str) -> str:
    """A warning if most of the texts that were written did not end; else, or if none was, ""."""
    if not rate < LOW_EOS_RATE:  # NaN, where none was written, is not low
        return ""
    return f"warning: only {rate:.0%} of {texts} ended by themselves; raise {mend}"


def make_quality(
    model: Transformer,
    task: Task,
    batches: Sequence[Batch],
    *,
    place: Place = jax.device_put,
    where: Callable[[int], str] = "reference {}".format,
) -> Watch:
    """Returns params -> {"quality": percent} of the model's greedy answers by the task's metric.

    `place` puts a batch on the devices; `where` says where a reference is from.
    """
    rng = jax.random.key(0)  # greedy: never looked at
    greedy = Sampling(temperature=0.0)
    real = [batch.example_ids >= 0 for batch in batches]

    def texts(rows: Any, kept: Any) -> list[str]:
        return [task.vocabulary.decode(row) for row in hosts.fetch(rows)[kept].tolist()]

    references = [
        text
        for batch, kept in zip(batches, real, strict=True)
        for text in texts(batch.targets, kept)
    ]

    has_references(task.metric, references, where)  # refused before the first step, not after it

    def watch(params: Any) -> dict[str, float]:
        answers: list[str] = []
        for batch, kept in zip(batches, real, strict=True):
            prompts = place(batch)
            output = autoregressive_sample(
                model,
                params,
                prompts.inputs,
                rng,
                sampling=greedy,
                max_new_tokens=task.target_length,
                row_ids=prompts.example_ids,
            )
            answers += texts(output.tokens, kept)
        score = quality(task.metric, answers, references)
        return {} if score is None else {"quality": score.value}

    return watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """How the draft is tried out by the real decoder, on prompts of the validation split."""

    num_prompts: int = 200
    batch_size: int = 50
    gamma: int = 7
    temperatures: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_least(self, 1, "num_prompts", "batch_size", "gamma", where="decoder")
        check_least(self, 0, "temperatures", where="decoder")
        check_entries("decoder.temperatures", self.temperatures)


def make_counts(
    target: Loaded,
    draft: Transformer,
    batches: Sequence[Batch],
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    seed: int,
    place: Place = jax.device_put,
) -> Callable[[Any, float], np.ndarray]:
    """Returns (draft params, temperature) -> counts [4, prompts] of speculative decoding.

    The rows are emitted tokens, target calls, accepted and tested tokens. The random numbers are
    the same in every call: two drafts are compared on equal terms.
    """
    rng = jax.random.fold_in(jax.random.key(seed), TRIAL)
    real = np.concatenate([batch.example_ids for batch in batches]) >= 0

    def counts_of(params: Any, temperature: float) -> np.ndarray:
        counts = []  # per batch [4, B]
        for batch in batches:
            prompts = place(batch)
            output = speculative_sample(
                target.model,
                target.params,
                draft,
                params,
                prompts.inputs,
                rng,
                gamma=config.gamma,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=temperature),
                row_ids=prompts.example_ids,
            )
            s = output.statistics
            columns = hosts.fetch((s.emitted, s.target_calls, s.accepted, s.tested))
            counts.append(np.stack(columns))
        return np.concatenate(counts, axis=1)[:, real]

    return counts_of


def make_decoding(
    target: Loaded,
    draft: Transformer,
    batches: Sequence[Batch],
    config: DecoderConfig,
    *,
    max_new_tokens: int,
    seed: int,
    place: Place = jax.device_put,
) -> Watch:
    """Returns draft params -> tau and alpha at each temperature, by speculative decoding.

    Keys `block_efficiency_t0`, `acceptance_rate_t0` and so on, each with `_ci95`, and MEAN.
    """
    counts_of = make_counts(
        target, draft, batches, config, max_new_tokens=max_new_tokens, seed=seed, place=place
    )

    def watch(params: Any) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for temperature in config.temperatures:
            emitted, calls, accepted, tested = counts_of(params, temperature)
            figures |= block_efficiency(emitted, calls, config.gamma).keys(
                f"{TAU}_t{temperature:g}"
            )
            figures |= acceptance_rate(accepted, tested).keys(f"{ALPHA}_t{temperature:g}")
        taus = [figures[f"{TAU}_t{each:g}"] for each in config.temperatures]
        return {MEAN: float(np.mean(taus)), **figures}

    return watch
