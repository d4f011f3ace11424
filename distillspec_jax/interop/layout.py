"""The one table of names: every parameter here, in Hugging Face's T5 and in T5X.

A published checkpoint keeps each projection apart and as a matrix; here projections that read
the same input are one leaf, fused along axis 1, with the heads as an axis of their own. A `Part`
is one published matrix, written "inputs x outputs" as T5X stores it; Hugging Face stores the
transpose. D model size, N heads, H head size, F MLP size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig

Path = tuple[str, ...]
MAX_LAYERS = 2048  # the table is built before a checkpoint is seen: a config may lie


@dataclasses.dataclass(frozen=True)
class Part:
    """One published tensor.

    Attributes:
      huggingface, t5x: its names there.
      shape: inputs x outputs, as T5X stores it.
      transposed: whether Hugging Face stores outputs x inputs.
    """

    huggingface: str
    t5x: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def huggingface_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter here and the published tensors that it is made of.

    Attributes:
      path: keys in the tree of parameters.
      shape: shape here.
      parts: one, or one per index of axis 1 if `fused`.
    """

    path: Path
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    fused: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one part here: the leaf's, without the fused axis."""
        return (self.shape[0], *self.shape[2:]) if self.fused else self.shape


def leaves(config: ModelConfig) -> list[Leaf]:
    """All parameters of a model, in the order in which checkpoints are read and written."""
    c = config
    if max(c.num_encoder_layers, c.num_decoder_layers) > MAX_LAYERS:
        raise UserError(f"model '{c.name}' claims more than {MAX_LAYERS} layers")
    table = Part("shared.weight", "token_embedder/embedding", (c.vocab_size, c.d_model), False)
    found = [Leaf(("embedding",), table.shape, (table,))]
    if not c.tie_embeddings:
        shape = (c.d_model, c.vocab_size)
        head = Part("lm_head.weight", "decoder/logits_dense/kernel", shape, True)
        found.append(Leaf(("head",), shape, (head,)))
    if c.is_encoder_decoder:
        found += _stack(c, "encoder", c.num_encoder_layers)
    return found + _stack(c, "decoder", c.num_decoder_layers)


def _stack(c: ModelConfig, stack: str, depth: int) -> list[Leaf]:
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = Part(
        first, f"{stack}/relpos_bias/rel_embedding", (c.num_heads, c.relative_buckets), True
    )
    found = [Leaf((stack, "relative_bias", "embedding"), bias.shape, (bias,))]
    for i in range(depth):
        found += _layer(c, stack, i)
    names = (f"{stack}.final_layer_norm.weight", f"{stack}/{stack}_norm/scale")
    return [*found, _norm(c, (stack, "final_norm"), *names)]


def _layer(c: ModelConfig, stack: str, index: int) -> Iterator[Leaf]:
    """The leaves of one layer; Hugging Face numbers its sublayers, T5X names them."""
    is_encoder = stack == "encoder"
    here = (stack, f"layers_{index}")
    t5x = f"{stack}/layers_{index}"
    numbered = iter(f"{stack}.block.{index}.layer.{k}" for k in range(3))

    block = next(numbered)
    norm = "pre_attention_layer_norm" if is_encoder else "pre_self_attention_layer_norm"
    yield _norm(
        c, (*here, "self_attention_norm"), f"{block}.layer_norm.weight", f"{t5x}/{norm}/scale"
    )
    names = (f"{block}.SelfAttention", f"{t5x}/{'attention' if is_encoder else 'self_attention'}")
    yield _projection(c, (*here, "self_attention", "qkv"), names, ("query", "key", "value"))
    yield _output(c, (*here, "self_attention", "out"), names)

    if not is_encoder and c.is_encoder_decoder:
        block = next(numbered)
        norm = f"{t5x}/pre_cross_attention_layer_norm/scale"
        yield _norm(c, (*here, "cross_attention_norm"), f"{block}.layer_norm.weight", norm)
        names = (f"{block}.EncDecAttention", f"{t5x}/encoder_decoder_attention")
        yield _projection(c, (*here, "cross_attention", "query"), names, ("query",))
        yield _projection(c, (*here, "cross_attention", "key_value"), names, ("key", "value"))
        yield _output(c, (*here, "cross_attention", "out"), names)

    block = next(numbered)
    norm = f"{t5x}/pre_mlp_layer_norm/scale"
    yield _norm(c, (*here, "mlp_norm"), f"{block}.layer_norm.weight", norm)
    yield from _mlp(c, here, f"{block}.DenseReluDense", f"{t5x}/mlp")


def _norm(c: ModelConfig, path: Path, huggingface: str, t5x: str) -> Leaf:
    return Leaf((*path, "scale"), (c.d_model,), (Part(huggingface, t5x, (c.d_model,), False),))


def _projection(c: ModelConfig, path: Path, names: tuple[str, str], roles: tuple[str, ...]) -> Leaf:
    shape = (c.d_model, c.num_heads * c.head_dim)
    parts = tuple(
        Part(f"{names[0]}.{role[0]}.weight", f"{names[1]}/{role}/kernel", shape, True)
        for role in roles
    )
    return Leaf(path, (c.d_model, len(roles), c.num_heads, c.head_dim), parts, fused=True)


def _output(c: ModelConfig, path: Path, names: tuple[str, str]) -> Leaf:
    shape = (c.num_heads * c.head_dim, c.d_model)
    part = Part(f"{names[0]}.o.weight", f"{names[1]}/out/kernel", shape, True)
    return Leaf(path, (c.num_heads, c.head_dim, c.d_model), (part,))


def _mlp(c: ModelConfig, here: Path, huggingface: str, t5x: str) -> Iterator[Leaf]:
    inputs = ("wi_0", "wi_1") if c.gated else ("wi",)
    shape = (c.d_model, c.d_ff)
    parts = tuple(
        Part(f"{huggingface}.{w}.weight", f"{t5x}/{w}/kernel", shape, True) for w in inputs
    )
    yield Leaf((*here, "mlp", "wi"), (c.d_model, len(inputs), c.d_ff), parts, fused=True)
    part = Part(f"{huggingface}.wo.weight", f"{t5x}/wo/kernel", shape[::-1], True)
    yield Leaf((*here, "mlp", "wo"), shape[::-1], (part,))


def own_leaves(config: ModelConfig) -> list[Leaf]:
    """The same parameters as one tensor each, named by their path: how this project stores them."""
    found = []
    for leaf in leaves(config):
        name = "/".join(leaf.path)
        found.append(Leaf(leaf.path, leaf.shape, (Part(name, name, leaf.shape, False),)))
    return found


def split(leaf: Leaf, array: np.ndarray, index: int) -> np.ndarray:
    """Part `index` of a leaf as a matrix "inputs x outputs"; a view where strides allow it."""
    part = array[:, index] if leaf.fused else array
    return part.reshape(leaf.parts[index].shape)


def nested(flat: dict[Path, Any]) -> dict[str, Any]:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        here = tree
        for key in path[:-1]:
            here = here.setdefault(key, {})
        here[path[-1]] = value
    return tree


def get(tree: Any, path: Path) -> Any:
    """The leaf of a nested mapping at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves(config))
