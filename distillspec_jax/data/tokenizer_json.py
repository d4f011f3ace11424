"""Hugging Face `tokenizer.json` files of the unigram kind, as SentencePiece models.

A T5 tokenizer.json was made from a SentencePiece model: pieces with scores, and the character map
as it was. Putting them back lets one engine do all the work and needs no other library.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.data.added_tokens import (
    AddedToken,
    ForeignVocabulary,
    appended,
    read_object,
)
from distillspec_jax.errors import UserError

_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_MESSAGES: Any = sentencepiece_model_pb2  # made at import, which type checkers cannot see


@dataclasses.dataclass(frozen=True)
class Spaces:
    """What is done to a text about its spaces that is no setting of a SentencePiece model.

    Attributes:
      whitespace: every kind of it is a space, also where the character map leaves it.
      left, right: whitespace of every kind is taken from this end.
      first: only the text's first word gets a space in front; the text behind an added token is
        taken as it is.
    """

    whitespace: bool = False
    left: bool = False
    right: bool = False
    first: bool = False


def read(path: Path) -> tuple[bytes, list[AddedToken], Spaces]:
    """The serialised SentencePiece model of a unigram tokenizer.json, and what goes beside it.

    Raises:
      ForeignVocabulary: of another kind than unigram over Metaspace words, or with a part that
        SentencePiece cannot do.
      UserError: the file cannot be read, or is no complete tokenizer.json.
    """
    tokenizer = read_object(path)
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "Unigram":
        raise ForeignVocabulary(
            f"'{path}' has a model of type {kind}; only Unigram tokenizers, as T5 has, can be read"
        )
    try:
        return _convert(path, tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{path}' is not a complete tokenizer.json: {error!r}") from error


def _convert(path: Path, tokenizer: dict[str, Any]) -> tuple[bytes, list[AddedToken], Spaces]:
    model = tokenizer["model"]
    unknown, scores = model["unk_id"], [float(score) for _, score in model["vocab"]]
    added = [AddedToken.read(entry, entry["id"]) for entry in tokenizer.get("added_tokens") or ()]
    pieces = appended(path, [piece for piece, _ in model["vocab"]], added)
    special = {token.content for token in added if token.special}
    spelled = set(_BYTES) if model.get("byte_fallback") else set()
    if not spelled <= set(pieces):
        raise ForeignVocabulary(
            f"'{path}' has byte_fallback without a piece for each of the 256 bytes"
        )

    proto = _MESSAGES.ModelProto()
    kinds = _MESSAGES.ModelProto.SentencePiece
    for index, piece in enumerate(pieces):
        kind = kinds.NORMAL if index < len(scores) else kinds.UNUSED  # decoded, never cut from text
        kind = kinds.BYTE if piece in spelled else kind
        kind = kinds.CONTROL if piece in special else kind
        kind = kinds.UNKNOWN if index == unknown else kind
        proto.pieces.add(piece=piece, score=scores[index] if index < len(scores) else 0, type=kind)
    names = {piece: index for index, piece in enumerate(pieces)}
    trainer = proto.trainer_spec
    trainer.model_type = _MESSAGES.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = bool(spelled)
    trainer.unk_id, trainer.unk_piece = unknown, pieces[unknown]
    trainer.pad_id, trainer.eos_id = names.get("<pad>", -1), names.get("</s>", -1)
    trainer.bos_id = -1
    spaces = _spaces(path, tokenizer, proto.normalizer_spec)
    if not spaces.whitespace:
        # The whole text is normalised before these are found: a space before one is not at an end.
        space = (names.get(_SPACE, unknown),)
        added = [
            dataclasses.replace(token, space=space) if token.normalized else token
            for token in added
        ]
    return proto.SerializeToString(), added, spaces


def _steps(part: dict[str, Any] | None, field: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[field] if part["type"] == "Sequence" else [part]


def _spaces(path: Path, tokenizer: dict[str, Any], spec: Any) -> Spaces:
    """Character map and treatment of spaces; whatever SentencePiece cannot do is refused."""
    spec.name = "tokenizer.json"
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = True
    cuts = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    order = [step["type"] for step in cuts]
    if order not in (["WhitespaceSplit", "Metaspace"], ["Metaspace"]):
        raise ForeignVocabulary(
            f"'{path}' cuts words in a way that T5 does not: its pre_tokenizer is "
            f"{' and '.join(order) or 'empty'}, not Metaspace, with or without WhitespaceSplit"
        )
    metaspace, whitespace = cuts[-1], len(cuts) > 1
    scheme = metaspace.get("prepend_scheme", "always")
    prepends = scheme == "always" or (scheme == "first" and not whitespace)
    if (
        not prepends
        or not metaspace.get("add_prefix_space", True)
        or metaspace.get("replacement", _SPACE) != _SPACE
    ):
        raise ForeignVocabulary(f"'{path}' cuts words in a way that T5 does not: {metaspace}")
    runs = left = right = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
                try:
                    spec.precompiled_charsmap = base64.b64decode(charsmap, validate=True)
                except binascii.Error:
                    raise UserError(f"'{path}' has a damaged character map") from None
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "▁"}:
                runs = True
            case {"type": "Strip", "strip_left": bool(), "strip_right": bool()}:
                left, right = left or step["strip_left"], right or step["strip_right"]
            case {"type": "Precompiled" | "Strip"}:
                raise KeyError(step["type"])
            case _:
                raise ForeignVocabulary(
                    f"'{path}' normalises text by {step['type']}, which T5 does not: {step!s:.100}"
                )
    if not runs and not whitespace:
        raise ForeignVocabulary(
            f"'{path}' keeps runs of spaces, which T5 does not: its Metaspace stands without "
            "WhitespaceSplit and without a normalizer that replaces ' {2,}'"
        )
    return Spaces(whitespace, left, right, first=scheme == "first")
