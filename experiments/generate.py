r"""Has a target write texts for a split's prompts, once, for drafts to learn from ever after.

    python -m experiments.generate --config=experiments/configs/generate_stories.py \
        --workdir=runs/teacher-data
    python -m experiments.distill --config=experiments/configs/distill_stories.py:sft \
        --config.task.teacher_data=runs/teacher-data --config.train_split=teacher \
        --workdir=runs/seqkd

Every text is a function of (seed, its number), and every file of texts is whole or not there:
stopped and started again, it goes on with the next file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distillspec_jax.data.examples import EncodedExample as Text
from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.data.written import Settings, WrittenTexts, is_written, write_shard
from distillspec_jax.decoding.autoregressive import Generation, autoregressive_sample
from distillspec_jax.decoding.keys import purpose_key
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.evaluation.corpus import over_batches
from distillspec_jax.models.config import check_dtype
from distillspec_jax.progress import Progress
from experiments import door, planning_decoding
from experiments.bench import Prompts, read_prompts
from experiments.checks import check_least, check_seeds
from experiments.models import Loaded, load
from experiments.watching import told_of_ends
from experiments.workdir import METRICS, Workdir, devices, write_json_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Who writes, for which prompts, and how."""

    target: str
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    split: str = "train"
    samples: int = 1  # texts of each prompt
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 0  # 0: the task's target length
    batch_size: int = 64
    shard_size: int = 1_000  # texts in a file
    compute_dtype: str = "float32"  # or bfloat16, weights too; softmax stays in float32
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "samples", "batch_size", "shard_size")
        check_least(self, 0, "max_new_tokens")
        check_dtype(self.compute_dtype, "config.compute_dtype")
        check_seeds("config.seed", self.seed)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


def main(config: GenerateConfig, workdir: Path) -> None:
    task = load_task(config.task)
    target = load(config.target, task, compute_dtype=config.compute_dtype, is_frozen=True)
    prompts = read_prompts(task, config.split, len(task.examples(config.split)))
    settings, inputs = _settings(config, task, target, prompts), prompts.inputs
    with Workdir(workdir, "generate", config, may_change=("batch_size",)) as run:
        shards = range(settings.shards)
        waiting = [i for i in shards if not is_written(run.path, settings, i)]
        _announce(target, settings, waiting)
        done = settings.examples - sum(len(settings.rows(shard)) for shard in waiting)
        with Progress("generate", settings.examples, done=done, unit="text") as progress:
            for shard in waiting:

                def on_rows(count: int, before: int = done) -> None:
                    progress.update(before + count)

                rows = np.array(settings.rows(shard))
                texts = _write(config, settings, target, inputs, rows, on_rows)
                write_shard(run.path, settings, shard, texts)
                done += len(rows)
        written, eos_id = WrittenTexts(run.path), task.vocabulary.eos_id
        write_json_lines(run.path / METRICS, _records(written, eos_id))
        summary = _summary(written, eos_id)
        run.write_summary(summary, seed=config.seed)
    _say(summary, workdir)


def _settings(config: GenerateConfig, task: Task, target: Loaded, prompts: Prompts) -> Settings:
    return Settings(
        target=target.fingerprint,
        target_path=config.target,
        vocabulary=task.vocabulary.fingerprint,
        data={
            "task": task.name,
            "split": config.split,
            "input_length": task.input_length,
            "input_eos": task.input_eos,
            "digest": prompts.digest,
        },
        sampling={
            **dataclasses.asdict(config.sampling),
            "max_new_tokens": config.max_new_tokens or task.target_length,
        },
        seed=config.seed,
        prompts=len(prompts.inputs),
        examples=len(prompts.inputs) * config.samples,
        shard_size=config.shard_size,
    )


def _write(
    config: GenerateConfig,
    settings: Settings,
    target: Loaded,
    inputs: np.ndarray,
    rows: np.ndarray,
    on_rows: Callable[[int], None],
) -> Iterator[Text]:
    """The texts of some rows; text n is of prompt n mod prompts and keyed by n."""
    rng = purpose_key(config.seed, "generate")
    limit = settings.sampling["max_new_tokens"]

    def decode(row_ids: jax.Array, inputs: jax.Array) -> Generation:
        return autoregressive_sample(
            target.model,
            target.params,
            inputs,
            rng,
            sampling=config.sampling,
            max_new_tokens=limit,
            row_ids=row_ids,
        )

    prompts = inputs[rows % settings.prompts]
    written = over_batches(decode, rows, prompts, batch_size=config.batch_size, on_rows=on_rows)
    lengths = np.sum(prompts != target.model.config.pad_id, axis=1)
    for prompt, length, tokens, end in zip(
        prompts, lengths, written.tokens, written.lengths, strict=True
    ):
        yield Text(prompt[:length].tolist(), tokens[:end].tolist())


def _announce(target: Loaded, settings: Settings, waiting: Sequence[int]) -> None:
    print(f"generate: {settings.examples:,} texts for {settings.prompts:,} prompts")
    print(f"  target: {target}")
    print(f"  data: {settings.data['task']}/{settings.data['split']}")
    print("  " + ", ".join(f"{name} {value}" for name, value in settings.sampling.items()))
    print(f"  files: {settings.shards}, {settings.shards - len(waiting)} of them done")
    print(f"  devices: {devices()}", flush=True)


def _records(texts: WrittenTexts, eos_id: int) -> Iterator[dict[str, Any]]:
    """One for each file, read off the texts: those of an earlier start count, too."""
    for shard in range(texts.settings.shards):
        rows = texts.take(texts.settings.rows(shard))
        yield {"kind": "file", "file": shard, "num_texts": len(rows), **_ends(rows, eos_id)}


def _ends(texts: Iterable[Text], eos_id: int) -> dict[str, float]:
    lengths, ended = zip(
        *((len(text.target), text.target[-1:] == [eos_id]) for text in texts), strict=True
    )
    return {"target_length": float(np.mean(lengths)), "eos_rate": float(np.mean(ended))}


def _summary(texts: WrittenTexts, eos_id: int) -> dict[str, Any]:
    settings = texts.settings
    return {
        "num_texts": len(texts),
        "num_prompts": settings.prompts,
        "num_files": settings.shards,
        **_ends(texts.take(range(len(texts))), eos_id),
        "target_fingerprint": settings.target,
        "vocabulary_fingerprint": settings.vocabulary,
        **settings.sampling,
    }


def _say(summary: dict[str, Any], path: Path) -> None:
    for key in ("num_texts", "target_length", "eos_rate"):
        print(f"{key}: {summary[key]:,.4g}")
    mend = "config.max_new_tokens or fine-tune the target"
    if told := told_of_ends(summary["eos_rate"], "the texts", mend):
        print(told)
    print(f"files: {path} (texts-*.array_record, summary.json, {METRICS}, config.json)")


if __name__ == "__main__":
    plan = planning_decoding.planner(planning_decoding.of_generate)
    door.run(main, GenerateConfig, plan=plan)
