"""The shape of a model, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillspec_jax.errors import UserError, unknown_name

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
DTYPES = ("float32", "bfloat16")  # of compute
_LEAST = {
    "vocab_size": 1,
    "d_model": 1,
    "num_heads": 1,
    "head_dim": 1,
    "d_ff": 1,
    "num_encoder_layers": 0,
    "num_decoder_layers": 1,
    "relative_buckets": 4,  # an encoder halves them by sign, and half of the rest are exact
    "pad_id": 0,
    "eos_id": -1,  # nothing ends a text
    "decoder_start_id": 0,
}


class FieldError(UserError):
    """A field of a ModelConfig holds what no model can have.

    Who reads a file may say it again by the name that the field has there.
    """

    def __init__(self, model: str, field: str, value: Any, must: str) -> None:
        super().__init__(f"{field} of model '{model}' is {value!r:.60}, must be {must}")
        self.field, self.value, self.must = field, value, must


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a T5-style model but its weights.

    `num_encoder_layers == 0` makes a decoder-only model: the same decoder stack without
    cross-attention. Field names follow the T5 papers; sizes use the legend of the house
    (D model size, N heads, H head size, F MLP size, V vocabulary).
    """

    name: str
    vocab_size: int  # V: rows of the embedding, padding rows included
    d_model: int  # D
    num_heads: int  # N
    head_dim: int  # H; N * H need not be D
    d_ff: int  # F
    num_encoder_layers: int
    num_decoder_layers: int
    num_pieces: int = 0  # ids >= num_pieces are never produced; 0 means vocab_size
    activation: str = "gelu_new"
    gated: bool = True
    tie_embeddings: bool = False
    scale_logits: bool | None = None  # multiply the decoder output by D**-0.5; None: if tied
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    pad_id: int = 0
    eos_id: int = 1  # -1, which no stored model has: nothing ends a text
    decoder_start_id: int = 0
    dtype: str = "float32"  # of activations and matrix products; softmax, norms, logits: float32

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS, f"model '{self.name}'")
        check_dtype(self.dtype, f"model '{self.name}'")
        for field, least in _LEAST.items():
            self._check(field, getattr(self, field) >= least, f"at least {least}")
        for field in ("pad_id", "eos_id", "decoder_start_id"):
            is_row = getattr(self, field) < self.vocab_size
            self._check(field, is_row, f"less than vocab_size = {self.vocab_size}")
        for field in ("layer_norm_epsilon", "dropout_rate"):
            is_share = 0 <= getattr(self, field) < 1
            self._check(field, is_share, "at least 0 and less than 1")
        exact = self.relative_buckets // 2
        self._check(
            "relative_max_distance",
            self.relative_max_distance > exact,
            f"more than {exact}, half of the buckets",
        )
        is_part = 0 <= self.num_pieces <= self.vocab_size
        self._check("num_pieces", is_part, f"within 0 and vocab_size = {self.vocab_size}")
        if self.num_pieces == 0:
            object.__setattr__(self, "num_pieces", self.vocab_size)
        if self.scale_logits is None:
            object.__setattr__(self, "scale_logits", self.tie_embeddings)

    def _check(self, field: str, is_right: bool, must: str) -> None:
        if not is_right:
            raise FieldError(self.name, field, getattr(self, field), must)

    def as_stored(self) -> dict[str, Any]:
        """The fields that go with weights: what one run computed in is no property of them."""
        return dataclasses.asdict(dataclasses.replace(self, dtype="float32"))

    @property
    def is_encoder_decoder(self) -> bool:
        return self.num_encoder_layers > 0

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids with a meaning of their own, by the names of their fields."""
        ids = {"pad_id": self.pad_id, "eos_id": self.eos_id}
        if self.is_encoder_decoder:  # decoder-only models start from their prompt
            ids["decoder_start_id"] = self.decoder_start_id
        return ids


def check_dtype(dtype: str, where: str) -> None:
    """Refuses a dtype that no model computes in."""
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES, where)


def check_has_end(eos_id: int, where: str) -> None:
    """Refuses a model whose texts nothing ends: it is for measuring, not for files."""
    if eos_id < 0:
        raise UserError(f"{where} has eos_id {eos_id}, must be the id of a piece")
