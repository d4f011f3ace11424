"""The layers of a T5 stack: norm, relative position bias, attention, MLP.

Shapes: B batch, T query length, S key length, N heads, H head size, D model size, F MLP size.
Projections that read the same input are one kernel (q/k/v, k/v, both gates): one large product
is what a CPU and a matrix unit do well. Attention is not scaled by H**-0.5: T5 puts that factor
into the initialisation of the query.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import AxisType, PartitionSpec

from distillspec_jax.models import cpu_product
from distillspec_jax.models.config import ModelConfig

KeysValues = tuple[jax.Array, jax.Array]  # each [B, N, S, H]
# a block's keys and values -> all of the cache's [B, N, S, H] x 2, how many of a row are valid [B]
Remember = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]

ROW_AXES = ("data", "fsdp")  # of the mesh: they split the rows of a batch
GPU_ROWS = 8  # of a product of a single row there: the least of a matrix unit
NEG_INF = -1e9  # finite: 0 * NEG_INF is 0, and a row that is masked whole gives no NaN

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def by_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] with its rows split over the mesh that `jax.set_mesh` set, if one was.

    Without it the partitioner may follow a weight split along D: it then splits x along D and
    keeps whole rows on every device of that axis, where the weight should be gathered. A batch
    that does not divide stays whole (the one row that initialises a model).
    """
    axes = _row_axes()
    if not axes or x.shape[0] % math.prod(axes.values()):
        return x
    rest = (None,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(tuple(axes), *rest))


def whole_rows(table: jax.Array) -> jax.Array:
    """A table [V, D] whose rows are whole on each device, where a mesh is set.

    Looking rows up in a table that is split along D would leave x split along D.
    """
    if not _row_axes():
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def _row_axes() -> dict[str, int]:
    """Size of each axis that splits rows, if a mesh of ours is set, whose layout XLA chooses."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return {axis: mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape}


class Weight(nn.LogicallyPartitioned):
    """A parameter with the names of its axes, and what draws a fresh one: (key, shape) -> array."""

    draw: Callable[..., jax.Array] = struct.field(default=nn.initializers.ones, pytree_node=False)


@dataclasses.dataclass(frozen=True)
class ScaledNormal:
    """Draws from a normal law of mean 0; a tuple gives one scale per index of axis 1."""

    scales: float | tuple[float, ...]

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        scale = jnp.asarray(self.scales, jnp.float32)
        scale = scale.reshape((1, -1) + (1,) * (len(shape) - 2)) if scale.ndim else scale
        return jax.random.normal(key, shape) * jnp.broadcast_to(scale, shape)


def drawn_by(draw: Callable[..., jax.Array], *axes: str | None) -> Callable[..., Any]:
    """The initialiser of a `Weight` that `draw` draws."""
    return lambda key, shape: Weight(draw(key, shape), axes, draw=draw)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, without mean or bias, in float32: [..., D].

    Of the compute dtype, for products read it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = drawn_by(nn.initializers.ones, "embed")
        scale = self.param("scale", ones, (self.config.d_model,))
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(variance + self.config.layer_norm_epsilon)
        return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.config.dtype)


def relative_buckets(
    distances: np.ndarray, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
    """Bucket of each relative position `distance = key position - query position`.

    Half of the buckets are exact, the rest grow logarithmically up to `max_distance`; positions
    beyond share the last one. `bidirectional` (encoder) splits the buckets by sign; otherwise
    future keys fall into bucket 0 (they are masked anyway). Source: T5 (arXiv 1910.10683), 2.1.
    """
    offset = np.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distances > 0, num_buckets, 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + scaled.astype(np.int32), num_buckets - 1)
    return offset + np.where(distances < exact, distances, far)


class RelativeBias(nn.Module):
    """One learnt bias per head and bucket of relative position, shared by all layers of a stack."""

    config: ModelConfig
    bidirectional: bool

    def setup(self) -> None:
        c = self.config
        init = drawn_by(ScaledNormal(c.d_model**-0.5), "heads", None)
        self.embedding = self.param("embedding", init, (c.num_heads, c.relative_buckets))

    def by_distance(self, low: int, high: int) -> jax.Array:
        """Bias of every distance (key - query) in [low, high): [N, high - low] float32."""
        c = self.config
        buckets = relative_buckets(
            np.arange(low, high),
            num_buckets=c.relative_buckets,
            max_distance=c.relative_max_distance,
            bidirectional=self.bidirectional,
        )
        return self.embedding[:, buckets]

    def whole(self, length: int) -> jax.Array:
        """Bias of a whole sequence, causal unless bidirectional: [1, N, length, length]."""
        positions = np.arange(length)
        distances = positions[None, :] - positions[:, None]
        bias = self.by_distance(1 - length, length)[:, distances + length - 1]
        if not self.bidirectional:
            bias = jnp.where(distances[None] <= 0, bias, NEG_INF)
        return bias[None]

    def window(self, query_positions: jax.Array, key_length: int) -> jax.Array:
        """Causal bias of queries [B, T] at any positions over keys 0..S-1: [B, N, T, S].

        Keys after the query are NEG_INF, so entries of a cache past its length are masked too.
        """
        past = self.by_distance(1 - key_length, 1)
        future = jnp.full((past.shape[0], key_length - 1), NEG_INF)
        line = jnp.concatenate([past, future], axis=1)  # index: key - query + key_length - 1
        starts = key_length - 1 - query_positions
        cut = functools.partial(jax.lax.dynamic_slice, slice_sizes=(line.shape[0], key_length))
        rows = jax.vmap(jax.vmap(lambda start: cut(line, (0, start))))(starts)  # [B, T, N, S]
        return rows.swapaxes(1, 2)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    bias: jax.Array,
    valid: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T + bias) v: [B, N, T, H], [B, N, S, H] x 2, [B or 1, N or 1, T or 1, S].

    Softmax in float32. A masked key (bias NEG_INF) has weight exactly 0, even if it holds NaN. Of
    keys and values only the first `valid` [B] of a row are looked at; all of them if None.
    """
    logits = multiply_heads(queries, keys, transposed=True, valid=valid)
    logits = jnp.where(bias > NEG_INF / 2, logits + bias, NEG_INF)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return multiply_heads(weights, values, valid=valid)


