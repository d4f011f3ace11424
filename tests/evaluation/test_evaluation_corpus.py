"""Data sets in batches: every row once, the last batch filled, padding dropped."""

import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.corpus import over_batches


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_rows_come_back_in_order_whatever_the_batch(batch_size):
    values = np.arange(7 * 2).reshape(7, 2)
    shapes, finished = set(), []

    def call(row_ids, column):
        shapes.add((row_ids.shape, column.shape))
        return {"ids": row_ids, "doubled": 2 * column}

    ids = np.array([5, 3, 8, 13, 2, 0, 21])
    result = over_batches(call, ids, values, batch_size=batch_size, on_rows=finished.append)
    np.testing.assert_array_equal(result["ids"], ids)
    np.testing.assert_array_equal(result["doubled"], 2 * values)
    assert isinstance(result["doubled"], np.ndarray)
    assert len(shapes) == 1  # one compilation
    assert finished[-1] == 7
    assert finished == sorted(set(finished))


def test_the_last_batch_is_filled_with_rows_that_decoding_leaves_out():
    seen = []

    def call(row_ids, column):
        seen.append((row_ids.tolist(), column.tolist()))
        return column

    over_batches(call, np.arange(3), jnp.array([4, 5, 6]), batch_size=2)
    assert seen == [([0, 1], [4, 5]), ([2, -1], [6, 6])]


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (3, 0)])
def test_nothing_to_do_is_refused(count, batch_size):
    with pytest.raises(UserError, match="both must be at least 1"):
        over_batches(lambda ids: ids, np.arange(count), batch_size=batch_size)
