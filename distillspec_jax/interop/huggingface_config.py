"""Hugging Face's T5Config and ours, both ways; a field of the architecture counts or is refused.

Written against transformers 4 and 5, which differ in what ties and what scales the logits by
d_model**-0.5. In 4 `tie_word_embeddings` decides both. 5 always writes it as true and lets the
file of weights decide (a `lm_head.weight` of its own unties); what the field had said goes on in
`scale_decoder_outputs`, which 4 does not know. What is written here scales just if it ties (see
`huggingface.save`), so both read the same model; what 5 saves of an untied T5, 4 misreads.

An mT5 is scaled in 4 if tied, in 5 never. What was meant is what its maker computed: a file that
names a transformers 4 as its own and ties is scaled, no other is (5 says "tied" of all of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.models.config import ACTIVATIONS, FieldError, ModelConfig, check_has_end

MODEL_TYPES = ("t5", "mt5")
ARCHITECTURES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "T5WithLMHeadModel")
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "d_ff",
    "num_layers": "num_encoder_layers",
}
_KEYS = {ours: theirs for theirs, ours in _SIZES.items()} | {
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "decoder_start_id": "decoder_start_token_id",
}
_REFUSED = {  # fields that change what the model computes, unless they hold this
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": True,
    "pruned_heads": {},
    "per_layer_config": None,
    "quantization_config": None,
    "auto_map": None,
}
_OTHER_NAMES = {  # that transformers lets a config.json use, and lets them overrule the first
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the transformers library."""
    return "model_type" in config or "architectures" in config


def read(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    name: str,
    where: str,
    tie_embeddings: bool,
) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json (empty if there is none).

    Args:
      where: what errors call the file.
      tie_embeddings: whether the weights are tied, which only the weights tell (`is_tied_by_flag`).
    Raises:
      UserError naming the field that is missing, refused or of the wrong type.
    """
    _check_kind(config, where)
    sizes: dict[str, Any] = {o: _size(config, t, where) for t, o in _SIZES.items()}
    decoder_layers = config.get("num_decoder_layers")
    if decoder_layers is not None:
        decoder_layers = _size(config, "num_decoder_layers", where)
    activation, gated = _activation(config, where)
    ids = [config, generation]
    pad_id = _token_id("pad_token_id", ids, 0, where)
    try:
        return ModelConfig(
            name=name,
            **sizes,
            num_decoder_layers=decoder_layers or sizes["num_encoder_layers"],
            num_pieces=_num_pieces(sizes["vocab_size"], generation),
            activation=activation,
            gated=gated,
            tie_embeddings=tie_embeddings,
            scale_logits=_scale_logits(config, where),
            relative_buckets=_size(config, "relative_attention_num_buckets", where, 32),
            relative_max_distance=_size(config, "relative_attention_max_distance", where, 128),
            layer_norm_epsilon=_number(config, "layer_norm_epsilon", where, 1e-6),
            dropout_rate=_number(config, "dropout_rate", where, 0.1),
            pad_id=pad_id,
            eos_id=_token_id("eos_token_id", ids, 1, where),
            decoder_start_id=_token_id("decoder_start_token_id", ids, pad_id, where),
        )
    except FieldError as error:
        key = _KEYS.get(error.field, error.field)
        is_beside = key in generation and key not in config
        place = f"generation_config.json beside {where}" if is_beside else where
        raise UserError(f"{place} has {key} {error.value!r:.60}, must be {error.must}") from error


def is_tied_by_flag(config: Mapping[str, Any]) -> bool:
    """What config.json says of the output matrix; a differing `lm_head.weight` overrules a yes."""
    return config.get("tie_word_embeddings") is not False


def num_pieces(vocab_size: int) -> int:
    """Pieces behind the published padded embeddings (T5, mT5); any other has no padding rows."""
    return {32_128: 32_100, 250_112: 250_100}.get(vocab_size, vocab_size)


def _num_pieces(vocab_size: int, generation: Mapping[str, Any]) -> int:
    """The rows before those that `write` had suppressed, or else as published."""
    suppressed = generation.get("suppress_tokens")
    if isinstance(suppressed, list) and 0 < len(suppressed) < vocab_size:
        first = vocab_size - len(suppressed)
        if suppressed == list(range(first, vocab_size)):
            return first
    return num_pieces(vocab_size)


def write(config: ModelConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json for a T5ForConditionalGeneration.

    Args:
      config: scales its logits just if it ties its embeddings.
    Raises:
      UserError for a decoder-only model: transformers has no such T5.
    """
    c = config
    check_has_end(c.eos_id, f"model '{c.name}'")
    if not c.is_encoder_decoder:
        raise UserError(
            f"model '{c.name}' is decoder-only; transformers has no such T5, keep it as native or "
            "Orbax"
        )
    activation = "gelu" if c.activation == "gelu_new" and c.gated else c.activation
    ids = {
        "pad_token_id": c.pad_id,
        "eos_token_id": c.eos_id,
        "decoder_start_token_id": c.decoder_start_id,
    }
    written = {theirs: getattr(c, ours) for theirs, ours in _SIZES.items()} | {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "num_decoder_layers": c.num_decoder_layers,
        "feed_forward_proj": f"gated-{activation}" if c.gated else activation,
        "dense_act_fn": c.activation,  # tells apart the two kinds of GELU behind "gated-gelu"
        "is_gated_act": c.gated,
        "tie_word_embeddings": c.tie_embeddings,
        "scale_decoder_outputs": c.scale_logits,
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_max_distance,
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "dropout_rate": c.dropout_rate,
        "torch_dtype": dtype,
        **ids,
    }
    if c.num_decoder_layers != c.num_encoder_layers:
        # transformers 5 sizes its cache by the encoder unless a key of BART's says otherwise
        written["decoder_layers"] = c.num_decoder_layers
    generation: dict[str, Any] = dict(ids)
    if c.num_pieces < c.vocab_size:  # rows that were never trained must not be drawn there either
        generation["suppress_tokens"] = list(range(c.num_pieces, c.vocab_size))
    return written, generation


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{where} has model_type {kind!r:.60}, supported are {' and '.join(MODEL_TYPES)} "
            "(T5, FLAN-T5, mT5, ByT5, UL2)"
        )
    architectures = config.get("architectures") or ARCHITECTURES
    if not isinstance(architectures, list | tuple) or not set(map(str, architectures)).intersection(
        ARCHITECTURES
    ):
        raise UserError(
            f"{where} has architectures {architectures!r:.80}, supported is {ARCHITECTURES[0]}"
        )
    for field, harmless in _REFUSED.items():
        if config.get(field) not in (None, harmless):
            raise UserError(f"{where} has {field} {config[field]!r:.60}, which is not supported")
    for other, field in _OTHER_NAMES.items():
        if other in config and config[other] != config.get(field):
            raise UserError(f"{where} has {other} {config[other]!r:.60} but another {field}")


