"""The shape of a model, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillspec_jax.errors import UserError, unknown_name

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
DTYPES = ("float32", "bfloat16")  # of compute


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
    eos_id: int = 1
    decoder_start_id: int = 0
    dtype: str = "float32"  # of activations and matrix products; softmax, norms, logits: float32

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS, f"model '{self.name}'")
        check_dtype(self.dtype, f"model '{self.name}'")
        sizes = ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_decoder_layers")
        for field in sizes:
            if getattr(self, field) < 1:
                raise UserError(f"{field} of model '{self.name}' must be at least 1")
        if not 0 <= self.num_pieces <= self.vocab_size:
            raise UserError(
                f"num_pieces of model '{self.name}' is {self.num_pieces}, must be within "
                f"0 and vocab_size = {self.vocab_size}"
            )
        if self.num_pieces == 0:
            object.__setattr__(self, "num_pieces", self.vocab_size)
        if self.scale_logits is None:
            object.__setattr__(self, "scale_logits", self.tie_embeddings)

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
