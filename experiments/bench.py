"""What `evaluate` works with: models that fit each other, prompts, and decoding all of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from distillspec_jax.data.pipeline import trimmed
from distillspec_jax.data.tasks import Task
from distillspec_jax.decoding.autoregressive import Generation, autoregressive_sample
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.slots import slot_sample
from distillspec_jax.decoding.speculative import speculate_checked
from distillspec_jax.decoding.state import Speculation, SpeculativeOutput
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.acceptance import TeacherForced, along_texts
from distillspec_jax.evaluation.corpus import over_batches
from distillspec_jax.evaluation.quality import has_references
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.progress import Progress
from experiments.models import Loaded, check_meeting, load

if TYPE_CHECKING:
    from experiments.evaluate import DraftConfig, EvaluateConfig


@dataclasses.dataclass(frozen=True, eq=False)  # itself a key of results; arrays have no hash
class Draft:
    """A draft to be measured, one seed of its name."""

    config: DraftConfig
    loaded: Loaded

    @property
    def label(self) -> str:
        return f"{self.config.name}, seed {self.config.seed}"

    @property
    def shape(self) -> ModelConfig:
        """All that decides what it costs: neither its name nor how it was trained."""
        return dataclasses.replace(self.loaded.model.config, name="", dropout_rate=0.0)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """inputs: [P, S] int32. row_ids: [P], the examples' indices. references: P texts."""

    inputs: np.ndarray
    row_ids: np.ndarray
    references: list[str]

    @property
    def digest(self) -> str:
        """Hex sha256 of pieces and references: other data, other numbers."""
        digest = hashlib.sha256(np.ascontiguousarray(self.inputs).tobytes())
        digest.update(json.dumps([self.inputs.shape, self.references]).encode())
        return digest.hexdigest()


def read_prompts(task: Task, split: str, count: int) -> Prompts:
    """The first `count` prompts of a split, in order, no wider than the longest needs."""
    examples = task.examples(split)[:count]
    [batch] = task.eval_batches(split, batch_size=len(examples), count=count)
    return Prompts(
        trimmed(batch.inputs), batch.example_ids, [example.target for example in examples]
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the grid, but for the draft's seed."""

    name: str
    temperature: float
    gamma: int
    lenience: float = 1.0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything that stays the same while the settings vary."""

    config: EvaluateConfig
    task: Task
    target: Loaded
    drafts: list[Draft]
    prompts: Prompts
    tuning_prompts: Prompts | None  # None: no gamma is tuned

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.task.target_length

    @property
    def models(self) -> dict[str, Loaded]:
        return {"target": self.target, **{draft.label: draft.loaded for draft in self.drafts}}

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(draft.config.name for draft in self.drafts))

    def seeds(self, name: str) -> list[Draft]:
        """The drafts of a name by seed, so that gains pair the same seeds of two names."""
        named = [draft for draft in self.drafts if draft.config.name == name]
        return sorted(named, key=lambda draft: draft.config.seed)

    @property
    def lossless_temperatures(self) -> list[float]:
        """Those at which the target's own law is measured: 0 always, others with lenience 1."""
        return [t for t in self.config.temperatures if t == 0 or 1 in self.config.lenience]

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.config.top_k, self.config.top_p)

    def draft_sampling(self, temperature: float) -> Sampling:
        """The draft's, where the target has this temperature."""
        return self.config.draft_sampling(self.sampling(temperature))

    def weights(self) -> dict[str, str]:
        """The fingerprint of each model: other weights, other numbers."""
        return {name: loaded.fingerprint for name, loaded in self.models.items()}

    def data(self) -> dict[str, str]:
        """Digests of the prompts of the claim, and of those that choose gamma."""
        sets = {"prompts": self.prompts, "tuning_prompts": self.tuning_prompts}
        return {name: prompts.digest for name, prompts in sets.items() if prompts is not None}

    def plain(self, temperature: float, row_ids: jax.Array, inputs: jax.Array) -> Generation:
        """The target decodes a batch alone."""
        return autoregressive_sample(
            self.target.model,
            self.target.params,
            inputs,
            jax.random.key(self.config.seed),
            sampling=self.sampling(temperature),
            max_new_tokens=self.max_new_tokens,
            row_ids=row_ids,
        )

    def speculation(self, draft: Draft, setting: Setting) -> Speculation:
        """The sampler of a draft in one setting."""
        kind, relaxed = self.config.lenience_kind, self.config.relaxed_residual
        lenience = Lenience(kind, setting.lenience, relaxed)
        return Speculation(
            target=self.target.model,
            draft=draft.loaded.model,
            gamma=setting.gamma,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling(setting.temperature),
            draft_sampling=self.draft_sampling(setting.temperature),
            verification=self.config.verification,
            lenience=lenience,
            block_length=self.config.block_length,
            num_drafts=self.config.num_drafts,
        )

    def speculative(
        self, draft: Draft, setting: Setting, row_ids: jax.Array, inputs: jax.Array
    ) -> SpeculativeOutput:
        """The target decodes a batch with a draft."""
        return speculate_checked(
            self.speculation(draft, setting),
            self.target.params,
            draft.loaded.params,
            inputs,
            jax.random.key(self.config.seed),
            row_ids,
        )

    def along(self, draft: Draft, temperature: float, *texts: jax.Array) -> dict[str, np.ndarray]:
        """Acceptance of a draft along the target's texts: inputs, tokens, lengths of a batch."""
        scored = along_texts(
            self.target.model,
            self.target.params,
            draft.loaded.model,
            draft.loaded.params,
            *texts,
            sampling=self.sampling(temperature),
            draft_sampling=self.draft_sampling(temperature),
        )
        return dataclasses.asdict(scored)