def _size(config: Mapping[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{where} has {field} {value!r:.60}, must be a positive whole number")
    return value


def _number(config: Mapping[str, Any], field: str, where: str, default: float) -> float:
    value = config.get(field, default)
    if type(value) not in (int, float):
        raise UserError(f"{where} has {field} {value!r:.60}, must be a number")
    return value


def _activation(config: Mapping[str, Any], where: str) -> tuple[str, bool]:
    """Activation and whether it is gated; "gated-gelu" has always meant the tanh form there."""
    projection = config.get("feed_forward_proj", "relu")
    gate, dash, name = str(projection).rpartition("-")
    if not isinstance(projection, str) or gate != ("gated" if dash else ""):
        raise UserError(
            f"{where} has feed_forward_proj {projection!r:.60}, must be ACT or gated-ACT"
        )
    gated = bool(dash)
    if config.get("is_gated_act", gated) is not gated:
        raise UserError(f"{where} has feed_forward_proj '{projection}' but another is_gated_act")
    derived = "gelu_new" if projection == "gated-gelu" else name
    stated = config.get("dense_act_fn", derived)
    activation = _ALIASES.get(stated, stated) if isinstance(stated, str) else repr(stated)[:60]
    if activation not in ACTIVATIONS:
        raise unknown_name("activation of feed_forward_proj", activation, ACTIVATIONS, where)
    return activation, gated


def _scale_logits(config: Mapping[str, Any], where: str) -> bool:
    for field in ("scale_decoder_outputs", "tie_word_embeddings"):
        if config.get(field) not in (None, True, False):
            raise UserError(f"{where} has {field} {config[field]!r:.60}, must be true or false")
    if config["model_type"] == "mt5":
        is_by_4 = str(config.get("transformers_version")).startswith("4.")
        return is_by_4 and config.get("tie_word_embeddings") is True
    return config.get("scale_decoder_outputs", is_tied_by_flag(config)) is not False


def _token_id(field: str, sources: list[Mapping[str, Any]], default: int, where: str) -> int:
    """The id in config.json or generation_config.json, which must not differ."""
    stated = [source[field] for source in sources if source.get(field) is not None]
    stated = [ids[0] if isinstance(ids, list) and len(ids) == 1 else ids for ids in stated]
    if any(type(each) is not int or each < 0 for each in stated):
        raise UserError(f"{where} has {field} {stated[0]!r:.60}, must be one id")
    if len(set(stated)) > 1:
        raise UserError(
            f"{where} has {field} {stated[0]}, generation_config.json beside it {stated[1]}"
        )
    return stated[0] if stated else default
