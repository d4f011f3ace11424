"""A toy to train: noisy linear regression whose every number is a function of (seed, step)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.loop import Hooks, LoopConfig, train
from distillspec_jax.training.metrics import MetricsWriter
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from distillspec_jax.training.state import TrainState

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=8)
DESCRIPTION = {"model": {"name": "toy", "sizes": (5, 3)}, "vocabulary_fingerprint": "ab" * 32}


def batches(step):
    while True:
        x = np.random.default_rng(step).normal(size=(7, 5)).astype(np.float32)
        yield SimpleNamespace(x=x, example_ids=np.arange(7) + 7 * step)
        step += 1


class Toy:
    """What a run needs, with every part open to a test."""

    def __init__(self, workdir, average_decay=0.0):
        self.workdir = workdir
        self.optimizer = make_optimizer(OPTIMIZER, 100)
        self.average_decay = average_decay
        self.bad_steps = ()
        self.notice = None
        self.batches = batches
        self.hook = lambda step: None
        self._step = jax.jit(self._traced_step, donate_argnums=0)

    def state(self):
        params = {"w": jnp.ones((5, 3)), "b": jnp.zeros(3)}
        return TrainState.create(params, self.optimizer, seed=13, average_decay=self.average_decay)

    def _traced_step(self, state, batch, bad):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        target = jax.random.normal(key, (7, 3))

        def loss(params):
            return jnp.sum((batch @ params["w"] + params["b"][None] - target) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g / 7), grads)
        metrics = {
            "loss": (jnp.where(bad, jnp.nan, value), jnp.float32(7)),
            "target_length": (jnp.float32(21), jnp.float32(7)),
        }
        return state.apply_gradients(grads, self.optimizer), metrics

    def step_fn(self, state, batch):
        step = int(state.step)
        self.hook(step)
        return self._step(state, batch, step in self.bad_steps)

    def evaluate(self, state):
        return {"size": float(jnp.sum(state.averaged_params["w"] ** 2)), "at": float(state.step)}

    def checkpoints(self, **fields):
        return Checkpoints(self.workdir, DESCRIPTION | fields)

    def run(self, steps=20, evaluate=True, **config):
        checkpoints = self.checkpoints()
        try:
            return train(
                self.step_fn,
                self.state(),
                self.batches,
                LoopConfig(**{"log_every": 3, "evaluate_every": 5, "save_every": 4, **config}),
                steps=steps,
                checkpoints=checkpoints,
                writer_of=lambda resumed, evaluated: MetricsWriter(
                    self.workdir, resumed_step=resumed, evaluated_step=evaluated
                ),
                hooks=Hooks(
                    evaluate=(self.evaluate if evaluate is True else evaluate) or None,
                    notice=self.notice,
                    place=lambda batch: jax.device_put(batch.x),
                    learning_rate=make_schedule(OPTIMIZER, 100),
                ),
            )
        finally:
            checkpoints.close()


@pytest.fixture
def make_toy(tmp_path):
    """name -> a toy in its own workdir."""

    def make(name="run", **fields):
        (tmp_path / name).mkdir(exist_ok=True)
        return Toy(tmp_path / name, **fields)

    return make
