r"""Decodes prompts from a file, from flags or from the terminal, with a draft or without.

    python -m experiments.decode --config=experiments/configs/decode.py --workdir=runs/decode \
        --prompts=questions.jsonl
    python -m experiments.decode ... --prompt="Tom has 3 apples ..." --prompt="..."
    python -m experiments.decode ...                    (reads one prompt a line)

A file is JSONL with the field `input_field`, or plain text with one prompt a line. Texts go to
`outputs.jsonl`. On a terminal each token has a colour: accepted from the draft, corrected by the
target, or the target's bonus behind a block that was accepted whole.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.text import Text

from distillspec_jax.data.examples import Examples
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.acceptance import acceptance_rate, block_efficiency
from distillspec_jax.evaluation.intervals import worded
from distillspec_jax.progress import Progress
from experiments import door, planning_decoding
from experiments.decoder import (
    ORIGINS,
    STYLES,
    Answer,
    DecodeConfig,
    Decoder,
    Lines,
    coloured,
    given_prompts,
)
from experiments.workdir import METRICS, Workdir, write_json_lines

OUTPUTS = "outputs.jsonl"

_PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts; short for config.prompts")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "a prompt; short for config.prompt")


def main(config: DecodeConfig, workdir: Path) -> None:
    examples = given_prompts(config)
    decoder = Decoder(config)
    # a prompt that is too long is refused before anything is written
    inputs = None if examples is None else decoder.encode(examples)
    with Workdir(workdir, "decode", config) as run:
        _announce(decoder)
        if examples is None or inputs is None:
            answers, batches = _from_terminal(decoder)
            if not answers:
                raise UserError("there was no prompt; give --prompts=FILE, --prompt=TEXT or lines")
        else:
            answers, batches = _from_examples(decoder, examples, inputs)
        write_json_lines(run.path / OUTPUTS, [answer.record() for answer in answers])
        write_json_lines(run.path / METRICS, batches)
        summary = _summary(config, answers, batches)
        run.write_summary(summary, seed=config.seed)
        if examples is not None:
            _show(decoder, answers)  # last: whoever reads along may stop reading
        _say(summary, run.path)


def _from_examples(
    decoder: Decoder, examples: Examples, inputs: np.ndarray
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """All prompts at once, after a few of them to compile."""
    began = time.perf_counter()
    one_more = decoder.draft is not None  # for which a slot is refilled
    few = slice(decoder.config.batch_size + one_more)
    decoder(examples[few], inputs[few])
    warm_up_seconds = time.perf_counter() - began
    batches: list[dict[str, Any]] = []
    with Progress("decode", len(examples), unit="prompt") as progress:

        def on_done(done: int, seconds: float) -> None:
            batches.append({"kind": "batch", "done": done, "seconds": seconds})
            progress.update(done)

        answers = decoder(examples, inputs, on_done=on_done)
    batches[0]["warm_up_seconds"] = warm_up_seconds
    return answers, batches


def _from_terminal(decoder: Decoder) -> tuple[list[Answer], list[dict[str, Any]]]:
    """One prompt a line until the input ends; a prompt that is too long is told and left out."""
    answers: list[Answer] = []
    batches: list[dict[str, Any]] = []
    compiled: set[tuple[int, ...]] = set()  # shapes

    def on_done(done: int, seconds: float) -> None:
        batches.append({"kind": "batch", "done": len(answers) + done, "seconds": seconds})

    for line in _lines_of_terminal():
        try:
            prompt = Lines([line], "the prompt", decoder.config.prefix)
            inputs = decoder.encode(prompt)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if inputs.shape not in compiled:
            decoder(prompt, inputs)  # outside the clock
            compiled.add(inputs.shape)
        answers += decoder(prompt, inputs, first_id=len(answers), on_done=on_done)
        _show(decoder, answers[-1:])
    return answers, batches


def _lines_of_terminal() -> Iterator[str]:
    """Lines until the input ends; Ctrl-C where one is awaited ends it as well."""
    while True:
        if sys.stdin.isatty():
            print("prompt> ", end="", flush=True)
        try:
            with door.raising_ctrl_c():
                line = sys.stdin.readline()
        except KeyboardInterrupt:
            print()
            return
        if not line:
            return
        if line.strip():
            yield line


def _announce(decoder: Decoder) -> None:
    config = decoder.config
    models = {"target": decoder.target, "draft": decoder.draft}
    for role, loaded in models.items():
        if loaded is not None:
            print(f"{role}: {loaded}")
    how = f"gamma {config.gamma}, {config.verification} verification, " if decoder.draft else ""
    print(f"{how}temperature {config.temperature:g}, up to {config.max_new_tokens} tokens")
    if decoder.draft is not None:
        for key, value in config.draft_options.items():
            print(f"{key} {value:g}")
        if config.num_drafts > 1:
            print(f"{config.num_drafts} drafts")
        if lenience := _of_lenience(config):
            print(f"lenience {lenience['lenience']:g}: the texts are not of the target's law")
        legend = Text("colours: ")
        for origin, word in ORIGINS.items():
            legend.append(f"{word} ", STYLES[origin])
        Console().print(legend)


def _show(decoder: Decoder, answers: Sequence[Answer]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for answer in answers:
        console.print(Text(answer.prompt, "dim"))
        console.print(coloured(answer, decoder.vocabulary))


def _summary(
    config: DecodeConfig, answers: Sequence[Answer], batches: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    rate = sum(len(answer.tokens) for answer in answers) / sum(b["seconds"] for b in batches)
    about = {"temperature": config.temperature, "num_prompts": len(answers)}
    if not config.draft:
        return {**about, "tokens_per_second_target": rate}
    columns = ("emitted", "calls", "accepted", "tested")
    counts = {key: np.array([getattr(a, key) for a in answers], np.float64) for key in columns}
    return {
        **about,
        "gamma": config.gamma,
        **config.draft_options,
        "lossless": all(answer.lossless for answer in answers),
        **_of_lenience(config),
        **block_efficiency(counts["emitted"], counts["calls"], config.gamma).keys(
            "block_efficiency"
        ),
        **acceptance_rate(counts["accepted"], counts["tested"]).keys("acceptance_rate"),
        "tokens_per_second_speculative": rate,
    }


def _of_lenience(config: DecodeConfig) -> dict[str, Any]:
    """What makes texts another law's, as `evaluate` names it: `lenience` and how it is applied.

    Nothing at temperature 0, where nothing can be relaxed.
    """
    lenience = config.lenience
    if lenience.is_exact or config.temperature == 0:
        return {}
    return {
        "lenience": lenience.epsilon,
        "lenience_kind": lenience.kind,
        "relaxed_residual": lenience.relaxed_residual,
    }


def _say(summary: dict[str, Any], path: Path) -> None:
    for key in ("block_efficiency", "acceptance_rate"):
        if key in summary:
            print(f"{key}: {worded(summary, key)}")
    [rate] = (value for key, value in summary.items() if key.startswith("tokens_per_second"))
    count = summary["num_prompts"]
    print(f"tokens per second: {rate:,.0f}, {count} prompt{'s' * (count != 1)}")
    print(f"files: {path} ({OUTPUTS}, {METRICS}, summary.json)")


def _with_flags(config: DecodeConfig) -> DecodeConfig:
    """The config with the two short flags put into it."""
    prompts, prompt = _PROMPTS.value or config.prompts, tuple(_PROMPT.value or config.prompt)
    return dataclasses.replace(config, prompts=prompts, prompt=prompt)


def main_with_flags(config: DecodeConfig, workdir: Path) -> None:
    """`main` with the flags of prompts."""
    main(_with_flags(config), workdir)


def outline_with_flags(config: DecodeConfig) -> planning_decoding.Outline:
    """What is planned, with the flags of prompts."""
    return planning_decoding.of_decode(_with_flags(config))


if __name__ == "__main__":
    plan = planning_decoding.planner(outline_with_flags)
    door.run(main_with_flags, DecodeConfig, plan=plan)
