"""Tokens that Hugging Face adds to a tokenizer: found in a text before its model cuts the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError
from distillspec_jax.files import json_object

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


class ForeignVocabulary(UserError):
    """There is no vocabulary, or one of a kind that only other libraries read."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Attributes:
      special: decoding drops it.
      single_word: only where no letter or digit is next to it.
      lstrip, rstrip: whitespace before or after it belongs to it.
      normalized: looked for in the text after the character map.
      space: the ids of a space before it; none where it is dropped.
    """

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    space: tuple[int, ...] = ()

    @classmethod
    def read(cls, entry: Mapping[str, Any], index: int) -> AddedToken:
        """An entry of `added_tokens` or `added_tokens_decoder`; ValueError if it is none."""
        content = entry["content"]
        if not isinstance(content, str) or not content or type(index) is not int or index < 0:
            raise ValueError(f"added token {content!r} with id {index!r}")
        flags: dict[str, Any] = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
        return cls(content, index, **flags)


class Finder:
    """Finds added tokens in texts, the longest first where several begin at one place."""

    def __init__(self, tokens: Iterable[AddedToken]):
        ordered = sorted(tokens, key=lambda token: -len(token.content))
        self._tokens = {token.content: token for token in ordered}
        # A literal first, and no groups: only so does `re` skip what cannot be a token's start.
        parts = [
            rf"{text}(?!\w)(?<!\w{text})" if token.single_word else text
            for token in ordered
            for text in [re.escape(token.content)]
        ]
        self._pattern = re.compile("|".join(parts)) if parts else None

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """The text as (what stands before, token), the rest with None."""
        start = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            token = self._tokens[found.group()]
            before = text[start : found.start()]
            yield before.rstrip() if token.lstrip else before, token
            start = found.end()
            if token.rstrip:
                start = len(text) - len(text[start:].lstrip())
        yield text[start:], None


def appended(where: str | Path, pieces: Sequence[str], tokens: Iterable[AddedToken]) -> list[str]:
    """The pieces with those tokens behind them that have no piece yet.

    Raises:
      ForeignVocabulary: the ids leave a gap, or an id or a token would be there twice.
    """
    grown, known = list(pieces), {piece: index for index, piece in enumerate(pieces)}
    for token in sorted(tokens, key=lambda token: token.id):
        if token.id > len(grown):
            raise ForeignVocabulary(
                f"'{where}' has no piece with id {len(grown)}, but the added token "
                f"'{token.content}' with id {token.id}; ids must follow on without gaps"
            )
        if token.id < len(grown):
            if grown[token.id] != token.content:
                raise ForeignVocabulary(
                    f"'{where}' has two pieces with id {token.id}: '{grown[token.id]}' and the "
                    f"added token '{token.content}'"
                )
            continue
        if token.content in known:
            raise ForeignVocabulary(
                f"'{where}' has the piece '{token.content}' with id {known[token.content]} and as "
                f"an added token with id {token.id}; a piece needs one id"
            )
        known[token.content] = token.id
        grown.append(token.content)
    return grown


def of_folder(folder: Path, settings: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens of a slow tokenizer's folder.

    As transformers reads them: from `added_tokens_decoder` in the settings, else from
    added_tokens.json.
    """
    where = folder / "tokenizer_config.json"
    try:
        special = special_names(settings)
        if "added_tokens_decoder" in settings:
            entries = settings["added_tokens_decoder"].items()
            tokens = [AddedToken.read(entry, int(index)) for index, entry in entries]
        else:
            where = folder / "added_tokens.json"
            tokens = [
                AddedToken.read({"content": content, "special": content in special}, index)
                for content, index in read_object(where).items()
            ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{where}' has broken added tokens: {error!r}") from error
    # A slow tokenizer looks for them in the text as it is.
    return [dataclasses.replace(token, normalized=False) for token in tokens]


def special_names(settings: Mapping[str, Any]) -> set[str]:
    """The tokens that a tokenizer_config.json calls special by their role."""
    named = [settings.get(f"{role}_token") for role in _ROLES]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(field) or ()
        named += listed.values() if isinstance(listed, dict) else listed
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return {text for text in texts if isinstance(text, str)}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is no file.

    Raises:
      UserError: the file cannot be read, or holds no JSON object.
    """
    try:
        return json_object(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text") from error
    except ValueError as error:
        raise UserError(f"'{path}' is {error}") from None
