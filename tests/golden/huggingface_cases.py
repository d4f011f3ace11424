"""Random T5s for parity with transformers: configs, weights and inputs, all from NumPy.

The maker of the golden file, the tests that read it and the live tests share these, so the file
holds outputs alone. Weights have the scale at which attention matters: scores and relative biases
spread over some units.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

NUM_CASES = 14
NEW_TOKENS = 64
PROJECTIONS = (
    "relu",
    "gated-gelu",
    "gated-silu",
    "gelu",
    "gelu_new",
    "silu",
    "gated-relu",
    "gated-gelu_new",
)


def case(index: int) -> dict[str, Any]:
    """The fields of config.json of one random T5, drawn over all that change what it computes."""
    rng = np.random.default_rng([6, index])

    def pick(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    flags = {"tie_word_embeddings": bool(index % 2)}
    if index % 3 == 0:
        flags["scale_decoder_outputs"] = pick(True, False)
    ids = rng.permutation(np.arange(2, 9)).tolist()
    return {
        "model_type": "mt5" if index % 7 == 5 else "t5",
        "vocab_size": pick(53, 61, 67),
        "d_model": pick(12, 14, 18),
        "d_kv": pick(3, 5, 7),
        "num_heads": pick(2, 3, 5),
        "d_ff": pick(19, 23, 29),
        "num_layers": pick(1, 2, 3),
        "num_decoder_layers": pick(1, 2, 4),
        "feed_forward_proj": PROJECTIONS[index % len(PROJECTIONS)],
        "relative_attention_num_buckets": pick(8, 10, 16, 32),
        "relative_attention_max_distance": pick(20, 37, 128),
        "layer_norm_epsilon": pick(1e-6, 1e-5, 1e-3),
        "pad_token_id": ids[0] if index % 4 == 3 else 0,
        "eos_token_id": pick(1, ids[1]),
        "decoder_start_token_id": pick(0, ids[2]),
        **flags,
    }


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A float32 tensor for every name of Hugging Face's, a function of (seed, name) only."""
    return {name: _tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.3 * values
    elif name == "shared.weight":
        values *= 0.3  # less than what the layers add, or greedy texts repeat one token
    elif "relative_attention_bias" in name:
        values *= 2
    else:
        is_query_or_key = name.endswith((".q.weight", ".k.weight"))
        values *= (1.5 if is_query_or_key else 1.3) / np.sqrt(shape[-1])  # outputs x inputs
    return values.astype(np.float32)


def inputs(config: Mapping[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources [3, 31] of lengths 31, 1 and one between, padded; and decoder inputs [3, 29]."""
    rng = np.random.default_rng([seed, 1])
    pad, start = config["pad_token_id"], config["decoder_start_token_id"]
    real = np.setdiff1d(np.arange(2, config["vocab_size"]), [pad])
    sources = rng.choice(real, (3, 31))
    for row, length in enumerate((31, 1, int(rng.integers(2, 31)))):
        sources[row, length:] = pad
    decoded = rng.choice(real, (3, 29))
    decoded[:, 0] = start
    return sources.astype(np.int32), decoded.astype(np.int32)
