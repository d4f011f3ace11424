"""Makes huggingface.npz and huggingface_xxl.json from transformers, for tests without torch.

    pip install -e .[peers] && python tests/golden/make_huggingface.py

For every case of huggingface_cases.py the file holds, as "<case>/<what>": the config and the names
and shapes of the tensors (JSON), the output of every block and sublayer, the logits, and a greedy
text of 64 tokens. Run it again when transformers changes what T5 computes; the tests then say
whether this project still agrees.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_cases as cases
import numpy as np
import torch
import transformers
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
MAX_ROUNDING = 5e-6
SUBLAYERS = ("SelfAttention", "EncDecAttention", "DenseReluDense")


def build(config: dict[str, Any], seed: int) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """The model of transformers with our weights, its output matrix tied or not as config says."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    is_mt5 = config["model_type"] == "mt5"
    config_class = MT5Config if is_mt5 else T5Config
    model_class = MT5ForConditionalGeneration if is_mt5 else T5ForConditionalGeneration
    model = model_class(config_class(**fields)).eval()
    if not config["tie_word_embeddings"]:  # transformers 5 ties all T5s that it makes itself
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    model.generation_config.eos_token_id = config["eos_token_id"]
    model.generation_config.pad_token_id = config["pad_token_id"]
    model.generation_config.decoder_start_token_id = config["decoder_start_token_id"]
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    shapes = {name: p.shape for name, p in model.named_parameters() if names[id(p)] == name}
    ours = cases.weights(shapes, seed)
    model.load_state_dict({k: torch.tensor(v) for k, v in ours.items()}, strict=False)
    return model, ours


def lively(config: dict[str, Any], index: int) -> tuple[int, dict[str, list[int]], dict[str, Any]]:
    """The first seed whose greedy texts vary (most repeat a token) and that is no matter of luck.

    Random networks can be chaotic: then rounding decides, and two right programs differ.
    """
    for seed in range(1000 * index, 1000 * index + 500):
        model, ours = build(config, seed)
        text, margin = greedy(model, config, seed)
        distinct = [len(set(row)) for row in text.tolist()]
        if min(distinct) <= 2 or sum(distinct) <= 20 or margin <= 1e-4:
            continue
        found = outputs(model, config, seed)
        error = rounding(found, outputs(model.double(), config, seed))
        if error > MAX_ROUNDING:
            continue
        print(
            index,
            config["feed_forward_proj"],
            seed,
            f"{margin:.1e} {error:.1e}",
            distinct,
            flush=True,
        )
        shapes = {name: list(array.shape) for name, array in ours.items()}
        return seed, shapes, found | {"greedy": text}
    raise RuntimeError(f"no lively seed for case {index}")


def rounding(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """The largest error of float32 in any array, relative to the array's largest value."""
    errors = (np.abs(found[name] - exact[name]).max() / np.abs(exact[name]).max() for name in found)
    return float(max(errors))


def greedy(model: Any, config: dict[str, Any], seed: int) -> tuple[np.ndarray, float]:
    """Greedy texts [3, 64], and the smallest lead of a token over the second."""
    sources = torch.tensor(cases.inputs(config, seed)[0]).long()
    mask = (sources != config["pad_token_id"]).long()
    # its cache has as many layers as the encoder: too few for a deeper decoder
    use_cache = config["num_decoder_layers"] <= config["num_layers"]
    how = {"max_new_tokens": cases.NEW_TOKENS, "do_sample": False, "use_cache": use_cache}
    text = model.generate(sources, attention_mask=mask, **how)
    with torch.no_grad():
        logits = model(
            input_ids=sources, attention_mask=mask, decoder_input_ids=text[:, :-1]
        ).logits
    best = logits.topk(2).values
    return text[:, 1:].numpy(), float((best[..., 0] - best[..., 1]).min())


def outputs(model: torch.nn.Module, config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Everything the model computes on the case's inputs."""
    found: dict[str, np.ndarray] = {}
    handles = [
        module.register_forward_hook(_keep(found, name))
        for name, module in model.named_modules()
        if name.split(".")[-2:-1] == ["block"] or name.endswith(SUBLAYERS)
    ]
    sources, decoded = (torch.tensor(x).long() for x in cases.inputs(config, seed))
    mask = (sources != config["pad_token_id"]).long()
    with torch.no_grad():
        out = model(input_ids=sources, attention_mask=mask, decoder_input_ids=decoded)
    for handle in handles:
        handle.remove()
    found["encoder"] = out.encoder_last_hidden_state.numpy()
    found["logits"] = out.logits.numpy()
    return found


def _keep(found: dict[str, np.ndarray], name: str) -> Any:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    return hook


def xxl() -> dict[str, list[int]]:
    """Names and shapes of a T5 1.1 XXL with an output matrix of its own; nothing is allocated."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **XXL)
        )
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    state = model.state_dict()
    return {name: list(t.shape) for name, t in state.items() if "embed_tokens" not in name}


def main() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    for index in range(cases.NUM_CASES):
        config = cases.case(index)
        seed, shapes, found = lively(config, index)
        described = {"config": config, "shapes": shapes, "seed": seed}
        arrays[f"{index}/case"] = np.array(json.dumps(described))
        arrays |= {f"{index}/{name}": array for name, array in found.items()}
    np.savez_compressed(HERE / "huggingface.npz", **arrays)
    (HERE / "huggingface_xxl.json").write_text(json.dumps(xxl(), indent=0) + "\n")


if __name__ == "__main__":
    main()
