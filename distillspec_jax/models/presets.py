"""Named model shapes: the published T5 families, the paper's decoder-only pair, and CPU sizes.

Sources: T5 1.0 (arXiv 1910.10683, 3.3), T5 1.1 and FLAN-T5 (the released configurations; FLAN
has the shapes of 1.1), the LM1B pair (arXiv 2310.08461, section 4: 33M draft and 234M target; the
split into width and depth is not published, ours meets the sizes). `cpu_*` are the sizes that
train on two cores, with the vocabulary of `arithmetic_stories` or (`cpu_t5_*`) that of T5.
"""

from __future__ import annotations

from distillspec_jax.errors import unknown_name
from distillspec_jax.models.config import ModelConfig

T5_ROWS, T5_PIECES = 32_128, 32_100  # 32,000 pieces and 100 sentinels; the rest is padding
STORIES_ROWS, STORIES_PIECES = 448, 423  # rows: a multiple of 64, to split over devices

# name: D, F, layers of each stack, N, H
_T5_SHAPES = {
    "small": (512, 2048, 6, 8, 64),
    "base": (768, 3072, 12, 12, 64),
    "large": (1024, 4096, 24, 16, 64),
    "3b": (1024, 16384, 24, 32, 128),
    "11b": (1024, 65536, 24, 128, 128),
}
_T5_1_1_SHAPES = {
    "small": (512, 1024, 8, 6, 64),
    "base": (768, 2048, 12, 12, 64),
    "large": (1024, 2816, 24, 16, 64),
    "xl": (2048, 5120, 24, 32, 64),
    "xxl": (4096, 10240, 24, 64, 64),
}


def _t5(name: str, shape: tuple[int, ...], **fields) -> ModelConfig:
    d_model, d_ff, depth, num_heads, head_dim = shape
    return ModelConfig(
        name=name,
        vocab_size=T5_ROWS,
        num_pieces=T5_PIECES,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=head_dim,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        dropout_rate=0.1,
        **fields,
    )


def _decoder_only(name: str, d_model: int, depth: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=T5_ROWS,
        num_pieces=T5_PIECES,
        d_model=d_model,
        d_ff=4 * d_model,
        num_heads=d_model // 64,
        head_dim=64,
        num_encoder_layers=0,
        num_decoder_layers=depth,
        gated=False,
        tie_embeddings=True,
    )


def _cpu(
    name: str, shape: tuple[int, ...], encoder_layers: int, vocabulary: tuple[int, int]
) -> ModelConfig:
    d_model, d_ff, depth, num_heads, head_dim = shape
    return ModelConfig(
        name=name,
        vocab_size=vocabulary[0],
        num_pieces=vocabulary[1],
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=head_dim,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=depth,
        tie_embeddings=True,
    )


def _all() -> dict[str, ModelConfig]:
    configs = [_decoder_only("lm1b_33m", 512, 5), _decoder_only("lm1b_234m", 1024, 16)]
    for size, shape in _T5_SHAPES.items():
        relu = {"activation": "relu", "gated": False, "tie_embeddings": True}
        configs.append(_t5(f"t5_{size}", shape, **relu))
    for size, shape in _T5_1_1_SHAPES.items():
        configs += [_t5(f"t5_1_1_{size}", shape), _t5(f"flan_t5_{size}", shape)]
    stories, t5 = (STORIES_ROWS, STORIES_PIECES), (T5_ROWS, T5_PIECES)
    configs += [
        _cpu("cpu_target", (256, 768, 5, 4, 64), 2, stories),
        _cpu("cpu_draft", (64, 128, 1, 1, 64), 1, stories),
        _cpu("cpu_t5_target", (128, 512, 4, 2, 64), 2, t5),
        _cpu("cpu_t5_draft", (64, 128, 1, 1, 64), 1, t5),
    ]
    return {config.name: config for config in configs}


PRESETS = _all()


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; raises UserError with the nearest name if there is none."""
    if name not in PRESETS:
        raise unknown_name("model preset", name, PRESETS)
    return PRESETS[name]