def multiply_heads(
    x: jax.Array, matrices: jax.Array, *, transposed: bool = False, valid: jax.Array | None = None
) -> jax.Array:
    """x [B, N, T, K] by a matrix [K, F] of each head, or [F, K] transposed: [B, N, T, F].

    Transposed in float32, as softmax takes it. Lines of the matrices behind `valid` [B] may hold
    NaN: they add nothing, and transposed what they give is arbitrary.
    """
    if cpu_product.serves(x, matrices):
        ends = None if valid is None else jnp.repeat(valid, x.shape[1])
        return cpu_product.product(x, matrices, transposed, ends)
    # 0 * NaN is NaN. Keys would not need it, but XLA on a CPU fuses the write of a single row into
    # the product that reads it and copies the buffer four times, where a mask costs one pass.
    if valid is not None and (not transposed or x.shape[0] == 1):
        is_valid = jnp.arange(matrices.shape[2])[None] < valid[:, None]
        matrices = jnp.where(is_valid[:, None, :, None], matrices, 0)
    if transposed:
        return into_float32(functools.partial(jnp.einsum, "bntk,bnfk->bntf"), x, matrices)
    return jnp.einsum("bntk,bnkf->bntf", x, matrices)


def multiply(
    x: jax.Array, kernel: jax.Array, transposed: bool = False, dtype: Any = None
) -> jax.Array:
    """x [..., K] by a kernel [K, ...], or [F, K] transposed: [..., ...] of `dtype`, x's if None."""
    if not cpu_product.on_one_device():  # merged axes could not be split as the kernel's are
        return _xla_product(x, kernel, transposed, dtype)
    flat = kernel if transposed else kernel.reshape(kernel.shape[0], -1)
    rows = x.reshape(-1, x.shape[-1])
    if cpu_product.serves(rows, flat):
        y = cpu_product.product(rows, flat, transposed)
    else:
        y = _xla_product(_filled_up(rows), flat, transposed, dtype)[: len(rows)]
    outputs = kernel.shape[:1] if transposed else kernel.shape[1:]
    return y.reshape(*x.shape[:-1], *outputs)


def _xla_product(x: jax.Array, kernel: jax.Array, transposed: bool, dtype: Any) -> jax.Array:
    """x [..., K] by a kernel [K, ...], or [F, K] transposed: [..., ...]."""
    product = functools.partial(jnp.tensordot, axes=(-1, 1 if transposed else 0))
    return into_float32(product, x, kernel) if dtype == jnp.float32 else product(x, kernel)


def _filled_up(rows: jax.Array) -> jax.Array:
    """Rows [M, K], on a GPU a single one with zeros below it.

    Of a single row and few weights XLA makes a sum there: it rounds what it multiplied, writes it
    and reads it back, three times the traffic of the weights.
    """
    if len(rows) > 1 or jax.default_backend() != "gpu":
        return rows
    return jnp.pad(rows, ((0, GPU_ROWS - 1), (0, 0)))


