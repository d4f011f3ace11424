"""The few lines of a T5X `config.gin` that tell what shapes do not. Nothing of it is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig

FILES = ("config.gin", "operative_config.gin", "model-info.txt")
MAX_BYTES = 2**20
_BINDING = re.compile(r"^(?:\w+\.)*T5Config\.(\w+)[ \t]*=[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu", "swish": "silu"}  # Flax's names
_SAME = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "logits_via_embedding": "tie_embeddings",
}


def read(folder: Path) -> dict[str, Any]:
    """Literal bindings of `T5Config` in the gin file of a folder or of its parent; else empty."""
    for place in (folder, folder.parent):
        for name in FILES:
            path = place / name
            if path.is_file() and path.stat().st_size <= MAX_BYTES:
                return _bindings(path.read_text("utf-8", errors="replace"))
    return {}


def _bindings(text: str) -> dict[str, Any]:
    found = {}
    for name, literal in _BINDING.findall(text):
        try:
            found[name] = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue  # a macro or a reference: the shapes tell
    return found


def checked(stated: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, Any]:
    """Fields of `config` that gin tells; raises UserError where it contradicts the shapes."""
    for theirs, ours in _SAME.items():
        if theirs in stated and stated[theirs] != getattr(config, ours):
            raise UserError(
                f"{where}: gin says {theirs} = {stated[theirs]!r:.40}, its tensors say "
                f"{getattr(config, ours)}"
            )
    fields: dict[str, Any] = {}
    if type(stated.get("dropout_rate")) in (int, float):
        fields["dropout_rate"] = float(stated["dropout_rate"])
    if "mlp_activations" in stated:
        fields["activation"] = _activation(stated["mlp_activations"], config.gated, where)
    return fields


def _activation(stated: Any, gated: bool, where: str) -> str:
    names = list(stated) if isinstance(stated, tuple | list) else [stated]
    known = names and isinstance(names[0], str) and names[0] in _ACTIVATIONS
    if not known or names[1:] != (["linear"] if gated else []):
        raise UserError(f"{where}: gin says mlp_activations = {stated!r:.60}, not supported")
    return _ACTIVATIONS[names[0]]
