"""The transformer that targets and drafts share, and the pure functions that use it.

One decoder stack serves encoder-decoders and decoder-only models (no cross-attention), and one
forward pass serves training, scoring and decoding. Shapes: B batch, T query length, S source or
key length, D model size, V vocabulary.

    inputs  [B, S] int32   source, or prompt of a decoder-only model, right-padded with pad_id
    targets [B, T] int32   continuation with its end-of-sequence, right-padded with pad_id
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from distillspec_jax.models import cache as caches
from distillspec_jax.models.cache import Cache
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import (
    MLP,
    NEG_INF,
    CrossAttention,
    KeysValues,
    RelativeBias,
    Remember,
    RMSNorm,
    ScaledNormal,
    SelfAttention,
    Weight,
    by_rows,
    drawn_by,
    multiply,
    whole_rows,
)

Params = Any  # nested dict of arrays


class Layer(nn.Module):
    """Pre-norm residual layer: self-attention, cross-attention where there is a source, MLP."""

    config: ModelConfig
    has_source: bool

    def setup(self) -> None:
        c = self.config
        self.self_attention_norm, self.self_attention = RMSNorm(c), SelfAttention(c)
        if self.has_source:
            self.cross_attention_norm, self.cross_attention = RMSNorm(c), CrossAttention(c)
        self.mlp_norm, self.mlp = RMSNorm(c), MLP(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        remember: Remember | None,
        memory: KeysValues | None,
        source_bias: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""

        def residual(x, branch):
            return x + self.dropout(branch, deterministic=deterministic)

        x, dtype = by_rows(x), x.dtype
        x = residual(x, self.self_attention(self.self_attention_norm(x), bias, remember, dtype))
        if memory is not None and source_bias is not None:
            normed = self.cross_attention_norm(x)
            x = residual(x, self.cross_attention(normed, memory, source_bias, dtype))
        return residual(x, self.mlp(self.mlp_norm(x), deterministic, dtype))


class Stack(nn.Module):
    """An encoder or a decoder: layers that share one relative position bias, then a norm."""

    config: ModelConfig
    is_encoder: bool

    def setup(self) -> None:
        c = self.config
        depth = c.num_encoder_layers if self.is_encoder else c.num_decoder_layers
        has_source = not self.is_encoder and c.is_encoder_decoder
        self.layers = [Layer(c, has_source) for _ in range(depth)]
        self.relative_bias = RelativeBias(c, bidirectional=self.is_encoder)
        self.final_norm = RMSNorm(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def cross(self, encoded: jax.Array) -> list[KeysValues]:
        """Keys and values of the source for every layer, computed once per sequence."""
        return [layer.cross_attention.keys_values(encoded) for layer in self.layers]

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        cache: Cache | None,
        memory: list[KeysValues] | None,
        source_bias: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the cache with the block appended where there was one.

        Between layers x is float32 where there is a cache: there only weights are large, and texts
        of bfloat16 part less, from those of other shapes of program and from float32's.
        """
        x = self.dropout(x, deterministic=deterministic)
        if cache is not None:
            x = x.astype(jnp.float32)
        stored: list[KeysValues] = []

        def remember_in(layer: int) -> Remember | None:
            if cache is None:
                return None

            def remember(keys, values):
                stored.append(caches.append(cache, layer, keys, values))
                return *stored[-1], cache.lengths + keys.shape[2]

            return remember

        for i, layer in enumerate(self.layers):
            block_memory = None if memory is None else memory[i]
            x = layer(x, bias, remember_in(i), block_memory, source_bias, deterministic)
        x = self.dropout(self.final_norm(by_rows(x)), deterministic=deterministic)
        if cache is None:
            return x, None
        keys, values = zip(*stored, strict=True)
        grown = cache.replace(keys=keys, values=values, lengths=cache.lengths + x.shape[1])
        return x, grown


