"""A tiny target and draft of each kind, and prompts for them."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params

PIECES = 7


class Pair(NamedTuple):
    target: Transformer
    target_params: Any
    draft: Transformer
    draft_params: Any


def make_pair(encoder_layers: int) -> Pair:
    """The draft's vocabulary has padding rows, the target's has none: only pieces may meet."""
    shared = {"num_encoder_layers": encoder_layers, "num_pieces": PIECES}
    target = ModelConfig("target", PIECES, 8, 2, 3, 13, num_decoder_layers=2, **shared)
    draft = ModelConfig("draft", PIECES + 4, 5, 1, 3, 11, num_decoder_layers=1, **shared)
    models = Transformer(target), Transformer(draft)
    keys = jax.random.split(jax.random.key(19), 2)
    params = [init_params(model, key) for model, key in zip(models, keys, strict=True)]
    return Pair(models[0], params[0], models[1], params[1])


KINDS = {"encoder-decoder": 1, "decoder-only": 0}


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    return {kind: make_pair(layers) for kind, layers in KINDS.items()}


@pytest.fixture(params=KINDS)
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def spoil():
    """A function that puts one NaN into every array of a tree of parameters."""

    def one_nan(x):
        x = np.array(x)
        x.flat[0] = np.nan
        return x

    return lambda params: jax.tree.map(one_nan, params)


@pytest.fixture(scope="session")
def prompts() -> np.ndarray:
    """[53, 5] int32, right-padded, of every length from 1 to 5."""
    rng = np.random.default_rng(43)
    tokens = rng.integers(2, PIECES, size=(53, 5))
    lengths = 1 + np.arange(53) % 5
    return np.where(np.arange(5) < lengths[:, None], tokens, 0).astype(np.int32)
