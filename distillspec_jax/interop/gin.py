"""The few lines of a T5X `config.gin` that tell what shapes do not. Nothing of it is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig

FILES = ("config.gin", "operative_config.gin", "model-info.txt")
MAX_BYTES = 2**20
MAX_MACROS = 16  # one that stands for another, and so on
# a piece of text, a string whole; a comment; a line that goes on; any other character
_PIECE = re.compile(
    r"""[^'"#\\\n()\[\]{}]+|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|#[^\n]*|\\\n|.""", re.DOTALL
)
_BINDING = re.compile(r"((?:[\w.]+/)*)((?:\w+\.)*)(\w+)\s*=\s*(.+)", re.DOTALL)
_BLOCK = re.compile(r"((?:[\w.]+/)*(?:\w+\.)*\w+)\s*:\s*")  # its bindings follow, indented
_DECISIVE = "mlp_activations"  # what shapes do not tell
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


class Unread(str):
    """The text of a value that only gin could tell: a call, or a macro from elsewhere."""


def read(folder: Path) -> dict[str, Any]:
    """Bindings of `T5Config` in the gin file of a folder or of its parent; else empty.

    A value is a literal, or `Unread`: also where two scopes say something different.
    """
    for place in (folder, folder.parent):
        for name in FILES:
            path = place / name
            if path.is_file() and path.stat().st_size <= MAX_BYTES:
                return _bindings(path.read_text("utf-8", errors="replace"))
    return {}


def _bindings(text: str) -> dict[str, Any]:
    statements = _statements(text)
    bound: dict[str, dict[str, str]] = {}  # name -> scope -> text; of two, gin takes the last
    macros: dict[str, str] = {}
    for match in filter(None, map(_BINDING.fullmatch, statements)):
        scope, selector, name, value = match.groups()
        if not scope and not selector:
            macros[name] = value
        elif selector.split(".")[-2:-1] == ["T5Config"]:  # "network.T5Config."
            bound.setdefault(name, {})[scope] = value
    found = {name: _value(list(by_scope.values()), macros) for name, by_scope in bound.items()}
    if _DECISIVE not in found and f"T5Config.{_DECISIVE}" in "".join(statements):
        found[_DECISIVE] = Unread("what no binding of gin looks like")
    return found


def _statements(text: str) -> list[str]:
    """Logical lines, each binding of a block spelt out as one of its own."""
    found, block = [], ""
    for line in _logical_lines(text):
        if header := _BLOCK.fullmatch(line):
            block = f"{header[1]}."
        elif line.strip():
            block = block if line[0].isspace() else ""
            found.append(block + line.strip())
    return found


def _logical_lines(text: str) -> Iterator[str]:
    """Lines without their comments; what brackets and backslashes join is one."""
    line, depth = "", 0
    for piece in _PIECE.findall(text):
        depth += (piece in "([{") - (piece in ")]}")
        if piece == "\n" and depth <= 0:
            yield line
            line, depth = "", 0
        elif piece.endswith("\n"):
            line += " "
        elif not piece.startswith("#"):
            line += piece
    yield line


def _value(texts: list[str], macros: Mapping[str, str]) -> Any:
    """What all of these texts of a value mean."""
    values = [_literal(text, macros) for text in texts]
    if any(value != values[0] for value in values):
        return Unread(" and in another scope ".join(texts))
    return values[0]


def _literal(text: str, macros: Mapping[str, str]) -> Any:
    for _ in range(MAX_MACROS):
        if not text.startswith("%") or text[1:] not in macros:
            break
        text = macros[text[1:]]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Unread(text)


def checked(stated: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, Any]:
    """Fields of `config` that gin tells.

    Raises UserError where it contradicts the shapes, or its activation cannot be read.
    """
    for theirs, ours in _SAME.items():
        value = stated.get(theirs, Unread())
        if not isinstance(value, Unread) and value != getattr(config, ours):
            raise UserError(
                f"{where}: gin says {theirs} = {value!r:.40}, its tensors say "
                f"{getattr(config, ours)}"
            )
    fields: dict[str, Any] = {}
    if type(stated.get("dropout_rate")) in (int, float):
        fields["dropout_rate"] = stated["dropout_rate"]
    if _DECISIVE in stated:
        fields["activation"] = _activation(stated[_DECISIVE], config.gated, where)
    return fields


def _activation(stated: Any, gated: bool, where: str) -> str:
    if isinstance(stated, Unread):
        raise UserError(
            f"{where}: gin says {_DECISIVE} = {stated:.60}, which only gin can read; write it out "
            "there, as ('gelu', 'linear') for one"
        )
    names = list(stated) if isinstance(stated, tuple | list) else [stated]
    known = names and isinstance(names[0], str) and names[0] in _ACTIVATIONS
    if not known or names[1:] != (["linear"] if gated else []):
        raise UserError(f"{where}: gin says {_DECISIVE} = {stated!r:.60}, not supported")
    return _ACTIVATIONS[names[0]]
