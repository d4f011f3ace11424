"""What fine-tuning is judged by: the likelihood and the first choices of real tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from distillspec_jax.data.batch import Batch
from distillspec_jax.models import transformer
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.training.validation import make_likelihood


@pytest.fixture(scope="module")
def model():
    return Transformer(dataclasses.replace(preset("cpu_draft"), num_decoder_layers=1))


@pytest.mark.parametrize("chunk", [None, 2, 3, 9])
def test_means_are_over_the_real_tokens_of_all_batches(model, chunk):
    """The rows have 5, 2 and 0 tokens, those of the other 1 each."""
    rng, params = np.random.default_rng(0), init_params(model, jax.random.key(0))
    batches = []
    for lengths in ((5, 2, 0), (1, 1, 1)):
        tokens = rng.integers(3, 40, (3, 5)).astype(np.int32)
        tokens[:, 1] = tokens[:, 0]  # what fresh models with tied embeddings like to write
        tokens[np.arange(5) >= np.array(lengths)[:, None]] = model.config.pad_id
        inputs = rng.integers(3, 40, (3, 4)).astype(np.int32)
        batches.append(Batch(inputs, tokens, np.arange(3, dtype=np.int32)))
    found = make_likelihood(model, iter(batches), chunk=chunk)(params)
    losses, hits = [], []
    for batch in batches:
        logits = transformer.score(model, params, batch.inputs, batch.targets)
        logits = np.asarray(logits, np.float64)
        log_q = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        for row, place in zip(*np.nonzero(batch.targets != model.config.pad_id), strict=True):
            token = batch.targets[row, place]
            losses.append(-log_q[row, place, token])
            hits.append(np.argmax(log_q[row, place]) == token)
    assert len(losses) == 10
    assert 0 < sum(hits) < 10
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(found["token_accuracy"], np.mean(hits))