class Transformer(nn.Module):
    """A T5-style model; use it through the functions below."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        vocabulary = (c.vocab_size, c.d_model)
        init = drawn_by(ScaledNormal(1.0), "vocab", "embed")
        self.embedding = self.param("embedding", init, vocabulary)
        if not c.tie_embeddings:
            init = drawn_by(ScaledNormal(c.d_model**-0.5), "embed", "vocab")
            self.head = self.param("head", init, vocabulary[::-1])
        if c.is_encoder_decoder:
            self.encoder = Stack(c, is_encoder=True)
        self.decoder = Stack(c, is_encoder=False)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return by_rows(whole_rows(self.embedding)[tokens].astype(self.config.dtype))

    def encode(self, inputs: jax.Array, deterministic: bool = True):
        """[B, S] -> cross keys and values per layer, and the source's bias [B, 1, 1, S]."""
        is_real = inputs != self.config.pad_id
        source_bias = jnp.where(is_real, 0.0, NEG_INF)[:, None, None, :]
        # masked in the sum too: attend() masks wherever its bias is below NEG_INF / 2
        bias = self.encoder.relative_bias.whole(inputs.shape[1]) + source_bias
        encoded, _ = self.encoder(self.embed(inputs), bias, None, None, None, deterministic)
        return self.decoder.cross(encoded), source_bias

    def decode(self, tokens, cache=None, memory=None, source_bias=None, deterministic=True):
        """[B, T] -> hidden [B, T, D], cache; without a cache the block starts the sequence."""
        if cache is None:
            bias = self.decoder.relative_bias.whole(tokens.shape[1])
        else:
            positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
            bias = self.decoder.relative_bias.window(positions, cache.room)
            if cache.cross_keys:
                memory = list(zip(cache.cross_keys, cache.cross_values, strict=True))
                source_bias = cache.source_bias
        x = self.embed(tokens)
        return self.decoder(x, bias, cache, memory, source_bias, deterministic)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32; NEG_INF at ids that no piece of the vocabulary has."""
        c = self.config
        if c.scale_logits:
            hidden = hidden * c.d_model**-0.5
        matrix = self.embedding if c.tie_embeddings else self.head
        logits = multiply(hidden, matrix.astype(c.dtype), c.tie_embeddings, jnp.float32)
        if c.num_pieces == c.vocab_size:
            return logits
        is_piece = jnp.arange(c.vocab_size) < c.num_pieces
        return jnp.where(jnp.expand_dims(is_piece, range(logits.ndim - 1)), logits, NEG_INF)

    def score(self, inputs, targets, deterministic=True):
        """Teacher-forced hidden states [B, T, D]: position t is what predicts targets[:, t]."""
        if not self.config.is_encoder_decoder:
            return self._score_prompted(inputs, targets, deterministic)
        memory, source_bias = self.encode(inputs, deterministic)
        start = jnp.full_like(targets[:, :1], self.config.decoder_start_id)
        tokens = jnp.concatenate([start, targets[:, :-1]], axis=1)
        return self.decode(tokens, None, memory, source_bias, deterministic)[0]

    def _score_prompted(self, inputs, targets, deterministic):
        """The same for a decoder-only model: prompt and targets in one row without a gap."""
        lengths = prompt_lengths(inputs, self.config.pad_id)[:, None]
        source, width = inputs.shape[1], inputs.shape[1] + targets.shape[1]
        columns = jnp.arange(width)[None]
        columns = jnp.where(columns < lengths, columns, source + columns - lengths)
        joined = jnp.concatenate([inputs, targets], axis=1)
        tokens = jnp.take_along_axis(joined, jnp.minimum(columns, width - 1), axis=1)
        hidden, _ = self.decode(tokens, deterministic=deterministic)
        # the last prompt token predicts the first target
        rows = lengths - 1 + jnp.arange(targets.shape[1])[None]
        return jnp.take_along_axis(hidden, rows[..., None], axis=1)

    def __call__(self, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return self.logits(self.score(inputs, targets))


def prompt_lengths(inputs: jax.Array, pad_id: int) -> jax.Array:
    """Tokens before the padding of each row: [B, S] -> [B] int32."""
    return jnp.sum(inputs != pad_id, axis=1, dtype=jnp.int32)


def init_boxed(model: Transformer, rng: jax.Array) -> Params:
    """Fresh parameters with their logical axis names (`layers.Weight` boxes).

    Each has a key of its own. Those of one shape and law share a generator: XLA takes seconds to
    compile one, and T5 1.1 XL has 390 weights.
    """
    tokens = jnp.ones((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    weights, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, Weight))
    alike: dict[Any, list[int]] = {}
    for index, weight in enumerate(weights):
        alike.setdefault((weight.draw, weight.value.shape), []).append(index)
    keys = jax.random.split(rng, len(weights))
    values: dict[int, jax.Array] = {}
    for (draw, shape), indices in alike.items():
        drawn = jax.lax.map(functools.partial(draw, shape=shape), keys[np.array(indices)])
        values |= zip(indices, drawn, strict=True)
    boxes = [weight.replace(value=values[index]) for index, weight in enumerate(weights)]
    return jax.tree.unflatten(tree, boxes)


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, rng: jax.Array) -> Params:
    """Fresh float32 parameters, scaled as T5 does (Mesh TensorFlow's initialisers)."""
    return nn.unbox(init_boxed(model, rng))


def _apply(model: Transformer, params: Params, method: str, *arguments: Any, rngs=None) -> Any:
    return model.apply({"params": params}, *arguments, method=method, rngs=rngs)


def hidden_states(
    model: Transformer,
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Teacher-forced decoder outputs [B, T, D]; position t predicts targets[:, t].

    `unembed` turns them into logits, all at once (`score`) or a chunk at a time.
    """
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    return _apply(model, params, "score", inputs, targets, dropout_rng is None, rngs=rngs)


def in_compute_dtype(model: Transformer, params: Params) -> Params:
    """Parameters as products read them, for a loop that would convert them at every step.

    What is read in float32 stays: scales of norms, biases by distance.
    """
    as_read = functools.partial(_as_read, jnp.dtype(model.config.dtype))
    return jax.tree.map_with_path(as_read, params)


def hold_in_compute_dtype(model: Transformer, params: Params) -> Params:
    """`in_compute_dtype` for weights that nothing trains; what it converts is gone behind it.

    One leaf after the other: all of both kinds would be 6 bytes a weight.
    """

    def held(path: Any, leaf: jax.Array) -> jax.Array:
        read = _as_read(jnp.dtype(model.config.dtype), path, leaf)
        if read is not leaf:
            read.block_until_ready()
            leaf.delete()
        return read

    return jax.tree.map_with_path(held, params)


def _as_read(dtype: np.dtype, path: Any, leaf: jax.Array) -> jax.Array:
    names = {key.key for key in path}
    is_wide = names & {"scale", "relative_bias"} or leaf.dtype.itemsize <= dtype.itemsize
    return leaf if is_wide else leaf.astype(dtype)


def unembed(model: Transformer, params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] -> logits [..., V] float32."""
    return _apply(model, params, "logits", hidden)


def score(
    model: Transformer,
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Teacher-forced logits [B, T, V] float32: logits[:, t] predicts targets[:, t]."""
    hidden = hidden_states(model, params, inputs, targets, dropout_rng=dropout_rng)
    return unembed(model, params, hidden)


def start(
    model: Transformer, params: Params, inputs: jax.Array, limit: int
) -> tuple[Cache, jax.Array]:
    """Reads the source or the prompt; returns a cache and the first token to feed [B].

    `limit` is the number of positions that decoding may write. An encoder-decoder begins with
    length 0 and its start token; a decoder-only model with the prompt but for its last token. The
    cache has room for the prompt and the limit, so no prompt is too long for an answer.
    """
    c = model.config
    batch_size, source = inputs.shape
    if c.is_encoder_decoder:
        cache = caches.empty(c, batch_size, limit)
        memory, source_bias = _apply(model, params, "encode", inputs)
        keys, values = zip(*memory, strict=True)
        cache = cache.replace(cross_keys=keys, cross_values=values, source_bias=source_bias)
        return cache, jnp.full((batch_size,), c.decoder_start_id, jnp.int32)
    cache = caches.empty(c, batch_size, source + limit)
    cache = feed(model, params, cache, inputs)
    # a row of padding alone stands for no prompt: its length is 0, never negative
    last = jnp.maximum(prompt_lengths(inputs, c.pad_id) - 1, 0)
    pending = jnp.take_along_axis(inputs, last[:, None], axis=1)[:, 0]
    return caches.rollback(cache, last), pending


def extend(
    model: Transformer, params: Params, cache: Cache, tokens: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feeds a block [B, T] at each row's own length: logits [B, T, V] float32, longer cache."""
    hidden, cache = extend_hidden(model, params, cache, tokens)
    return unembed(model, params, hidden), cache


def next_logits(
    model: Transformer, params: Params, cache: Cache, pending: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feeds a token [B]: logits [B, pieces] of the next one without padding rows, longer cache."""
    logits, cache = extend(model, params, cache, pending[:, None])
    return logits[:, 0, : model.config.num_pieces], cache


def extend_hidden(
    model: Transformer, params: Params, cache: Cache, tokens: jax.Array
) -> tuple[jax.Array, Cache]:
    """`extend` before the vocabulary product: hidden states [B, T, D], longer cache."""
    return _apply(model, params, "decode", tokens, cache)


def feed(model: Transformer, params: Params, cache: Cache, tokens: jax.Array) -> Cache:
    """Feeds a block [B, T] for its keys and values alone."""
    return extend_hidden(model, params, cache, tokens)[1]
