"""What a run must bear beside kills: a clock that goes back, a folder that turns read-only."""

import itertools
import json
import subprocess
import time

import jax
import numpy as np
import pytest


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    drop = ("wall_time", "seconds", "compile_seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def test_a_clock_that_goes_back_changes_nothing(make_toy, monkeypatch):
    """An hour back at each look: as after a correction by NTP, or a change of hosts."""
    whole, back = make_toy("whole"), make_toy("back")
    expected = whole.run(steps=12)
    hours = itertools.count()
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() - 3600 * next(hours))
        back.run(steps=7)
        found = back.run(steps=12)
    assert next(hours) > 3
    # beside the records at the end of the first start, which the whole run does not write
    kept = [r for r in records(back.workdir) if r["step"] != 7]
    assert kept == records(whole.workdir)
    jax.tree.map(np.testing.assert_array_equal, found.state.params, expected.state.params)


def test_a_folder_that_turns_read_only_leaves_the_last_checkpoint(make_toy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk needs rights")
    try:
        toy = make_toy()
        toy.workdir = disk
        toy.run(steps=4)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            toy.run(steps=8)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert int(toy.run(steps=8).state.step) == 8
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
