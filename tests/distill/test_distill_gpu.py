"""A distillation step on a GPU is that of the CPU."""

import jax
import numpy as np
import pytest

from distillspec_jax.distill import recipes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_an_on_policy_step_is_that_of_the_cpu(
    kind, pairs, batch, fresh_state, compiled_step, device
):
    """Text that the draft writes, losses, gradients and weights."""
    step = compiled_step(kind, recipes.named("distillspec"))

    def taken(place):
        arguments = fresh_state(kind), pairs[kind].target_params, batch
        state, metrics = step(*jax.device_put(arguments, place))
        assert metrics["loss"][0].devices() == {place}
        return jax.device_get((state.params, metrics))

    found, expected = taken(device), taken(jax.devices("cpu")[-1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    assert found[1]["source_draft"][0] == 1