def into_float32(
    product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> jax.Array:
    """product(x, y), bilinear, as float32.

    What flows back through it has the type of x and y. By JAX's own rule it would be float32, and
    so would be the products that it meets there.
    """
    return product(x, y) if x.dtype == jnp.float32 else _into_float32(product, x, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _into_float32(product: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return product(x, y, preferred_element_type=jnp.float32)


@_into_float32.defjvp
def _into_float32_jvp(product: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    return _into_float32(product, x, y), (product(dx, y) + product(x, dy)).astype(jnp.float32)


def project(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """[B, T, D] by [D, C, N, H] -> C arrays [B, N, T, H]."""
    joint = multiply(x, kernel)
    return [joint[:, :, c].swapaxes(1, 2) for c in range(kernel.shape[1])]


class _Attention(nn.Module):
    """The kernels that both kinds of attention share, in the compute dtype."""

    config: ModelConfig

    def _input_kernel(self, name: str, *scales: float) -> jax.Array:
        """Kernel [D, len(scales), N, H] of projections that read the same input."""
        c = self.config
        shape = (c.d_model, len(scales), c.num_heads, c.head_dim)
        init = drawn_by(ScaledNormal(scales), "embed", None, "heads", "head_dim")
        return self.param(name, init, shape).astype(c.dtype)

    def _output_kernel(self) -> jax.Array:
        c = self.config
        init = drawn_by(
            ScaledNormal((c.num_heads * c.head_dim) ** -0.5), "heads", "head_dim", "embed"
        )
        return self.param("out", init, (c.num_heads, c.head_dim, c.d_model)).astype(c.dtype)

    def _merge(self, context: jax.Array, dtype: Any) -> jax.Array:
        """[B, N, T, H] -> [B, T, D] of `dtype`.

        One contraction over N H: over N and H apart XLA turns the kernel round at every step.
        """
        heads = context.swapaxes(1, 2)
        kernel = self.out.reshape(-1, self.out.shape[-1])
        return multiply(heads.reshape(*heads.shape[:2], -1), kernel, dtype=dtype)


class SelfAttention(_Attention):
    """Self-attention over the block itself, or over a cache that the block is written into."""

    def setup(self) -> None:
        c = self.config
        width = c.d_model**-0.5
        self.qkv = self._input_kernel("qkv", width * c.head_dim**-0.5, width, width)
        self.out = self._output_kernel()

    def __call__(
        self, x: jax.Array, bias: jax.Array, remember: Remember | None, dtype: Any
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D] of `dtype`.

        `remember` takes the block's keys and values to the cache's.
        """
        queries, keys, values = project(x, self.qkv)
        valid = None
        if remember is not None:
            keys, values, valid = remember(keys, values)
        return self._merge(attend(queries, keys, values, bias, valid), dtype)


class CrossAttention(_Attention):
    """Attention of the decoder to keys and values computed once from the encoder's output."""

    def setup(self) -> None:
        c = self.config
        width = c.d_model**-0.5
        self.query = self._input_kernel("query", width * c.head_dim**-0.5)
        self.key_value = self._input_kernel("key_value", width, width)
        self.out = self._output_kernel()

    def keys_values(self, encoded: jax.Array) -> KeysValues:
        """[B, S, D] -> keys, values [B, N, S, H]."""
        keys, values = project(encoded, self.key_value)
        return keys, values

    def __call__(self, x: jax.Array, memory: KeysValues, bias: jax.Array, dtype: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D] of `dtype`."""
        (queries,) = project(x, self.query)
        return self._merge(attend(queries, *memory, bias), dtype)


class MLP(nn.Module):
    """activation(x W0) [* (x W1) if gated] W2: [B, T, D] -> [B, T, D] of `dtype`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool, dtype: Any) -> jax.Array:
        c = self.config
        width = c.d_model**-0.5
        scales = (width, width) if c.gated else (width,)
        into = drawn_by(ScaledNormal(scales), "embed", None, "mlp")
        out_of = drawn_by(ScaledNormal(c.d_ff**-0.5), "mlp", "embed")
        wi = self.param("wi", into, (c.d_model, len(scales), c.d_ff)).astype(c.dtype)
        wo = self.param("wo", out_of, (c.d_ff, c.d_model))
        joint = multiply(x, wi, dtype=dtype)
        hidden = ACTIVATION_FUNCTIONS[c.activation](joint[:, :, 0])
        if c.gated:
            hidden = hidden * joint[:, :, 1]
        hidden = nn.Dropout(c.dropout_rate)(hidden, deterministic=deterministic)
        return multiply(hidden.astype(c.dtype), wo.astype(c.dtype), dtype=dtype)
