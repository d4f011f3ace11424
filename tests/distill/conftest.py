"""Tiny pairs of both kinds with a batch for them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from distillspec_jax.data.batch import Batch
from distillspec_jax.distill.recipes import Recipe
from distillspec_jax.distill.step import make_distill_step
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.training.state import TrainState

PIECES = 11
KINDS = {"encoder-decoder": 1, "decoder-only": 0}


class Pair(NamedTuple):
    target: Transformer
    target_params: Any
    draft: Transformer
    draft_params: Any


def make_pair(encoder_layers: int) -> Pair:
    """Different sizes everywhere; the draft's vocabulary has padding rows, the target's none."""
    shared = {"num_encoder_layers": encoder_layers, "num_pieces": PIECES, "dropout_rate": 0.3}
    target = ModelConfig("target", PIECES, 7, 2, 3, 13, num_decoder_layers=2, **shared)
    draft = ModelConfig("draft", PIECES + 2, 5, 1, 3, 11, num_decoder_layers=1, **shared)
    models = Transformer(target), Transformer(draft)
    keys = jax.random.split(jax.random.key(5), 2)
    params = [init_params(model, key) for model, key in zip(models, keys, strict=True)]
    return Pair(models[0], params[0], models[1], params[1])


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    return {kind: make_pair(layers) for kind, layers in KINDS.items()}


@pytest.fixture(params=KINDS)
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Six rows of all lengths: the third reference is long, the fifth is empty."""
    rng = np.random.default_rng(5)
    inputs = rng.integers(2, PIECES, (6, 4))
    targets = rng.integers(2, PIECES, (6, 7))
    input_lengths, lengths = np.array([4, 1, 3, 2, 4, 3]), np.array([3, 5, 7, 1, 0, 6])
    inputs = np.where(np.arange(4) < input_lengths[:, None], inputs, 0)
    targets[np.arange(6), lengths - 1] = 1
    targets = np.where(np.arange(7) < lengths[:, None], targets, 0)
    ids = np.array([12, 5, 31, 7, 2, 19])
    return Batch(*(x.astype(np.int32) for x in (inputs, targets, ids)))


OPTIMIZER = optax.sgd(0.5)


@pytest.fixture(scope="session")
def compiled_step(pairs) -> Callable[..., Any]:
    """(kind, recipe, **settings) -> the step with plain gradient descent, compiled once."""

    @functools.cache
    def make(kind: str, recipe: Recipe, **settings: Any):
        pair = pairs[kind]
        return make_distill_step(
            pair.draft, pair.target, recipe, OPTIMIZER, rollout_length=5, **settings
        )

    return make


@pytest.fixture
def fresh_state(pairs) -> Callable[..., TrainState]:
    """(kind, seed) -> the state before the first step, with copied weights."""

    def make(kind: str, seed: int = 0) -> TrainState:
        return TrainState.create(pairs[kind].draft_params, OPTIMIZER, seed=seed)

    return make
