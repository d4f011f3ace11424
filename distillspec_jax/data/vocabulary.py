"""Vocabularies: text to pieces and back, and the fingerprint that tells two of them apart."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from distillspec_jax.errors import UserError, unknown_name

ARITHMETIC_STORIES = Path(__file__).parent / "vocabularies" / "arithmetic_stories.model"
T5_NUM_PIECES = 32_000
NUM_SENTINELS = 100


def _sentinels(count: int) -> list[str]:
    """T5's order: the last id is `<extra_id_0>`."""
    return [f"<extra_id_{index}>" for index in reversed(range(count))]


def fingerprint(pieces: Iterable[str]) -> str:
    """Hex sha256 of the pieces in the order of their ids; scores do not count."""
    return hashlib.sha256("\0".join(pieces).encode()).hexdigest()


class Vocabulary(abc.ABC):
    """Pieces and their ids; 0 is padding, and no sequence holds it.

    Attributes:
      pieces: every piece in the order of ids, sentinels included.
      pad_id, eos_id, unk_id: ids with a meaning of their own.
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(self, pieces: Sequence[str]):
        self.pieces = tuple(pieces)

    @property
    def size(self) -> int:
        """V, without the rows that a model's embedding may have on top."""
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.pieces)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end of sequence."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the end of sequence; padding is dropped."""
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.pad_id:
                kept.append(int(token))
        return self._decode(kept)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that hold neither padding nor the end of sequence."""

    def describe(self, start_id: int = 0) -> dict[str, Any]:
        """What a checkpoint stores of its vocabulary, for `check_same`."""
        return {
            "vocabulary_fingerprint": self.fingerprint,
            "vocabulary_size": self.size,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "decoder_start_id": start_id,
        }


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, with sentinels behind its own pieces where asked for."""

    def __init__(self, path: str | Path, num_sentinels: int | None = None):
        """Reads a `.model` file.

        Args:
          path: the file.
          num_sentinels: how many `<extra_id_N>` follow the model's pieces; None means 100 for a
            model of 32,000 pieces, which is how T5 uses it, and none for any other.
        """
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"'{path}' is not a SentencePiece model: {_reason(error)}") from error
        own = self._model.get_piece_size()
        if num_sentinels is None:
            num_sentinels = NUM_SENTINELS if own == T5_NUM_PIECES else 0
        self._num_own = own
        pieces = [self._model.id_to_piece(index) for index in range(own)]
        super().__init__(pieces + _sentinels(num_sentinels))
        special = {"padding": self._model.pad_id(), "end of sequence": self._model.eos_id()}
        for (name, found), wanted in zip(special.items(), (0, 1), strict=True):
            if found != wanted:
                raise UserError(
                    f"the SentencePiece model '{path}' has {name} at id {found}; T5-style models "
                    f"need it at {wanted} (train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1)"
                )
        self.unk_id = self._model.unk_id()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode([token for token in ids if token < self._num_own])


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it cannot be parsed as one"


def load_vocabulary(name: str | Path) -> Vocabulary:
    """Opens a vocabulary by the name of a packaged one or by the path of its file.

    Args:
      name: "arithmetic_stories", or a SentencePiece `.model` file.
    """
    if name == "arithmetic_stories":
        return SentencePieceVocabulary(ARITHMETIC_STORIES)
    if not Path(name).exists():
        raise UserError(f"the vocabulary file '{name}' does not exist")
    return SentencePieceVocabulary(name)
