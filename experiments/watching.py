"""What the training entrypoints look at every so many steps, on examples that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.tasks import Task
from distillspec_jax.decoding.autoregressive import autoregressive_sample
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.evaluation.quality import quality
from distillspec_jax.models.transformer import Transformer

Watch = Callable[[Any], dict[str, float]]  # params -> figures


def make_quality(model: Transformer, task: Task, batches: Sequence[Batch]) -> Watch:
    """Returns params -> {"quality": percent} of the model's greedy answers by the task's metric."""
    rng = jax.random.key(0)  # greedy: never looked at
    greedy = Sampling(temperature=0.0)
    real = [batch.example_ids >= 0 for batch in batches]

    def texts(rows: Any, kept: Any) -> list[str]:
        return [task.vocabulary.decode(row) for row in jax.device_get(rows)[kept].tolist()]

    references = [
        text
        for batch, kept in zip(batches, real, strict=True)
        for text in texts(batch.targets, kept)
    ]

    def watch(params: Any) -> dict[str, float]:
        answers: list[str] = []
        for batch, kept in zip(batches, real, strict=True):
            output = autoregressive_sample(
                model,
                params,
                batch.inputs,
                rng,
                sampling=greedy,
                max_new_tokens=task.target_length,
                row_ids=batch.example_ids,
            )
            answers += texts(output.tokens, kept)
        score = quality(task.metric, answers, references)
        return {} if score is None else {"quality": score.value}

    return watch
