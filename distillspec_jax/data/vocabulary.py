"""Vocabularies: text to pieces and back, and the fingerprint that tells two of them apart."""

from __future__ import annotations

import abc
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from distillspec_jax.data import tokenizer_json
from distillspec_jax.errors import UserError

ARITHMETIC_STORIES = Path(__file__).parent / "vocabularies" / "arithmetic_stories.model"
_T5_NUM_PIECES = 32_000
_T5_NUM_SENTINELS = 100
_BYT5_NUM_SENTINELS = 125
_BYTE_OFFSET = 3  # padding, end of sequence and unknown come before the bytes
_SENTINEL = re.compile(r"(<extra_id_\d+>)")


def fingerprint(pieces: Iterable[str]) -> str:
    """Hex sha256 of the pieces in the order of their ids; scores do not count."""
    return hashlib.sha256("\0".join(pieces).encode()).hexdigest()


class Vocabulary(abc.ABC):
    """Pieces and their ids, laid out as T5 has them: 0 pads, 1 ends, 2 is unknown.

    Attributes:
      pieces: every piece in the order of ids, sentinels included.
      pad_id, eos_id, unk_id: ids with a meaning of their own.
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(self, pieces: Sequence[str]):
        self.pieces = tuple(pieces)
        self._sentinels = {
            piece: index for index, piece in enumerate(pieces) if _SENTINEL.fullmatch(piece)
        }
        self._silent = {self.pad_id, *self._sentinels.values()}

    @property
    def size(self) -> int:
        """V, without the rows that a model's embedding may have on top."""
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end of sequence; `<extra_id_N>` becomes its sentinel."""
        if not self._sentinels or "<extra_id_" not in text:
            return self._encode(text)
        ids: list[int] = []
        for part in _SENTINEL.split(text):
            known = part in self._sentinels
            ids += [self._sentinels[part]] if known else self._encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the end of sequence; padding and sentinels are dropped.

        Ids of embedding rows without a piece are dropped, too.
        """
        kept = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if token not in self._silent and token < self.size:
                kept.append(token)
        return self._decode(kept)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text without sentinels."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids of ordinary pieces."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint stores of its vocabulary, for `check_same`."""
        return {
            "vocabulary_fingerprint": self.fingerprint,
            "vocabulary_size": self.size,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
        }


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, with sentinels behind its own pieces where asked for."""

    def __init__(self, proto: bytes, where: str | Path, num_sentinels: int | None = None):
        """Takes a serialised model.

        Args:
          proto: the content of a `.model` file.
          where: its path, for messages.
          num_sentinels: how many `<extra_id_N>` follow the model's pieces, the last being N = 0;
            None means 100 for a model of 32,000 pieces, as T5 has them, and none for any other.

        Raises:
          UserError: not a SentencePiece model, or one whose special ids are not T5's.
        """
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise UserError(f"'{where}' is not a SentencePiece model") from error
        own = self._model.get_piece_size()
        special = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if special != (self.pad_id, self.eos_id, self.unk_id):
            raise UserError(
                f"the vocabulary '{where}' has padding, end of sequence and unknown at the ids "
                f"{special}; T5-style models need (0, 1, 2): train it with pad_id=0, eos_id=1, "
                "unk_id=2, bos_id=-1"
            )
        if num_sentinels is None:
            num_sentinels = _T5_NUM_SENTINELS if own == _T5_NUM_PIECES else 0
        pieces = [self._model.id_to_piece(index) for index in range(own)]
        super().__init__(pieces + [f"<extra_id_{n}>" for n in reversed(range(num_sentinels))])

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class ByteVocabulary(Vocabulary):
    """ByT5: id = byte of UTF-8 + 3, then 125 sentinels of which the first is `<extra_id_0>`."""

    def __init__(self) -> None:
        special = ["<pad>", "</s>", "<unk>"]
        sentinels = [f"<extra_id_{n}>" for n in range(_BYT5_NUM_SENTINELS)]
        super().__init__([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sentinels])

    def _encode(self, text: str) -> list[int]:
        return [byte + _BYTE_OFFSET for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        # Half a character, as a cut or a weak model leaves it, is dropped.
        kept = bytes(token - _BYTE_OFFSET for token in ids if token >= _BYTE_OFFSET)
        return kept.decode(errors="ignore")


def load_vocabulary(name: str | Path) -> Vocabulary:
    """Opens a vocabulary by its name or by the path of its file.

    Args:
      name: "arithmetic_stories" (packaged), "bytes" (ByT5), a SentencePiece `.model` file, a
        unigram `tokenizer.json`, or a Hugging Face folder that holds one of the two or is ByT5's.
    """
    if name == "arithmetic_stories":
        return SentencePieceVocabulary(ARITHMETIC_STORIES.read_bytes(), ARITHMETIC_STORIES)
    if name == "bytes":
        return ByteVocabulary()
    path = Path(name)
    if path.is_dir():
        if _is_byt5(path):
            return ByteVocabulary()
        names = ("tokenizer.json", "spiece.model")
        found = [path / file for file in names if (path / file).is_file()]
        if not found:
            raise UserError(f"the folder '{name}' holds neither tokenizer.json nor spiece.model")
        path = found[0]
    if path.suffix == ".json":
        return SentencePieceVocabulary(tokenizer_json.model_proto(path), path, num_sentinels=0)
    try:
        proto = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"the vocabulary '{name}' is neither a file nor one of: arithmetic_stories, bytes"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the vocabulary '{name}': {error.strerror}") from error
    return SentencePieceVocabulary(proto, path)


def _is_byt5(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "ByT5Tokenizer" in settings.read_text("utf-8", errors="replace")


def check_same(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    names: tuple[str, str] = ("target", "draft"),
) -> None:
    """Refuses two that do not speak the same vocabulary.

    Args:
      first, second: descriptions as `Vocabulary.describe` and `zoo.describe` give them; what one
        of them does not say (a foreign checkpoint has no fingerprint) is not compared.
      names: what the error calls them.

    Raises:
      UserError: naming everything that differs.
    """
    labels = {
        "vocabulary_fingerprint": "fingerprint of the pieces",
        "vocabulary_size": "number of pieces",
        "pad_id": "id of padding",
        "eos_id": "id of the end of sequence",
        "decoder_start_id": "id that starts decoding",
    }
    different = []
    for key, label in labels.items():
        ours, theirs = first.get(key), second.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            different.append(f"{label} {_short(ours)} and {_short(theirs)}")
    if different:
        raise UserError(
            f"{' and '.join(names)} have different vocabularies: {'; '.join(different)}; pieces "
            "and special ids must be the same"
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)
