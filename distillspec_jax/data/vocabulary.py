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
from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.data import added_tokens, tokenizer_json
from distillspec_jax.data.added_tokens import AddedToken, ForeignVocabulary
from distillspec_jax.errors import UserError

ARITHMETIC_STORIES = Path(__file__).parent / "vocabularies" / "arithmetic_stories.model"
_T5_NUM_PIECES = 32_000
_T5_NUM_SENTINELS = 100
_BYT5_NUM_SENTINELS = 125
_MAX_SENTINELS = 10_000
_BYTE_OFFSET = 3  # padding, end of sequence and unknown come before the bytes
_SENTINEL = re.compile(r"<extra_id_\d+>")
# Unicode's White_Space, which Hugging Face splits words at.
_WHITESPACE = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_MESSAGES: Any = sentencepiece_model_pb2  # made at import, which type checkers cannot see


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

    def __init__(self, pieces: Sequence[str], added: Iterable[AddedToken] = ()):
        self.pieces = tuple(pieces)
        sentinels = [
            AddedToken(piece, index, special=True)
            for index, piece in enumerate(pieces)
            if _SENTINEL.fullmatch(piece)
        ]
        # A text cannot say that it is padding or at its end.
        reserved = (self.pad_id, self.eos_id, self.unk_id)
        tokens = {token.id: token for token in (*sentinels, *added) if token.id not in reserved}
        self._silent = {self.pad_id, *(token.id for token in tokens.values() if token.special)}
        self._finder = added_tokens.Finder(tokens.values())

    @property
    def size(self) -> int:
        """V, without the rows that a model's embedding may have on top."""
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end of sequence.

        `<extra_id_N>` becomes its sentinel, and an added token its id.
        """
        ids: list[int] = []
        behind = False
        for part, token in self._finder.split(text):
            ids += self._encode_part(part, behind, token)
            if token is not None:
                ids.append(token.id)
                behind = True
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the end of sequence.

        Padding, sentinels, special tokens and ids of embedding rows without a piece are dropped.
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
        """The ids of a text without added tokens."""

    def _encode_part(self, text: str, behind: bool, before: AddedToken | None) -> list[int]:
        """As `_encode`, where added tokens next to the text make a difference.

        Args:
          behind: whether it stands behind one, or starts the whole text.
          before: the one that it stands before; None if it ends the whole text.
        """
        return self._encode(text)

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
    """A SentencePiece model, with sentinels and added tokens behind its own pieces."""

    def __init__(
        self,
        proto: bytes,
        where: str | Path,
        *,
        num_sentinels: int | None = None,
        added: Sequence[AddedToken] = (),
        spaces: tokenizer_json.Spaces | None = None,
    ):
        """Takes a serialised model.

        Args:
          proto: the content of a `.model` file.
          where: its path, for messages.
          num_sentinels: how many `<extra_id_N>` follow the model's pieces, the last being N = 0;
            None means 100 for a model of 32,000 pieces, as T5 has them, and none for any other.
          added: tokens that follow the sentinels, or are pieces already.
          spaces: what else is done to a text's spaces.

        Raises:
          ForeignVocabulary: the special ids are not T5's, or `added` does not fit the pieces.
          UserError: not a SentencePiece model.
        """
        self._model = _processor(proto, where)
        own = self._model.get_piece_size()
        special = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if special != (self.pad_id, self.eos_id, self.unk_id):
            raise ForeignVocabulary(
                f"the vocabulary '{where}' has padding, end of sequence and unknown at the ids "
                f"{special}; T5-style models need (0, 1, 2): train it with pad_id=0, eos_id=1, "
                "unk_id=2, bos_id=-1"
            )
        if num_sentinels is None:
            num_sentinels = _T5_NUM_SENTINELS if own == _T5_NUM_PIECES else 0
        pieces = [self._model.id_to_piece(index) for index in range(own)]
        pieces += [f"<extra_id_{n}>" for n in reversed(range(num_sentinels))]
        grown = added_tokens.appended(where, pieces, added)
        if len(grown) > len(pieces):
            proto = _with_unused(proto, grown[own:])
            self._model = _processor(proto, where)
        super().__init__(grown, added)
        for token in added:
            if token.normalized and token.content != self._normalized(token.content):
                raise ForeignVocabulary(
                    f"'{where}' adds the token {token.content!r} as `normalized`, and its "
                    "character map makes something else of it; add it with normalized=False"
                )
        self._spaces = spaces or tokenizer_json.Spaces()
        self._glued = _processor(_without_prefix(proto), where) if self._spaces.first else None
        split_at = _WHITESPACE if self._spaces.whitespace else ""
        kept = (char for char in split_at if self._normalized(f"a{char}b") == f"a{char}b")
        self._to_space = str.maketrans(dict.fromkeys(kept, " "))

    def _normalized(self, text: str) -> str:
        return self._model.normalize(text).removeprefix("▁").replace("▁", " ")

    def _is_space(self, char: str) -> bool:
        return self._normalized(f"a{char}b") == "a b"

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _encode_part(self, text: str, behind: bool, before: AddedToken | None) -> list[int]:
        space = before.space if before is not None else ()
        if self._spaces.left:
            text = text.lstrip(_WHITESPACE)
        if self._spaces.right and not space:
            text = text.rstrip(_WHITESPACE)
        if self._to_space:
            text = text.translate(self._to_space)
        model = self._model
        if behind and self._glued is not None and not self._is_space(text[:1]):
            model = self._glued
        ids = model.encode(text)
        return [*ids, *space] if space and self._is_space(text[-1:]) else ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _processor(proto: bytes, where: str | Path) -> Any:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise UserError(f"'{where}' is not a SentencePiece model") from error
    return model


def _with_unused(proto: bytes, pieces: Iterable[str]) -> bytes:
    """The model with pieces behind its own that it decodes, but never cuts from a text."""
    model = _MESSAGES.ModelProto.FromString(proto)
    for piece in pieces:
        model.pieces.add(piece=piece, score=0, type=_MESSAGES.ModelProto.SentencePiece.UNUSED)
    return model.SerializeToString()


def _without_prefix(proto: bytes) -> bytes:
    """The model without the space that it puts before a text."""
    model = _MESSAGES.ModelProto.FromString(proto)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString()


class ByteVocabulary(Vocabulary):
    """ByT5: id = byte of UTF-8 + 3, then sentinels of which the first is `<extra_id_0>`."""

    def __init__(
        self,
        num_sentinels: int = _BYT5_NUM_SENTINELS,
        added: Sequence[AddedToken] = (),
        where: str | Path = "bytes",
    ) -> None:
        special = ["<pad>", "</s>", "<unk>"]
        sentinels = [f"<extra_id_{n}>" for n in range(num_sentinels)]
        pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sentinels]
        super().__init__(added_tokens.appended(where, pieces, added), added)

    def _encode(self, text: str) -> list[int]:
        return [byte + _BYTE_OFFSET for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        # Half a character, as a cut or a weak model leaves it, is dropped.
        kept = b"".join(map(self._bytes, ids))
        return kept.decode(errors="ignore")

    def _bytes(self, token: int) -> bytes:
        if token < _BYTE_OFFSET:
            return b""
        byte = token - _BYTE_OFFSET
        return bytes([byte]) if byte < 256 else self.pieces[token].encode()


def load_vocabulary(name: str | Path) -> Vocabulary:
    """Opens a vocabulary by its name or by the path of its file.

    Args:
      name: "arithmetic_stories" (packaged), "bytes" (ByT5), a SentencePiece `.model` file, a
        unigram `tokenizer.json`, or a Hugging Face folder that holds one of the two or is ByT5's.

    Raises:
      ForeignVocabulary: there is none, or one of a kind that only other libraries read.
      UserError: it is there, but cannot be read or is broken.
    """
    if name == "arithmetic_stories":
        return SentencePieceVocabulary(ARITHMETIC_STORIES.read_bytes(), ARITHMETIC_STORIES)
    if name == "bytes":
        return ByteVocabulary()
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise ForeignVocabulary(
            f"the vocabulary '{name}' is neither a file nor one of: arithmetic_stories, bytes"
        )
    return _of_json(path) if path.suffix == ".json" else _of_model(path)


def _of_model(
    path: Path, num_sentinels: int | None = None, added: Sequence[AddedToken] = ()
) -> Vocabulary:
    try:
        proto = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary '{path}': {error.strerror}") from error
    return SentencePieceVocabulary(proto, path, num_sentinels=num_sentinels, added=added)


def _of_json(path: Path) -> Vocabulary:
    proto, added, spaces = tokenizer_json.read(path)
    return SentencePieceVocabulary(proto, path, num_sentinels=0, added=added, spaces=spaces)


def _of_folder(folder: Path) -> Vocabulary:
    """As transformers does: from tokenizer.json if there is one, else a slow tokenizer's files."""
    spiece = folder / "spiece.model"
    byt5 = _is_byt5(folder)
    if (folder / "tokenizer.json").is_file() and not byt5:
        return _of_json(folder / "tokenizer.json")
    if not spiece.is_file() and not byt5:
        raise ForeignVocabulary(
            f"the folder '{folder}' holds neither tokenizer.json nor spiece.model"
        )
    path = folder / "tokenizer_config.json"
    settings = added_tokens.read_object(path)
    extra_ids = settings.get("extra_ids", _BYT5_NUM_SENTINELS if byt5 else _T5_NUM_SENTINELS)
    if type(extra_ids) is not int or not 0 <= extra_ids <= _MAX_SENTINELS:
        raise UserError(
            f"'{path}' has extra_ids {extra_ids!r}, must be a whole number from 0 to "
            f"{_MAX_SENTINELS:,}"
        )
    added = added_tokens.of_folder(folder, settings)
    if byt5:
        vocabulary: Vocabulary = ByteVocabulary(extra_ids, added, folder)
    else:
        vocabulary = _of_model(spiece, extra_ids if path.is_file() else None, added)
    if absent := sorted(added_tokens.special_names(settings) - set(vocabulary.pieces)):
        # transformers' slow and fast tokenizers give them different ids.
        raise ForeignVocabulary(
            f"'{path}' names special tokens that have no id: {', '.join(absent)}; list them with "
            "their ids in its added_tokens_decoder"
        )
    return vocabulary


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
