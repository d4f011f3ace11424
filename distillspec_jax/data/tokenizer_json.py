"""Hugging Face `tokenizer.json` files of the unigram kind, as SentencePiece models.

A T5 tokenizer.json was made from a SentencePiece model: pieces with scores, and the character map
as it was. Putting them back lets one engine do all the work and needs no other library.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.errors import UserError

_SPACE = "▁"
_MESSAGES: Any = sentencepiece_model_pb2  # made at import, which type checkers cannot see


def model_proto(path: str | Path) -> bytes:
    """The serialised SentencePiece model of a unigram tokenizer.json.

    Raises:
      UserError: the file cannot be read, is no tokenizer.json, or is of another kind than unigram
        over Metaspace words.
    """
    tokenizer = _read(path)
    try:
        return _convert(path, tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{path}' is not a complete tokenizer.json: {error!r}") from error


def _read(path: str | Path) -> dict[str, Any]:
    try:
        tokenizer = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON") from error
    kind = tokenizer.get("model", {}).get("type") if isinstance(tokenizer, dict) else None
    if kind != "Unigram":
        raise UserError(
            f"'{path}' has a model of type {kind}; only Unigram tokenizers, as T5 has, can be read"
        )
    return tokenizer


def _convert(path: str | Path, tokenizer: dict[str, Any]) -> bytes:
    unknown = tokenizer["model"]["unk_id"]
    pieces = [(piece, float(score)) for piece, score in tokenizer["model"]["vocab"]]
    added = sorted(tokenizer.get("added_tokens", ()), key=lambda token: token["id"])
    special = {token["content"] for token in added if token["special"]}
    plain = {token["content"] for token in added} - special
    for token in added:
        if token["id"] >= len(pieces):
            if token["id"] > len(pieces):
                raise UserError(f"'{path}' has no piece with id {len(pieces)}")
            pieces.append((token["content"], 0.0))
        elif pieces[token["id"]][0] != token["content"]:
            raise UserError(f"'{path}' has two pieces with id {token['id']}")

    proto = _MESSAGES.ModelProto()
    kinds = _MESSAGES.ModelProto.SentencePiece
    for index, (piece, score) in enumerate(pieces):
        kind = kinds.CONTROL if piece in special else kinds.NORMAL
        kind = kinds.USER_DEFINED if piece in plain else kind
        kind = kinds.UNKNOWN if index == unknown else kind
        proto.pieces.add(piece=piece, score=score, type=kind)
    names = {piece: index for index, (piece, _) in enumerate(pieces)}
    trainer = proto.trainer_spec
    trainer.model_type = _MESSAGES.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.unk_id, trainer.unk_piece = unknown, pieces[unknown][0]
    trainer.pad_id, trainer.eos_id = names.get("<pad>", -1), names.get("</s>", -1)
    trainer.bos_id = -1
    _normalizer(path, tokenizer, proto.normalizer_spec)
    return proto.SerializeToString()


def _steps(part: dict[str, Any] | None, field: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[field] if part["type"] == "Sequence" else [part]


def _normalizer(path: str | Path, tokenizer: dict[str, Any], spec: Any) -> None:
    """Character map and treatment of spaces; whatever SentencePiece cannot do is refused."""
    spec.name = "tokenizer.json"
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = True
    known = ("WhitespaceSplit", "Metaspace")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        prepends = step.get("add_prefix_space", True) and step.get("prepend_scheme") != "never"
        if step["type"] not in known or not prepends or step.get("replacement", _SPACE) != _SPACE:
            raise UserError(f"'{path}' cuts words in a way that T5 does not: {step}")
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        match step["type"]:
            case "Precompiled":
                try:
                    charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
                except binascii.Error:
                    raise UserError(f"'{path}' has a damaged character map") from None
                spec.precompiled_charsmap = charsmap
            case "Replace" | "Strip":  # runs of spaces, and spaces at the ends
                continue
            case other:
                raise UserError(f"'{path}' normalises text by {other}, which T5 does not")
