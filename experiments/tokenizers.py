"""The tokenizer files that belong beside a model exported for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillspec_jax.data.vocabulary import (
    ARITHMETIC_STORIES,
    Vocabulary,
    check_same,
    load_vocabulary,
)
from distillspec_jax.errors import UserError
from distillspec_jax.interop.huggingface import tokenizer_files


def files_for(given: str | None, found: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> content; empty if no tokenizer is known.

    Args:
      given: a Hugging Face folder or a SentencePiece `.model` file; None takes what lies beside
        the model, or the packaged vocabulary if the model was trained with it.
      found: what `zoo.describe` says of the model.
    Raises:
      UserError if the tokenizer's pieces are not those that the model was trained with.
    """
    if given is not None:
        return _checked(given, load_vocabulary(given), found)
    if found["kind"] == "huggingface":
        return _of_folder(Path(found["path"]))
    stories = load_vocabulary("arithmetic_stories")
    if found.get("vocabulary_fingerprint") == stories.fingerprint:
        return _of_model(ARITHMETIC_STORIES, stories)
    return {}


def _checked(given: str, vocabulary: Vocabulary, found: Mapping[str, Any]) -> dict[str, bytes]:
    check_same(found, vocabulary.describe(), ("the model", f"--tokenizer={given}"))
    if vocabulary.size > found["model"]["vocab_size"]:
        raise UserError(
            f"--tokenizer={given} has {vocabulary.size} pieces, the model only "
            f"{found['model']['vocab_size']} rows"
        )
    if Path(given).is_dir():
        return _of_folder(Path(given))
    return _of_model(Path(given), vocabulary)


def _of_folder(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in tokenizer_files(folder).items()}


def _of_model(model: Path, vocabulary: Vocabulary) -> dict[str, bytes]:
    """A SentencePiece file as transformers' T5Tokenizer wants it."""
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": sum(piece.startswith("<extra_id_") for piece in vocabulary.pieces),
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    name = "tokenizer.json" if model.suffix == ".json" else "spiece.model"
    return {name: model.read_bytes(), "tokenizer_config.json": json.dumps(settings).encode()}
