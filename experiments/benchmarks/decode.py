"""Decoding beside Hugging Face: plain, with a draft, and against the bandwidth of the memory.

Fresh models of published shapes decode texts of a fixed length, which nothing ends, alone or with
a fresh draft: how fast are their weights read? A trained target and its draft decode prompts of
`arithmetic_stories`. Greedy throughout, so that the tokens that different decoders make of the same
weights can be compared one by one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.models.config import check_dtype
from distillspec_jax.models.presets import preset
from experiments.checks import check_least
from experiments.models import check_meeting

PEERS = ("torch", "transformers")
PARTS = ("plain", "drafted", "products")
LISTS = ("batch_sizes", "shapes", "new_tokens", "gammas", "product_rows")
COUNTS = (
    *("batch_sizes", "input_length", "new_tokens", "rounds", "read_megabytes", "gammas"),
    *("max_new_tokens", "tuning_prompts", "repeats", "cost_steps", "product_rows"),
    "fresh_gamma",
)
Row = dict[str, Any]
Found = tuple[Row, list[Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed: fresh models of `shapes`, `target` with and without `draft`, and products."""

    parts: tuple[str, ...] = PARTS
    peers: bool = True  # also Hugging Face, where it is installed
    batch_sizes: tuple[int, ...] = (1, 8)
    shapes: tuple[str, ...] = ("t5_1_1_base", "t5_1_1_small")  # presets; keys of the first are bare
    input_length: int = 128
    new_tokens: tuple[int, ...] = (64, 256)  # the first gives the headline
    dtype: str = "float32"  # of the fresh models' weights and products, or bfloat16
    fresh_draft: str = ""  # a preset that drafts for the fresh models; "": nobody
    fresh_gamma: int = 5
    rounds: int = 5  # timed runs of everything, after the warm-up
    read_megabytes: int = 512  # of memory; far more than a cache holds
    target: str = "stories-target"
    draft: str = "stories-draft"  # best a distilled one, runs/quickstart/distilled
    gammas: tuple[int, ...] = tuple(range(1, 8))  # the best for each batch size is found by tuning
    max_new_tokens: int = 56
    tuning_prompts: int = 100
    prompts: int = 48  # of the test split
    repeats: int = 3  # timed runs of each prompt
    cost_steps: int = 32  # model calls in one timed loop of c and v
    product_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part", part, PARTS, "config.decode.parts")
        for field in LISTS:
            if not getattr(self, field):
                raise UserError(f"config.decode.{field} is empty, must have at least one entry")
        check_dtype(self.dtype, "config.decode.dtype")
        for key, names in {"shapes": self.shapes, "fresh_draft": self.fresh_drafts}.items():
            for name in names:
                if not preset(name).is_encoder_decoder:
                    raise UserError(f"config.decode.{key} has '{name}', which has no encoder")
        check_least(self, 1, *COUNTS, where="config.decode")
        if self.prompts < max(self.batch_sizes):
            raise UserError(
                f"config.decode.prompts is {self.prompts}, too few for a batch of "
                f"{max(self.batch_sizes)}"
            )

    @property
    def fresh_drafts(self) -> tuple[str, ...]:
        """The preset of `fresh_draft`, if there is one."""
        return (self.fresh_draft,) * bool(self.fresh_draft)


def measure(config: Config, seed: int) -> Found:
    """Times everything; (figures of the summary, one record per row of the table)."""
    from experiments.benchmarks import decode_drafted, decode_plain, decode_products

    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if config.peers and absent:
        print(f"Hugging Face: left out, {' and '.join(absent)} not installed")
    if config.peers and config.dtype != "float32":
        print(f"Hugging Face: left out, it computes in float32 here and not in {config.dtype}")
    has_peers = config.peers and not absent and config.dtype == "float32"
    if "drafted" in config.parts:  # told now, not behind an hour of the other parts
        check_meeting(config.target, config.draft)
    summary: Row = {}
    records: list[Row] = []
    modules: dict[str, Any] = {
        "plain": decode_plain,
        "drafted": decode_drafted,
        "products": decode_products,
    }
    for part in config.parts:
        figures, rows = modules[part].measure(config, seed, has_peers)
        summary |= figures
        records += [{"kind": "timing", "part": part, **row} for row in rows]
    return summary, records
