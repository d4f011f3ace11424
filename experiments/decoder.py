"""Prompts into answers: what `decode` does between reading a line and showing a text."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.text import Text

from distillspec_jax.data import pipeline
from distillspec_jax.data.examples import Example, Examples
from distillspec_jax.data.jsonl import JsonlExamples, numbered_lines
from distillspec_jax.data.vocabulary import Vocabulary, load_vocabulary
from distillspec_jax.decoding.autoregressive import Generation, autoregressive_sample
from distillspec_jax.decoding.block_length import FIXED, BlockLength
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.slots import slot_sample
from distillspec_jax.decoding.state import (
    ACCEPTED,
    BONUS,
    CORRECTED,
    Speculation,
    SpeculativeOutput,
)
from distillspec_jax.decoding.verification import RULES
from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.evaluation.corpus import OnRows, over_batches
from distillspec_jax.models.config import check_dtype
from experiments.checks import check_least, check_seeds
from experiments.draft_sampling import DraftSampling
from experiments.models import Loaded, check_meeting, load

ORIGINS = {ACCEPTED: "accepted", CORRECTED: "corrected", BONUS: "bonus"}
STYLES = {ACCEPTED: "green", CORRECTED: "bold red", BONUS: "bold blue"}
BROKEN = "\ufffd"  # what decoding puts for bytes that are no character, or not yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig(DraftSampling):
    """Models, prompts and how to decode them."""

    target: str
    draft: str = ""  # "": the target alone
    vocabulary: str = "arithmetic_stories"  # as `load_vocabulary` takes it
    prompts: str = ""  # file
    prompt: tuple[str, ...] = ()
    input_field: str = "input"
    prefix: str = ""  # before every prompt
    input_length: int = 40
    input_eos: bool | None = None  # None: as T5, but not the models of the stories
    truncate: bool = False
    max_new_tokens: int = 56
    gamma: int = 5
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    verification: str = "token"
    lenience: Lenience = dataclasses.field(default_factory=Lenience)
    block_length: BlockLength = dataclasses.field(default_factory=BlockLength)
    num_drafts: int = 1
    batch_size: int = 8
    compute_dtype: str = "float32"  # or bfloat16, weights too; softmax stays in float32
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "input_length", "max_new_tokens", "gamma", "batch_size")
        if self.verification not in RULES:
            raise unknown_name("verification rule", self.verification, RULES, "config.verification")
        check_dtype(self.compute_dtype, "config.compute_dtype")
        check_seeds("config.seed", self.seed)
        if self.prompts and self.prompt:
            raise UserError("prompts come from a file or from flags: give --prompts or --prompt")
        _check_utf8(self.prefix, "config.prefix")
        if not self.draft:
            self._check_alone()

    def _check_alone(self) -> None:
        """Refuses what the target alone would ignore."""
        given = {
            "num_drafts": self.num_drafts > 1,
            "lenience": not self.lenience.is_exact,
            "verification": self.verification != "token",
            "block_length": self.block_length != FIXED,
            **dict.fromkeys(self.draft_options, True),
        }
        if keys := [f"config.{key}" for key, is_given in given.items() if is_given]:
            raise UserError(
                f"{', '.join(keys)} would change nothing, for config.draft is empty; name a draft "
                "or leave that out"
            )


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python lets other bytes of flags and terminals through as halves
        raise UserError(f"{where} is not UTF-8") from None


class Lines(Examples):
    """Prompts that are lines of a text; blank ones are left out."""

    def __init__(self, lines: Sequence[str], where: str, prefix: str = "") -> None:
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        self._lines = [(number, line) for number, line in numbered if line]
        self._where, self._prefix = where, prefix
        if not self._lines:
            raise UserError(f"{where} holds no prompt; every line should be one")
        for index, (_, line) in enumerate(self._lines):
            _check_utf8(line, self.where(index))

    def __len__(self) -> int:
        return len(self._lines)

    def take(self, indices: Sequence[int]) -> list[Example]:
        return [Example(self._prefix + self._lines[index][1], "") for index in indices]

    def where(self, index: int) -> str:
        return f"{self._where}:{self._lines[index][0]}"


def given_prompts(config: DecodeConfig) -> Examples | None:
    """The prompts of the config; None if they are to be read as they come."""
    path, prefix = config.prompts, config.prefix
    if config.prompt:
        return Lines(config.prompt, "--prompt", prefix)
    if not path:
        return None
    if Path(path).suffix in (".jsonl", ".json"):
        fields = {"input_field": config.input_field, "target_field": ""}
        return JsonlExamples(path, prefix=prefix, **fields)
    if not Path(path).exists() or Path(path).is_dir():
        raise UserError(f"there is no file of prompts '{path}'")
    return Lines([line for _, line in numbered_lines(path)], path, prefix)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One decoded prompt; all but the first three are None without a draft.

    tokens: its ids up to the end. origins: how each came to be. calls, tested: target calls and
    tested tokens. lossless: whether the text has the target's law.
    """

    prompt: str
    output: str
    tokens: list[int]
    origins: list[int] | None = None
    emitted: int | None = None
    calls: int | None = None
    accepted: int | None = None
    tested: int | None = None
    lossless: bool | None = None

    def record(self) -> dict[str, Any]:
        """The line of `outputs.jsonl`, with origins in words."""
        fields = {key: value for key, value in vars(self).items() if value is not None}
        if self.origins is not None:
            fields["origins"] = [ORIGINS[origin] for origin in self.origins]
        return fields


