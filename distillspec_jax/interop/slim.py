"""A draft cut out of its target: chosen layers, and a narrower width by selection.

Someone with no small sibling of a model still gets a start that speaks its vocabulary. What is kept
has the largest weights: attention heads, MLP units and positions of the residual stream are ranked
by the norms of what they read and write. No data is needed; the draft is then fine-tuned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.interop import layout
from distillspec_jax.interop.layout import Leaf, Path
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer

Flat = dict[Path, np.ndarray]
_TINY = np.finfo(np.float32).tiny
_WIDTHS = ("d_model", "num_heads", "d_ff")
_WRITES = ("out", "wo")  # the kernels through which a layer adds to the residual stream


def slim(
    model: Transformer,
    params: Any,
    *,
    name: str,
    encoder_layers: Sequence[int] | None = None,
    decoder_layers: Sequence[int] | None = None,
    d_model: int | None = None,
    num_heads: int | None = None,
    d_ff: int | None = None,
) -> tuple[Transformer, Any]:
    """A smaller model out of the weights of `model`: (model, parameters).

    Args:
      name: of the new model.
      encoder_layers, decoder_layers: layers to keep, in order; None keeps all. A layer named again
        is a copy that writes nothing yet: the model computes the same, and has room to learn.
      d_model, num_heads, d_ff: sizes to keep of D, N, F; None keeps all. The size of a head stays.
    Raises:
      UserError for layers that are not there, an emptied stack, or sizes larger than the model's.
    """
    asked = {"encoder": encoder_layers, "decoder": decoder_layers}
    small = cut(
        model.config,
        name=name,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
    )
    layers = {
        stack: list(range(getattr(small, f"num_{stack}_layers")) if each is None else each)
        for stack, each in asked.items()
    }
    sizes = {field: getattr(small, field) for field in _WIDTHS}
    kept = dataclasses.replace(small, **{f: getattr(model.config, f) for f in _WIDTHS})
    flat = {leaf.path: _moved(params, leaf.path, layers) for leaf in layout.leaves(kept)}
    if kept.is_encoder_decoder:
        flat = _narrow(flat, "encoder", kept, sizes)
    flat = _narrow(flat, "decoder", kept, sizes)
    flat = _narrow_stream(flat, kept, sizes["d_model"])
    return Transformer(small), jax.tree.map(jax.numpy.asarray, layout.nested(flat))


def cut(
    config: ModelConfig,
    *,
    name: str,
    encoder_layers: Sequence[int] | None = None,
    decoder_layers: Sequence[int] | None = None,
    d_model: int | None = None,
    num_heads: int | None = None,
    d_ff: int | None = None,
) -> ModelConfig:
    """The shape of what `slim` makes, with the same arguments and refusals."""
    encoder = _checked("encoder", encoder_layers, config.num_encoder_layers)
    decoder = _checked("decoder", decoder_layers, config.num_decoder_layers)
    return dataclasses.replace(
        config,
        name=name,
        num_encoder_layers=len(encoder),
        num_decoder_layers=len(decoder),
        d_model=_size("d_model", d_model, config.d_model),
        num_heads=_size("num_heads", num_heads, config.num_heads),
        d_ff=_size("d_ff", d_ff, config.d_ff),
    )


def _checked(stack: str, kept: Sequence[int] | None, depth: int) -> list[int]:
    kept = range(depth) if kept is None else kept
    if any(not 0 <= index < depth for index in kept) or list(kept) != sorted(kept):
        raise UserError(
            f"{stack}_layers {list(kept)} must be numbers in order within 0 and {depth - 1}"
        )
    if depth and not kept:
        raise UserError(f"{stack}_layers is empty; keep at least one layer")
    return list(kept)


def _size(field: str, asked: int | None, there: int) -> int:
    if asked is not None and not 1 <= asked <= there:
        raise UserError(f"{field} {asked} must be within 1 and the model's {there}")
    return there if asked is None else asked


def _moved(params: Any, path: Path, layers: Mapping[str, list[int]]) -> np.ndarray:
    """The leaf at `path` of the model with those layers."""
    stack, *rest = path
    if not rest or not rest[0].startswith("layers_"):
        return np.asarray(layout.get(params, path), np.float32)
    kept, index = layers[stack], int(rest[0].removeprefix("layers_"))
    leaf = np.asarray(layout.get(params, (stack, f"layers_{kept[index]}", *rest[1:])), np.float32)
    named_again = index > 0 and kept[index] == kept[index - 1]
    return np.zeros_like(leaf) if named_again and path[-1] in _WRITES else leaf


def _narrow(flat: Flat, stack: str, config: ModelConfig, sizes: Mapping[str, int]) -> Flat:
    """Fewer heads and MLP units in one stack.

    Self-attention keeps the same heads in all layers, for they share one relative bias.
    """
    flat = dict(flat)
    depth = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
    layers = [(stack, f"layers_{i}") for i in range(depth)]
    scores = [_head_scores(flat, (*here, "self_attention"), "qkv") for here in layers]
    heads = _best(np.sum(scores, axis=0), sizes["num_heads"])
    bias = (stack, "relative_bias", "embedding")
    flat[bias] = flat[bias][heads]
    for here in layers:
        _keep_heads(flat, (*here, "self_attention"), ("qkv",), heads)
        cross = (*here, "cross_attention")
        if (*cross, "out") in flat:
            own = _best(_head_scores(flat, cross, "key_value"), sizes["num_heads"])
            _keep_heads(flat, cross, ("query", "key_value"), own)
        wi, wo = (*here, "mlp", "wi"), (*here, "mlp", "wo")
        into = np.prod(np.linalg.norm(flat[wi], axis=0), axis=0)
        units = _best(into * np.linalg.norm(flat[wo], axis=1), sizes["d_ff"])
        flat[wi], flat[wo] = flat[wi][:, :, units], flat[wo][units]
    return flat


def _head_scores(flat: Flat, attention: Path, kernel: str) -> np.ndarray:
    """How much each head writes: norm of its values times norm of its output, share of all. [N]"""
    values = flat[(*attention, kernel)][:, -1]
    score = np.linalg.norm(values, axis=(0, 2)) * np.linalg.norm(
        flat[(*attention, "out")], axis=(1, 2)
    )
    return score / max(score.sum(), _TINY)


def _keep_heads(flat: Flat, attention: Path, kernels: Sequence[str], heads: np.ndarray) -> None:
    for kernel in kernels:
        flat[(*attention, kernel)] = flat[(*attention, kernel)][:, :, heads]
    flat[(*attention, "out")] = flat[(*attention, "out")][heads]


def _narrow_stream(flat: Flat, config: ModelConfig, d_model: int) -> Flat:
    """Fewer positions of the residual stream, the same everywhere.

    The norm divides by the mean square of what is left, so its scales take up the difference: they
    grow by sqrt(D e / D'), e the share of the energy written that stays. A stream whose cut
    positions were always zero computes the same as before.
    """
    axes = {leaf.path: _stream_axis(leaf, config) for leaf in layout.leaves(config)}
    score, written = np.zeros(config.d_model), np.zeros(config.d_model)
    for path, axis in axes.items():
        if axis is None or flat[path].ndim == 1:
            continue
        others = tuple(i for i in range(flat[path].ndim) if i != axis)
        energy = np.sum(np.square(flat[path], dtype=np.float64), axis=others)
        score += energy / max(energy.sum(), _TINY)
        written += energy if axis else 0  # axis 0 reads
    kept = _best(score, d_model)
    stays = written[kept].sum() / max(written.sum(), _TINY)
    growth = np.sqrt(config.d_model * stays / d_model)
    slimmed = {
        path: array if axes[path] is None else np.take(array, kept, axis=axes[path])
        for path, array in flat.items()
    }
    for path in slimmed:
        if path[-1] == "scale":
            slimmed[path] = slimmed[path] * np.float32(growth)
    if config.scale_logits:  # by D**-0.5, which grows too
        slimmed[("decoder", "final_norm", "scale")] *= np.float32((d_model / config.d_model) ** 0.5)
    return slimmed


def _stream_axis(leaf: Leaf, config: ModelConfig) -> int | None:
    """The axis of a leaf that runs along the residual stream; None for the relative bias."""
    if leaf.path[-2:] == ("relative_bias", "embedding"):
        return None
    reads = leaf.path[-1] in ("head", "qkv", "query", "key_value", "wi", "scale")
    return 0 if reads else len(leaf.shape) - 1


def _best(score: np.ndarray, count: int) -> np.ndarray:
    """The indices of the largest scores, in their order."""
    return np.sort(np.argsort(-score, kind="stable")[:count])
