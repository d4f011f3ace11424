"""Tasks: a data set with its vocabulary, its lengths and the metric of its answers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distillspec_jax.data import pipeline
from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import BuiltExamples, Examples
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.data.vocabulary import Vocabulary, load_vocabulary
from distillspec_jax.data.written import WrittenTexts
from distillspec_jax.errors import UserError, check_count, unknown_name

_Splits = Mapping[str, Callable[[], Examples]]
METRICS = ("exact_match_number", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "none")


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
      input_eos: end every input with the end of sequence; None means as the models of the task
        were trained: T5's were with it, those of the stories and of LM1B were not.
      metric: one of METRICS; empty means the task's own.
      teacher_data: folder that `experiments.generate` wrote: one more split, "teacher".
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
    input_eos: bool | None = None
    metric: str = ""
    teacher_data: str = ""

    def __post_init__(self) -> None:
        for field in ("input_length", "target_length"):
            length = getattr(self, field)
            if length < 0:
                raise UserError(
                    f"task.{field} is {length}, must be at least 1, or 0 for the task's own"
                )


@dataclasses.dataclass(frozen=True)
class _DataSet:
    """What is known of a data set by its name."""

    module: str  # under data/builders
    builders: tuple[str, ...]  # its classes; none for "jsonl"
    metric: str
    input_length: int
    target_length: int
    vocabulary: str = ""
    prefix: str = ""
    input_eos: bool = True
    evaluation_only: bool = False


TEACHER = "teacher"  # the split of texts that a target wrote beforehand
_PART = re.compile(r"(?P<name>\w+)\[(?P<first>(-?\d+)?):(?P<last>(-?\d+)?)\]")
_STORIES = "arithmetic_stories"
_TRANSLATE, _SUMMARIZE = "translate English to German: ", "summarize: "
_DATA_SETS = {
    "arithmetic_stories": _DataSet(
        "arithmetic_stories",
        ("ArithmeticStories", "ArithmeticStoriesPretrain"),
        "exact_match_number",
        input_length=40,
        target_length=56,
        vocabulary=_STORIES,
        input_eos=False,
    ),
    "jsonl": _DataSet("", (), "none", 512, 256),
    "gsm8k": _DataSet("gsm8k", ("Gsm8k",), "exact_match_number", 256, 320),
    "wmt14_ende": _DataSet("wmt14_ende", ("Wmt14Ende",), "bleu", 256, 256, prefix=_TRANSLATE),
    "cnn_dailymail": _DataSet(
        "summaries", ("CnnDailymail",), "rouge2", 1024, 128, prefix=_SUMMARIZE
    ),
    "xsum": _DataSet("summaries", ("Xsum",), "rouge2", 1024, 64, prefix=_SUMMARIZE),
    "lm1b": _DataSet("lm1b", ("Lm1b",), "none", 32, 256, input_eos=False),
    "bbh": _DataSet("bbh", ("Bbh",), "none", 640, 80, evaluation_only=True),
    "specbench": _DataSet("specbench", ("Specbench",), "none", 2048, 512, evaluation_only=True),
}


class Task:
    """A data set ready to be read.

    Attributes:
      name, metric, input_length, target_length, truncate, input_eos: as resolved from the config.
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
        self.input_eos = data_set.input_eos and vocabulary != _STORIES
        if config.input_eos is not None:
            self.input_eos = config.input_eos
        self.evaluation_only = data_set.evaluation_only
        prefix = data_set.prefix if config.prefix is None else config.prefix
        open_splits = _built if data_set.builders else _jsonl
        self._splits = dict(open_splits(config, data_set, prefix))
        if config.teacher_data:
            texts = WrittenTexts(config.teacher_data)
            texts.check("vocabulary", self.vocabulary.fingerprint)
            self._splits[TEACHER] = lambda: texts

    @property
    def _encoding(self) -> dict[str, Any]:
        return {
            "input_length": self.input_length,
            "target_length": self.target_length,
            "truncate": self.truncate,
            "input_eos": self.input_eos,
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(self._splits)

    def examples(self, split: str) -> Examples:
        """The examples of a split, by index; a slice is a view.

        `split` may be a part of one, as in TFDS: "train[:7000]", "train[-473:]".
        """
        part = _PART.fullmatch(split)
        if part is None and "[" in split:
            raise UserError(
                f"the split '{split}' of task '{self.name}' is no part of one: write NAME[a:b] "
                "with whole numbers, as train[:7000] or train[-473:], not with percent"
            )
        name = part["name"] if part else split
        if name not in self._splits:
            raise unknown_name("split", name, self.splits, f"task '{self.name}'")
        examples = self._splits[name]()
        if part is None:
            return examples
        first, last = (int(bound) if bound else None for bound in part.group("first", "last"))
        taken = examples[first:last]
        if not taken:
            raise UserError(
                f"the part '{split}' of task '{self.name}' is empty: '{name}' has "
                f"{len(examples):,} examples; take another part, or another split"
            )
        return taken

    def check_teacher(self, fingerprint: str) -> None:
        """Refuses teacher data, if there are any, of another target than this one."""
        if TEACHER in self._splits:
            texts = self._splits[TEACHER]()
            assert isinstance(texts, WrittenTexts)
            texts.check("target", fingerprint)

    def batches(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        bucket: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Endless training batches of a split; arguments and errors as in `pipeline.batches`."""
        if self.evaluation_only:
            trainable = [name for name, known in _DATA_SETS.items() if not known.evaluation_only]
            raise UserError(
                f"task '{self.name}' is for evaluation only and must not be trained on; "
                f"train on one of: {', '.join(trainable)}"
            )
        return pipeline.batches(
            self.examples(split),
            self.vocabulary,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            bucket=bucket,
            process_index=process_index,
            process_count=process_count,
            **self._encoding,
        )

    def eval_batches(
        self,
        split: str,
        *,
        batch_size: int,
        count: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """One pass over a split, or over its first `count` examples.

        The other arguments and errors as in `pipeline.eval_batches`.
        """
        if count is not None:
            check_count("count", count)
        return pipeline.eval_batches(
            self.examples(split)[:count],
            self.vocabulary,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            **self._encoding,
        )


def load_task(config: TaskConfig) -> Task:
    """Opens a task; a built data set is prepared when its examples are first asked for."""
    return Task(config)


def _jsonl(config: TaskConfig, data_set: _DataSet, prefix: str) -> _Splits:
    files = {
        "train": config.train_file,
        "validation": config.validation_file,
        "test": config.test_file,
    }
    if not any(files.values()):
        raise UserError("task 'jsonl' needs train_file, validation_file or test_file")
    for split, path in files.items():
        if path and not Path(path).exists():
            raise UserError(f"{split}_file '{path}' does not exist")

    @functools.cache
    def read(path: str) -> JsonlExamples:
        return JsonlExamples(
            path,
            input_field=config.input_field,
            target_field=config.target_field,
            prefix=prefix,
        )

    return {split: functools.partial(read, path) for split, path in files.items() if path}


def _built(config: TaskConfig, data_set: _DataSet, prefix: str) -> _Splits:
    # TFDS takes half a second to import, which a run on JSONL need not wait for.
    from distillspec_jax.data.builders import base

    module = importlib.import_module(f"distillspec_jax.data.builders.{data_set.module}")

    @functools.cache
    def prepared(name: str) -> base.TextPairs:
        return base.prepare(getattr(module, name), config.source_dir)

    @functools.cache
    def read(name: str, split: str) -> BuiltExamples:
        source = prepared(name).as_data_source(split)
        return BuiltExamples(source, f"{config.name}/{split}", prefix)

    return {
        split: functools.partial(read, name, split)
        for name in data_set.builders
        for split in getattr(module, name).sources(config.source_dir)
    }