class Decoder:
    """Models and settings: prompts in, answers out; `load` may be `models.outline`, for a plan."""

    def __init__(self, config: DecodeConfig, load: Callable[..., Loaded] = load) -> None:
        self.config = config
        self.vocabulary: Vocabulary = load_vocabulary(config.vocabulary)
        if config.draft:
            check_meeting(config.target, config.draft)
        load = functools.partial(load, compute_dtype=config.compute_dtype, is_frozen=True)
        self.target = load(config.target, self)
        self.draft = load(config.draft, self) if config.draft else None
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p)
        self.draft_sampling = config.draft_sampling(self.sampling)
        self.speculation = None if self.draft is None else self._speculation(self.draft)

    def encode(self, examples: Examples) -> np.ndarray:
        """[P, S] int32, S as the longest needs; raises UserError for a prompt that is too long."""
        config = self.config
        of_stories = config.vocabulary == "arithmetic_stories"
        [batch] = pipeline.eval_batches(
            examples,
            self.vocabulary,
            batch_size=len(examples),
            input_length=config.input_length,
            target_length=1,
            truncate=config.truncate,
            input_eos=not of_stories if config.input_eos is None else config.input_eos,
        )
        return pipeline.trimmed(np.asarray(batch.inputs))

    def __call__(
        self,
        examples: Examples,
        inputs: np.ndarray,
        *,
        first_id: int = 0,
        on_done: Callable[[int, float], None] = lambda done, seconds: None,
    ) -> list[Answer]:
        """Decodes prompts, `inputs` as `encode` gives them.

        `on_done` is told how many are done, and the time since it was told.

        With a draft a row that ends makes room for the next prompt, without it batches end whole.
        """
        began = time.perf_counter()

        def on_rows(done: int) -> None:
            nonlocal began
            now = time.perf_counter()
            on_done(done, now - began)
            began = now

        decode = self._alone if self.draft is None else self._with_draft
        output = decode(first_id + np.arange(len(examples)), inputs, on_rows)
        prompts = [example.input for example in examples]
        return [self._answer(prompt, output, row) for row, prompt in enumerate(prompts)]

    def _alone(self, row_ids: np.ndarray, inputs: np.ndarray, on_rows: OnRows) -> Generation:
        config = self.config

        def batch(row_ids: jax.Array, inputs: jax.Array) -> Generation:
            return autoregressive_sample(
                self.target.model,
                self.target.params,
                inputs,
                jax.random.key(config.seed),
                sampling=self.sampling,
                max_new_tokens=config.max_new_tokens,
                row_ids=row_ids,
            )

        return over_batches(batch, row_ids, inputs, batch_size=config.batch_size, on_rows=on_rows)

    def _with_draft(
        self, row_ids: np.ndarray, inputs: np.ndarray, on_rows: OnRows
    ) -> SpeculativeOutput:
        assert self.draft is not None
        assert self.speculation is not None
        return slot_sample(
            self.speculation,
            self.target.params,
            self.draft.params,
            inputs,
            jax.random.key(self.config.seed),
            slots=self.config.batch_size,
            row_ids=row_ids,
            report=on_rows,
        )

    def _speculation(self, draft: Loaded) -> Speculation:
        config = self.config
        return Speculation(
            target=self.target.model,
            draft=draft.model,
            gamma=config.gamma,
            max_new_tokens=config.max_new_tokens,
            sampling=self.sampling,
            draft_sampling=self.draft_sampling,
            verification=config.verification,
            lenience=config.lenience,
            block_length=config.block_length,
            num_drafts=config.num_drafts,
        )

    def _answer(self, prompt: str, output: Any, row: int) -> Answer:
        length = int(output.lengths[row])
        tokens = output.tokens[row, :length].tolist()
        text = self.vocabulary.decode(tokens)
        if self.draft is None:
            return Answer(prompt, text, tokens)
        statistics = output.statistics
        return Answer(
            prompt,
            text,
            tokens,
            origins=output.origins[row, :length].tolist(),
            emitted=int(statistics.emitted[row]),
            calls=int(statistics.target_calls[row]),
            accepted=int(statistics.accepted[row]),
            tested=int(statistics.tested[row]),
            lossless=output.lossless,
        )


def coloured(answer: Answer, vocabulary: Vocabulary) -> Text:
    """The text with each token in the colour of its origin; bytes wait for their character."""
    text, shown = Text(), ""
    for count, origin in enumerate(answer.origins or [], 1):
        longer = vocabulary.decode(answer.tokens[:count])
        if longer.endswith(BROKEN) and count < len(answer.tokens):
            continue  # the next byte may make it another character
        text.append(longer[len(shown) :], STYLES[origin])
        shown = longer
    return text if answer.origins else Text(answer.output)
