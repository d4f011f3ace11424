"""Everything a T5 computes, layer by layer, against what transformers computed (golden file)."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.models.transformer import score

NUM_CASES = 14
TOLERANCE = 2e-5  # of the largest value in the array
SUBLAYERS = {
    "SelfAttention": "self_attention",
    "EncDecAttention": "cross_attention",
    "DenseReluDense": "mlp",
}


@pytest.fixture(scope="module", params=range(NUM_CASES))
def case(request, golden, cases, make_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "model"
    described, _ = make_folder(folder, request.param)
    prefix = f"{request.param}/"
    expected = {
        name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)
    }
    sources, decoded = cases.inputs(described["config"], described["seed"])
    return described, expected, zoo.load(folder), sources, decoded


def targets_of(decoded):
    """Targets whose shift to the right is `decoded`; the last one is never fed."""
    return np.concatenate([decoded[:, 1:], decoded[:, -1:]], axis=1)


def our_place(name):
    """("encoder.block.2.layer.1.DenseReluDense") -> ("encoder", "layers_2", "mlp")."""
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)(?:\.layer\.\d+\.(\w+))?", name)
    stack, index, sublayer = match.groups()
    return (stack, f"layers_{index}", *([SUBLAYERS[sublayer]] if sublayer else []))


def assert_close(found, expected, what):
    error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    print(f"{what}: {error:.1e} of the largest value")
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def test_every_block_and_sublayer_agrees(case):
    described, expected, (model, params), sources, decoded = case
    run = functools.partial(model.apply, method="score", capture_intermediates=True)
    _, kept = jax.jit(run)({"params": params}, sources, targets_of(decoded))
    names = [name for name in expected if ".block." in name]
    config = described["config"]
    assert len(names) == 3 * config["num_layers"] + 4 * config["num_decoder_layers"]
    real = sources != config["pad_token_id"]
    for name in names:
        found = kept["intermediates"]
        for key in our_place(name):
            found = found[key]
        found, wanted = np.asarray(found["__call__"][0]), expected[name]
        if name.startswith("encoder"):  # what padding attends to is nobody's business
            found, wanted = found[real], wanted[real]
        assert_close(found, wanted, name)


def test_logits_agree(case):
    _, expected, (model, params), sources, decoded = case
    logits = jax.jit(functools.partial(score, model))(params, sources, targets_of(decoded))
    assert_close(np.asarray(logits), expected["logits"], "logits")


def test_greedy_texts_of_64_tokens_are_identical(case):
    described, expected, (model, params), sources, _ = case
    eos = described["config"]["eos_token_id"]
    out = generate(
        model,
        params,
        jnp.asarray(sources),
        jax.random.key(0),
        sampling=Sampling(temperature=0.0),
        max_new_tokens=64,
    )
    for row, wanted in enumerate(expected["greedy"].tolist()):
        wanted = wanted[: wanted.index(eos) + 1] if eos in wanted else wanted
        assert np.asarray(out.tokens)[row, : len(wanted)].tolist() == wanted
        assert int(out.lengths[row]) == len(wanted)


def test_cases_cover_the_fields(golden):
    configs = [json.loads(str(golden[f"{i}/case"]))["config"] for i in range(NUM_CASES)]
    values = {key: {config.get(key) for config in configs} for key in configs[0]}
    assert all(len(values[key]) > 1 for key in values), values
    assert any(c["d_kv"] * c["num_heads"] != c["d_model"] for c in configs)
    assert any(c["num_layers"] < c["num_decoder_layers"] for c in configs)
    assert any(c["num_layers"] > c["num_decoder_layers"] for c in configs)
    scaled = {(c["tie_word_embeddings"], c.get("scale_decoder_outputs")) for c in configs}
    assert len(scaled) >= 5
