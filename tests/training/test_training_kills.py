"""A run killed at random moments, during saves, too, ends with the bits of one left alone.

The long version, 50 kills: KILLS=50 python -m pytest tests/training/test_training_kills.py
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, SAVE_EVERY = 60, 2
CLOCKS = ("wall_time", "seconds", "compile_seconds", "tokens_per_second")

JOB = f"""
import os, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
from pathlib import Path
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("toys", {str(HERE / "conftest.py")!r})
toys = module_from_spec(spec)
spec.loader.exec_module(toys)
toy = toys.Toy(Path(sys.argv[1]), average_decay=0.9)
def hook(step):
    print(step, flush=True)
    time.sleep(0.005)
toy.hook = hook
toy.run(steps={STEPS}, save_every={SAVE_EVERY}, best_metric="size", best_mode="min")
"""


def start(workdir):
    workdir.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(workdir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def test_killed_runs_end_with_the_same_bits(make_toy, tmp_path):
    kills = int(os.environ.get("KILLS", "2"))
    seed = int(os.environ.get("KILLS_SEED", "0"))
    rng = random.Random(seed)
    reached = 0
    for kill in range(kills):
        with start(tmp_path / "killed") as job:
            first = int(job.stdout.readline())
            assert first >= reached - 2 * SAVE_EVERY, "more was lost than what was being saved"
            reached = first
            life = rng.randint(1, max(2, 2 * STEPS // kills))
            while reached < min(first + life, STEPS - 1):
                reached = int(job.stdout.readline())
            time.sleep(rng.random() * 0.02)
            job.kill()
            reached = max([reached, *(int(line) for line in job.stdout)])
        print(f"kill {kill + 1}: from step {first} to {reached}")
    with start(tmp_path / "killed") as job:
        _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert "damaged" not in errors

    whole = make_toy("whole", average_decay=0.9)
    expected = whole.run(steps=STEPS, save_every=SAVE_EVERY, best_metric="size", best_mode="min")
    killed = make_toy("killed", average_decay=0.9)
    checkpoints = killed.checkpoints()
    state, memory = checkpoints.restore(killed.state())
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert memory["best_step"] == expected.memory.best_step
    assert records(killed.workdir) == records(whole.workdir)
    kept = [
        sorted(p.name for p in (toy.workdir / "checkpoints").iterdir()) for toy in (killed, whole)
    ]
    assert kept[0] == kept[1]