def open_bench(config: EvaluateConfig, task: Task) -> Bench:
    """Loads the models, reads the prompts and checks every setting; nothing is written.

    Raises UserError for models that fit neither each other nor the task's vocabulary, for seeds of
    several shapes, for a gamma tuned on prompts of the claim, and for settings that the sampler
    refuses.
    """
    check_meeting(config.target, *(draft.path for draft in config.drafts))
    load_model = functools.partial(
        load, task=task, compute_dtype=config.compute_dtype, is_frozen=True
    )
    target = load_model(config.target)
    drafts = [Draft(draft, load_model(draft.path)) for draft in config.drafts]
    prompts = read_prompts(task, config.split, config.num_prompts)
    tuning = None
    if config.tune and config.has_whole_blocks:
        _check_apart(config, task)
        tuning = read_prompts(task, config.tuning_split, config.num_tuning_prompts)
    where = task.examples(config.split).where
    has_references(task.metric, prompts.references, where)  # before anything is decoded
    largest = max(config.timed_batch_sizes)
    if 0 < min(config.timed_prompts, len(prompts.row_ids)) < largest:
        raise UserError(
            f"config.timed_prompts is {config.timed_prompts} and the split '{config.split}' gives "
            f"{len(prompts.row_ids)}: too few for a timed batch of {largest}"
        )
    bench = Bench(config, task, target, drafts, prompts, tuning)
    _check_shapes(bench)
    for draft in drafts:
        for temperature, lenience in itertools.product(config.temperatures, config.lenience):
            bench.speculation(draft, Setting(draft.config.name, temperature, 1, lenience))
    return bench


def _check_apart(config: EvaluateConfig, task: Task) -> None:
    """Refuses to choose gamma on prompts of the claim."""

    def sources(split: str, count: int) -> set[str]:
        # not the texts: two honest splits may both hold one
        examples = task.examples(split)[:count]
        return {examples.where(index) for index in range(len(examples))}

    claim = sources(config.split, config.num_prompts)
    shared = claim & sources(config.tuning_split, config.num_tuning_prompts)
    if shared:
        raise UserError(
            f"config.tuning_split '{config.tuning_split}' would choose gamma on {len(shared)} "
            f"prompts that config.split '{config.split}' measures; take another tuning_split, or "
            "say --config.tune=False"
        )


def _check_shapes(bench: Bench) -> None:
    """Refuses seeds of one name that are models of different shapes: their costs differ."""
    for name in bench.names:
        first, *others = bench.seeds(name)
        for other in others:
            if other.shape != first.shape:
                raise UserError(
                    f"config.drafts has models of different shapes under the name '{name}': "
                    f"'{first.loaded.path}' and '{other.loaded.path}'; give each its own name"
                )


class Runner:
    """Decodes or scores all prompts of a set in batches, with one progress bar over all of it."""

    def __init__(self, bench: Bench, progress: Progress) -> None:
        self._bench, self._progress, self._done = bench, progress, 0

    def plain(self, prompts: Prompts, temperature: float) -> Generation:
        """Texts of the target itself."""
        return self._over(
            prompts, functools.partial(self._bench.plain, temperature), prompts.inputs
        )

    def speculative(self, prompts: Prompts, draft: Draft, setting: Setting) -> SpeculativeOutput:
        """Texts of the target with the help of a draft; no row waits for the longest."""
        bench = self._bench
        return slot_sample(
            bench.speculation(draft, setting),
            bench.target.params,
            draft.loaded.params,
            prompts.inputs,
            jax.random.key(bench.config.seed),
            slots=bench.config.batch_size,
            row_ids=prompts.row_ids,
            report=self._report(),
        )

    def along(
        self, prompts: Prompts, draft: Draft, temperature: float, texts: Generation
    ) -> TeacherForced:
        """Acceptance of a draft along the target's texts."""

        def score(row_ids: jax.Array, *columns: jax.Array) -> dict[str, np.ndarray]:
            del row_ids
            return self._bench.along(draft, temperature, *columns)

        columns = prompts.inputs, texts.tokens, texts.lengths
        return TeacherForced(**self._over(prompts, score, *columns))

    def _over(self, prompts: Prompts, call: Callable[..., Any], *columns: Any) -> Any:
        size, report = self._bench.config.batch_size, self._report()
        return over_batches(call, prompts.row_ids, *columns, batch_size=size, on_rows=report)

    def _report(self) -> Callable[[int], None]:
        """Takes how many prompts of the next set are done."""
        before = self._done

        def report(done: int) -> None:
            self._done = before + done
            self._progress.update(self._done)

        return report
