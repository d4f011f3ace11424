"""A step in phases learns what the one program learns, and says where the time went."""

import time

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.batch import Batch
from distillspec_jax.distill import recipes
from distillspec_jax.distill.step import make_distill_step
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.phases import PhasedStep


@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        (recipes.named("gkd"), ("rollout", "score", "update")),
        pytest.param(recipes.named("sft"), ("rollout", "update"), marks=pytest.mark.slow),
        pytest.param(
            recipes.named("gkd", lambda1=0.0, lambda2=0.0, teacher_gamma=2),
            ("rollout", "update"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["scored", "likelihood", "scored as it is written"],
)
def test_phases_add_up_and_change_nothing(models, recipe, phases):
    (target, target_params), (draft, params) = (zoo.load(models / n) for n in ("target", "draft"))
    rule = make_optimizer(OptimizerConfig(learning_rate=0.01), 3)
    arguments = draft, target, recipe, rule
    whole = make_distill_step(*arguments, rollout_length=5)
    phased = PhasedStep(*arguments, rollout_length=5)
    inputs = np.random.default_rng(1).integers(3, 90, (3, 7)).astype(np.int32)
    batch = Batch(inputs, inputs[:, :4], np.arange(3, dtype=np.int32))
    one, two = (TrainState.create(params, rule, seed=4) for _ in range(2))
    for _ in range(2):
        one, expected = whole(one, target_params, batch)
        begin = time.perf_counter()
        two, metrics = phased(two, target_params, batch)
        passed = time.perf_counter() - begin
        clock = [metrics.pop(f"{phase}_seconds") for phase in phases]
        assert all(total > 0 and count == 1 for total, count in clock)
        assert sum(total for total, _ in clock) <= passed
        assert metrics.keys() == expected.keys()
        assert metrics["loss"][0] == pytest.approx(float(expected["loss"][0]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, two.params)
