"""Tasks: a data set with its vocabulary, its lengths and the metric of its answers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distillspec_jax.data import pipeline
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import BuiltExamples, Example
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.data.vocabulary import Vocabulary, load_vocabulary
from distillspec_jax.errors import UserError, unknown_name

METRICS = ("exact_match_number", "rouge2", "bleu", "none")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a run says about its data.

    Attributes:
      name: "arithmetic_stories" (embedded), "jsonl" (files of one's own), or a data set whose
        original files lie in `source_dir`.
      vocabulary: as `load_vocabulary` takes it; empty means the one that belongs to the task.
      source_dir: folder with the original files of a data set, never fetched from the network.
      train_file, validation_file, test_file: the splits of "jsonl"; empty means there is none.
      input_field, target_field: of "jsonl"; an empty target field means there are no references.
      prefix: put before every input; None means the one that T5 uses for the task.
      input_length, target_length: longest input and target in pieces, the target's end counted;
        0 means the task's own.
      truncate: cut longer examples; else they are errors.
      metric: one of METRICS; empty means the task's own.
    """

    name: str = "arithmetic_stories"
    vocabulary: str = ""
    source_dir: str = ""
    train_file: str = ""
    validation_file: str = ""
    test_file: str = ""
    input_field: str = "input"
    target_field: str = "target"
    prefix: str | None = None
    input_length: int = 0
    target_length: int = 0
    truncate: bool = False
    metric: str = ""


@dataclasses.dataclass(frozen=True)
class _DataSet:
    """What is known of a data set by its name."""

    builder: str  # module and class under data/builders; empty for "jsonl"
    metric: str
    input_length: int
    target_length: int
    vocabulary: str = ""
    prefix: str = ""
    evaluation_only: bool = False


_DATA_SETS = {
    "arithmetic_stories": _DataSet(
        "arithmetic_stories.ArithmeticStories",
        "exact_match_number",
        input_length=40,
        target_length=56,
        vocabulary="arithmetic_stories",
    ),
    "jsonl": _DataSet("", "none", input_length=512, target_length=256),
}


class Task:
    """A data set ready to be read.

    Attributes:
      name, metric, input_length, target_length, truncate: as resolved from the config.
      vocabulary: of both texts.
    """

    def __init__(self, config: TaskConfig):
        if config.name not in _DATA_SETS:
            raise unknown_name("task", config.name, _DATA_SETS, "the data config")
        data_set = _DATA_SETS[config.name]
        self.name = config.name
        self.metric = config.metric or data_set.metric
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS, f"task '{self.name}'")
        self.input_length = config.input_length or data_set.input_length
        self.target_length = config.target_length or data_set.target_length
        self.truncate = config.truncate
        vocabulary = config.vocabulary or data_set.vocabulary
        if not vocabulary:
            raise UserError(
                f"task '{self.name}' has no vocabulary of its own: set `vocabulary` to a "
                "SentencePiece .model file, a tokenizer.json or 'bytes'"
            )
        self.vocabulary: Vocabulary = load_vocabulary(vocabulary)
        self.evaluation_only = data_set.evaluation_only
        self._prefix = data_set.prefix if config.prefix is None else config.prefix
        self._open = _jsonl(config, self._prefix) if not data_set.builder else None
        self._builder = _built(config, data_set) if data_set.builder else None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        if self._open is not None:
            return tuple(self._open)
        return tuple(self._builder.info.splits)

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, by index."""
        if split not in self.splits:
            raise unknown_name("split", split, self.splits, f"task '{self.name}'")
        if self._open is not None:
            return self._open[split]()
        source = self._builder.as_data_source(split)
        return BuiltExamples(source, f"{self.name}/{split}", self._prefix)

    def batches(
        self, split: str, *, batch_size: int, seed: int, start_step: int = 0, **options: int
    ) -> Iterator[Batch]:
        """Endless training batches of a split; the rest as in `pipeline.batches`."""
        if self.evaluation_only:
            raise UserError(f"task '{self.name}' is for evaluation only; train on another one")
        return pipeline.batches(
            self.examples(split),
            self.vocabulary,
            batch_size=batch_size,
            input_length=self.input_length,
            target_length=self.target_length,
            seed=seed,
            start_step=start_step,
            truncate=self.truncate,
            **options,
        )

    def eval_batches(self, split: str, *, batch_size: int, **hosts: int) -> Iterator[Batch]:
        """One pass over a split; the rest as in `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self.examples(split),
            self.vocabulary,
            batch_size=batch_size,
            input_length=self.input_length,
            target_length=self.target_length,
            truncate=self.truncate,
            **hosts,
        )


def load_task(config: TaskConfig) -> Task:
    """Opens a task; a built data set is prepared on first use."""
    return Task(config)


def _jsonl(config: TaskConfig, prefix: str) -> dict[str, Callable[[], JsonlExamples]]:
    files = {
        "train": config.train_file,
        "validation": config.validation_file,
        "test": config.test_file,
    }
    if not any(files.values()):
        raise UserError("task 'jsonl' needs train_file, validation_file or test_file")
    fields = {"input_field": config.input_field, "target_field": config.target_field}

    def opener(path: str) -> Callable[[], JsonlExamples]:
        return lambda: JsonlExamples(path, prefix=prefix, **fields)

    return {split: opener(path) for split, path in files.items() if path}


def _built(config: TaskConfig, data_set: _DataSet) -> Any:
    # TFDS takes half a second to import, which a run on JSONL need not wait for.
    from distillspec_jax.data.builders import base

    module, name = data_set.builder.split(".")
    builders = importlib.import_module(f"distillspec_jax.data.builders.{module}")
    return base.prepare(getattr(builders, name), config.source_dir)
