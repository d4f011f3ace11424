"""The part of a config that gives the draft a sampling of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSampling:
    """Keys of a config; None is the target's own."""

    draft_temperature: float | None = None
    draft_top_k: int | None = None
    draft_top_p: float | None = None

    @property
    def draft_options(self) -> dict[str, float]:
        """Those that are given, by key."""
        names = [field.name for field in dataclasses.fields(DraftSampling)]
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    def draft_sampling(self, sampling: Sampling) -> Sampling:
        """The draft's, where the target has `sampling`.

        Raises UserError, with the key, for a value out of range.
        """
        own: dict[str, Any] = self.draft_options
        try:
            return dataclasses.replace(
                sampling, **{name.removeprefix("draft_"): value for name, value in own.items()}
            )
        except UserError as error:
            raise UserError(f"config.draft_{error}") from None
