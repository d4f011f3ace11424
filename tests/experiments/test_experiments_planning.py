"""--plan: the bytes it says are those that a run holds, and nothing is allocated for it."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.errors import UserError
from distillspec_jax.sharding.layout import device_bytes
from distillspec_jax.sharding.mesh import MeshConfig
from experiments import bench, distill, finetune, parts, planning
from experiments.planning import Plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(models):
    return distill.DistillConfig(
        task=TaskConfig(input_length=9, target_length=11),
        steps=3,
        batch_size=8,
        target=str(models / "target"),
        draft=str(models / "draft"),
        rollout_length=7,
        draft_layout="sharded",
        mesh=MeshConfig(2, 2, 1),
    )


def test_a_plan_says_what_a_run_would_hold(config, capsys):
    plan = planning.planner(distill.prepare)
    before = len(jax.live_arrays())
    assert plan(config, 1.0) is None
    assert len(jax.live_arrays()) == before
    out = capsys.readouterr().out
    assert "mesh: 4 devices, data 2 x fsdp 2 x tensor 1" in out
    assert "a step: 8 rows of up to 9 + 11 tokens, 160 in all" in out
    assert "fits: 0.00 of 1 GiB" in out
    assert plan(config, 1e-6) == planning.TOO_LARGE
    assert "does not fit: 0.00 of 1e-06 GiB; set config.loss_chunk" in capsys.readouterr().out


def test_shapes_are_those_of_the_arrays(config):
    layout, task = parts.open_layout(config), load_task(config.task)
    outline = distill.prepare(config, task, layout, bench.outline)
    real = distill.prepare(config, task, layout)
    for mine, theirs in ((outline.state, real.state), (outline.frozen, real.frozen)):
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        assert device_bytes(mine) == device_bytes(theirs)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    [shard, *_] = real.state.params["embedding"].addressable_shards
    assert shard.data.shape[1] * 2 == real.state.params["embedding"].shape[1]


GIB = 2**30
SMALL = Plan(1, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        ({"temporary": GIB}, {}, "set config.loss_chunk"),
        ({"temporary": GIB}, {"loss_chunk": 4}, "raise config.micro_batches"),
        ({"frozen": GIB}, {}, "a larger config.mesh.fsdp or config.mesh.tensor"),
        ({"optimizer": GIB}, {}, "take config.optimizer.name 'adafactor'"),
        ({"parameters": GIB}, {}, "take a larger config.mesh.fsdp"),
        ({"parameters": GIB}, {"draft_layout": "replicated"}, "set config.draft_layout"),
    ],
)
def test_advice_is_about_the_largest_part(config, plan, changes, words):
    plan, config = dataclasses.replace(SMALL, **plan), dataclasses.replace(config, **changes)
    assert words in planning.advice(plan, config)


def test_a_mesh_that_does_not_divide_the_heads_is_refused(config):
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 4))
    with pytest.raises(UserError, match=r"'tensor' = 4 does not divide num_heads = 2"):
        planning.planner(distill.prepare)(config, None)


def test_finetuning_can_be_planned(config, models, capsys):
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(parts.TrainingConfig)}
    config = finetune.FinetuneConfig(**fields, model=str(models / "draft"))
    assert planning.planner(finetune.prepare)(config, 1.0) is None
    assert "caches" not in capsys.readouterr().out


XXL = """from ml_collections import ConfigDict
def get_config():
    return ConfigDict(dict(
        target="t5_1_1_xxl", draft="t5_1_1_small", batch_size=64, steps=10, loss_chunk=32,
        task=dict(name="arithmetic_stories", input_length=256, target_length=64),
        optimizer=dict(name="adafactor"), mesh=dict(data=4, fsdp=4, tensor=4)))
"""


@pytest.mark.slow
def test_xxl_on_64_devices_is_planned_on_a_laptop(tmp_path):
    (tmp_path / "xxl.py").write_text(XXL)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    start = time.monotonic()
    flags = [f"--config={tmp_path / 'xxl.py'}", "--plan", "--device_memory_gib=16"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.distill", *flags],
        cwd=ROOT,
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout, f"{time.monotonic() - start:.0f} s")
    assert done.returncode in (0, planning.TOO_LARGE), done.stderr[-2000:]
    assert "mesh: 64 devices" in done.stdout
    frozen = float(re.search(r"frozen models +([\d.]+) GiB", done.stdout)[1])
    assert 2.592 < frozen < 2.60  # 11.1 billion float32 in fsdp 4 x tensor 4 parts, norms in 4
