"""Logical axes to mesh axes, in one table, and the shardings that follow from it.

Parameters name their axes where they are made (models/layers.py). The table says which axis of the
mesh splits each: widths that make wide products (heads, MLP, vocabulary) go to `tensor`, so that
a layer needs one sum over devices after attention and one after the MLP; the model size goes to
`fsdp`, gathered when a layer is used. The two never meet on one axis of an array, so any table
entry combines with any other. Rows of a batch are split over `data` and `fsdp` together: each
device of the fsdp axis computes its own rows with weights gathered from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillspec_jax.models.layers import ROW_AXES
from distillspec_jax.models.transformer import Params, Transformer, init_boxed

RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "head_dim": None,
}
REPLICATED: Mapping[str, str | None] = dict.fromkeys(RULES)  # a small draft beside a large target
BATCH = PartitionSpec(ROW_AXES)


def partition_specs(model: Transformer, rules: Mapping[str, str | None] = RULES) -> Params:
    """The PartitionSpec of every parameter, without allocating any."""
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))

    def spec(leaf: Any) -> PartitionSpec:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        return PartitionSpec(*(rules[name] if name else None for name in names))

    return jax.tree.map(spec, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def param_shardings(
    model: Transformer, mesh: Mesh, rules: Mapping[str, str | None] = RULES
) -> Params:
    """The NamedSharding of every parameter."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(model, rules),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def like_params(tree: Any, params_shardings: Params, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters' structure, such as a train state.

    A leaf whose path ends in the path of a parameter, and has as many axes, is split as that
    parameter is (moments of AdamW, averages); every other leaf (counters, the factored moments
    of Adafactor, some of which stand at the path of a parameter with a single number) is
    replicated.
    """
    by_path = {
        path: sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            sharding = by_path.get(path[start:])
            if sharding is not None and _divides(sharding, leaf.shape):
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(find, tree)


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    if len(sharding.spec) != len(shape):
        return False
    parts = (1 if axis is None else sharding.mesh.shape[axis] for axis in sharding.spec)
    return all(size % n == 0 for size, n in zip(shape, parts, strict=True))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`; the same for batches, rollouts and caches."""
    return NamedSharding(mesh, BATCH)
