"""Decoding beside Hugging Face: plain, with a draft, and against the memory's bandwidth."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    rounds: int = 5  # timed runs of everything, after the warm-up


def measure(config: Config, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times everything; (figures of the summary, one record per row of the table)."""
    return {}, []
