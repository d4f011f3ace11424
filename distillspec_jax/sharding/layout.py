"""One mesh and what lies on it: parameters by a table of axes, rows by device.

Rows of a batch are split over `data` and `fsdp`, so a host holds the rows of its own devices: all
of them where an axis of the model crosses hosts. `share` says which; `place` makes one global
array of what the hosts hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distillspec_jax.errors import UserError, unknown_name
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import ROW_AXES
from distillspec_jax.models.transformer import Params, Transformer
from distillspec_jax.sharding import rules
from distillspec_jax.sharding.mesh import check_divides

TABLES: Mapping[str, Mapping[str, str | None]] = {
    "sharded": rules.RULES,
    "replicated": rules.REPLICATED,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything of a run lies."""

    mesh: Mesh

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    def describe(self) -> str:
        """The mesh in words."""
        axes = [f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1]
        devices, kind = jax.device_count(), self.mesh.devices.flat[0].device_kind
        idle = f" of {devices}" if self.mesh.size < devices else ""
        hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        return f"{self.mesh.size}{idle} x {kind}{hosts}" + f" ({', '.join(axes)})" * bool(axes)

    def params(self, table: str) -> Callable[[ModelConfig], Params]:
        """config -> shardings of that model's parameters; what `zoo.load` asks for.

        Raises UserError for an unknown table, and for a mesh that does not divide the model.
        """
        if table not in TABLES:
            raise unknown_name("layout", table, TABLES)

        def shardings(config: ModelConfig) -> Params:
            if table != "replicated":
                check_divides(config, self.mesh)
            return rules.param_shardings(Transformer(config), self.mesh, TABLES[table])

        return shardings

    def born(self, make: Callable[[Params], Any], params: Params) -> Any:
        """make(params), each array born in its place; `params` is given away.

        What looks like the parameters (moments, averages) lies as they do. Of shapes it makes
        shapes.
        """
        shapes = jax.eval_shape(make, params)
        given = jax.tree.map(lambda leaf: leaf.sharding, params)
        places = rules.like_params(shapes, given, self.mesh)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return placed(shapes, places)
        return jax.jit(make, out_shardings=places, donate_argnums=0)(params)

    def round_up(self, batch_size: int) -> int:
        """The next larger batch that the mesh divides."""
        return -(-batch_size // self.row_parts) * self.row_parts

    def share(self, batch_size: int) -> tuple[int, int]:
        """(index, count): this host reads the index-th of `count` equal parts of a batch.

        (0, 1), everything, where its rows are not such a part.
        """
        sharding = rules.batch_sharding(self.mesh)
        indices = sharding.addressable_devices_indices_map((batch_size,)).values()
        ranges = sorted({index[0].indices(batch_size)[:2] for index in indices if index})
        start, stop = ranges[0][0], ranges[-1][1]
        size = stop - start
        is_one_piece = sum(b - a for a, b in ranges) == size
        if not is_one_piece or start % size or batch_size % size:
            return 0, 1
        return start // size, batch_size // size

    def place(self, batch: Any, share: tuple[int, int] = (0, 1)) -> Any:
        """Global arrays of a batch, of which this host holds a share of the rows."""
        sharding = rules.batch_sharding(self.mesh)
        if share == (0, 1) and jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda rows: _global(np.asarray(rows), share, sharding), batch)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of the arrays, or shapes, of a tree."""

    def held(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(held(leaf) for leaf in jax.tree.leaves(tree))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with the place that each will have."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def _global(rows: np.ndarray, share: tuple[int, int], sharding: NamedSharding) -> jax.Array:
    index, count = share
    shape, start = (len(rows) * count, *rows.shape[1:]), index * len(rows)

    def piece(where: Any) -> np.ndarray:
        first, last, _ = where[0].indices(shape[0])
        return rows[first - start : last - start]

    return jax.make_array_from_callback(shape, sharding, piece)


def check_rows(layout: Layout, batch_size: int, micro_batches: int) -> None:
    """Raises UserError where the mesh does not divide the rows of a micro-batch."""
    check_row_parts(layout.row_parts, batch_size, micro_batches)


def check_row_parts(parts: int, batch_size: int, micro_batches: int) -> None:
    """The same of a mesh that does not exist yet, by how many parts it splits rows into."""
    rows = batch_size // micro_batches
    if rows % parts:
        fits = max(n for n in range(1, parts + 1) if rows % n == 0)
        raise UserError(
            f"config.batch_size {batch_size} in {micro_batches} micro-batches gives {rows} rows, "
            f"which {parts} devices (mesh axes data x fsdp) do not divide; data x fsdp = {fits} "
            f"would, or a batch of {-(-rows // parts) * parts * micro_batches}"
        )
