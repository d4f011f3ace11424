"""Checkpoints: whole or not at all, the right ones kept, damage told and stepped over."""

import errno
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from distillspec_jax.errors import UserError
from distillspec_jax.models.fingerprint import checksums
from distillspec_jax.run_folders import chosen_step, says_best
from distillspec_jax.training import checkpoints as module
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.state import TrainState


def steps_in(toy):
    folder = toy.workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def params_in(toy, state, step):
    """The weights that the checkpoint of a step hands out."""
    place = toy.workdir / "checkpoints" / str(step) / "params"
    return module._arrays(place, module._abstract(state.params))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(toy, steps, **fields):
    """Saves the states after the given numbers of steps; returns them by step."""
    checkpoints, state, saved = toy.checkpoints(**fields), toy.state(), {}
    stream = toy.batches(0)
    for step in range(max(steps) + 1):
        if step in steps:
            checkpoints.save(state, {"note": step}, best=False)
            saved[step] = jax.tree.map(np.array, state)
        state, _ = toy.step_fn(state, next(stream).x)
    checkpoints.close()
    return saved


def restore(toy, **fields):
    checkpoints = toy.checkpoints(**fields)
    try:
        return checkpoints.restore(toy.state())
    finally:
        checkpoints.close()


def files_of(checkpoint: Path):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_round_trip_is_exact(make_toy, average_decay):
    toy = make_toy(average_decay=average_decay)
    saved = save(toy, [3, 7])
    state, memory = restore(toy)
    assert_same(state, saved[7])
    assert memory == {"note": 7}


def test_nothing_saved_is_nothing_restored(make_toy):
    assert restore(make_toy()) is None


@pytest.mark.parametrize("small", [0, module.SMALL])
def test_a_save_is_a_copy_of_that_moment(make_toy, monkeypatch, small):
    """Steps that donate the state go on while a save is being written."""
    monkeypatch.setattr(module, "SMALL", small)
    toy = make_toy()
    size = 1_500_007
    big = {"w": jnp.arange(float(size))}
    state = toy.state().replace(params=big)
    advance = jax.jit(
        lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda p: p + 1, s.params)),
        donate_argnums=0,
    )
    checkpoints = Checkpoints(toy.workdir, {"model": {}}, keep_last=100)
    for _ in range(12):
        checkpoints.save(state, {}, best=False)
        state = advance(state)
    checkpoints.wait()
    for step in range(12):
        found = params_in(toy, state, step)
        np.testing.assert_array_equal(np.asarray(found["w"]), np.arange(float(size)) + step)
    checkpoints.close()


def test_no_step_waits_for_the_bookkeeping_of_a_small_save(make_toy, monkeypatch):
    toy, open_gate = make_toy(), threading.Event()
    checkpoints = toy.checkpoints()
    keep = checkpoints._manager.save

    def slow(step, args):
        assert open_gate.wait(30)
        return keep(step, args=args)

    monkeypatch.setattr(checkpoints._manager, "save", slow)
    checkpoints.save(toy.state(), {})  # would not return if it waited
    assert steps_in(toy) == []
    open_gate.set()
    checkpoints.save(toy.state(), {}, best=True)  # the same step, so it is there by then
    checkpoints.close()
    assert says_best(toy.workdir / "checkpoints" / "0")


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_an_error_of_a_save_is_raised_by_the_next_call(make_toy, monkeypatch, call):
    toy = make_toy()
    checkpoints = toy.checkpoints()

    def full(step, args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._manager, "save", full)
    checkpoints.save(toy.state(), {})
    calls = {"save": lambda: checkpoints.save(toy.state(), {}), "wait": checkpoints.wait}
    with pytest.raises(UserError, match=r"could not be saved .*No space left.*none before it"):
        calls.get(call, checkpoints.close)()
    checkpoints.close()


def test_keeps_the_newest_and_the_best(make_toy):
    toy = make_toy()
    checkpoints, state = toy.checkpoints(), toy.state()
    for step in range(9):
        checkpoints.save(state.replace(step=jnp.int32(step)), {}, best=step in (1, 4))
    checkpoints.close()
    assert steps_in(toy) == [4, 7, 8]
    assert chosen_step(toy.workdir) == 4


def test_the_best_is_kept_over_a_restart(make_toy):
    toy = make_toy()
    toy.hook = lambda step: None

    def evaluate(state):
        return {"size": -float(state.step)}

    toy.run(steps=5, evaluate=evaluate, best_metric="size")
    toy.run(steps=20, evaluate=evaluate, best_metric="size")
    assert steps_in(toy) == [0, 16, 20]
    assert chosen_step(toy.workdir) == 0


@pytest.mark.parametrize("content", [b"[" * 9_999, b"\xff", b"[]", b'{"best": 1'])
def test_a_description_that_cannot_be_read_says_nothing_of_the_best(make_toy, content):
    toy = make_toy()
    toy.run(steps=3, save_every=3, evaluate=False)
    (toy.workdir / "checkpoints" / "3" / "description" / "metadata").write_bytes(content)
    (toy.workdir / "checkpoints" / "²").mkdir()  # a digit, and no number
    assert chosen_step(toy.workdir) == 3


def test_chosen_step_is_the_newest_if_none_is_best(make_toy):
    toy = make_toy()
    save(toy, [2, 10])
    assert chosen_step(toy.workdir) == 10
    with pytest.raises(UserError, match="no checkpoint in"):
        chosen_step(make_toy("empty").workdir)


def test_the_average_is_what_is_handed_out(make_toy):
    toy = make_toy(average_decay=0.9)
    saved = save(toy, [6])
    checkpoints = toy.checkpoints()
    assert_same(params_in(toy, toy.state(), 6), saved[6].average)
    checkpoints.close()


def damage_by_cutting(checkpoint):
    for file in files_of(checkpoint / "params"):
        os.truncate(file, file.stat().st_size // 2)


def damage_by_deleting(checkpoint):
    shutil.rmtree(checkpoint / "training")


def damage_by_emptying(checkpoint):
    (checkpoint / "description" / "metadata").write_text("")


def damage_by_swapping(checkpoint):
    """Whole files, but of another step."""
    shutil.rmtree(checkpoint / "params")
    shutil.copytree(checkpoint.parent / "3" / "params", checkpoint / "params")


DAMAGES = [damage_by_cutting, damage_by_deleting, damage_by_emptying, damage_by_swapping]


# Reads of a damaged checkpoint that were under way end in threads of TensorStore, at any time.
ignore_remains = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ignore_remains
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_loudly(make_toy, damage, capsys):
    toy = make_toy()
    saved = save(toy, [3, 7])
    damage(toy.workdir / "checkpoints" / "7")
    state, memory = restore(toy)
    assert_same(state, saved[3])
    assert memory == {"note": 3}
    assert "warning: the checkpoint of step 7 is damaged" in capsys.readouterr().err
    assert (toy.workdir / "damaged" / "7").is_dir()  # nothing is thrown away
    assert_same(restore(toy)[0], saved[3])
    save(toy, [7])  # its place is free again
    assert_same(restore(toy)[0], saved[7])


@ignore_remains
@pytest.mark.parametrize("change", ["lost", "cut", "zeroed"])
def test_damage_of_arrays_that_have_files_of_their_own(tmp_path, change, capsys):
    """Small arrays lie inside the index; Orbax wraps what goes wrong with large ones."""

    def state_at(step):
        weights = np.random.default_rng(step).normal(size=(96, 96))
        params = {"w": jnp.asarray(weights, jnp.float32)}
        state = TrainState.create(params, optax.sgd(0.1), seed=0)
        return state.replace(step=jnp.full_like(state.step, step))

    def opened():
        return Checkpoints(tmp_path, {"model": {}}, keep_last=2)

    for step in (3, 7):
        checkpoints = opened()
        checkpoints.save(state_at(step), {})
        checkpoints.close()
    weights = np.asarray(state_at(3).params["w"])
    largest = max(
        files_of(tmp_path / "checkpoints" / "7" / "params"), key=lambda f: f.stat().st_size
    )
    size = largest.stat().st_size
    assert size > 0.8 * weights.nbytes
    if change == "lost":
        largest.unlink()
    elif change == "cut":
        os.truncate(largest, size // 2)
    else:
        largest.write_bytes(bytes(size))
    checkpoints = opened()
    state, _ = checkpoints.restore(state_at(0))
    checkpoints.close()
    assert int(state.step) == 3
    np.testing.assert_array_equal(state.params["w"], weights)
    assert "warning: the checkpoint of step 7 is damaged" in capsys.readouterr().err


def test_damage_that_another_host_alone_finds_is_damage_here_too(make_toy, monkeypatch, capsys):
    toy = make_toy()
    saved = save(toy, [3, 7])
    told = iter([False, True, True])  # of the newest one of them could not be read elsewhere
    monkeypatch.setattr(module.hosts, "all_true", lambda flag: flag and next(told))
    state, _ = restore(toy)
    assert_same(state, saved[3])
    assert "step 7 is damaged (another host could not read it)" in capsys.readouterr().err


@ignore_remains
def test_every_flipped_byte_of_the_arrays_is_noticed_or_harmless(make_toy, capsys):
    toy = make_toy()
    saved = save(toy, [3, 7])
    checkpoint = toy.workdir / "checkpoints" / "7"
    keep = shutil.copytree(checkpoint, toy.workdir.parent / "keep")
    rng = np.random.default_rng(0)
    noticed = 0
    for file in [
        f.relative_to(keep) for item in ("params", "training") for f in files_of(keep / item)
    ]:
        content = bytearray((keep / file).read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (checkpoint / file).write_bytes(content)
        state, _ = restore(toy)
        assert int(state.step) in (3, 7)
        assert_same(state, saved[int(state.step)])
        noticed += int(state.step) == 3
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(keep, checkpoint)
    assert noticed > 3
    capsys.readouterr()


@ignore_remains
def test_a_checkpoint_under_the_name_of_another_step_is_damaged(make_toy, capsys):
    toy = make_toy()
    save(toy, [3])
    place = toy.workdir / "checkpoints"
    shutil.copytree(place / "3", place / "9")
    assert int(restore(toy)[0].step) == 3
    assert "step 9 is damaged (it holds step 3)" in capsys.readouterr().err


@ignore_remains
@pytest.mark.parametrize("item", ["description", "loop"])
def test_every_flipped_bit_of_a_text_is_noticed_or_harmless(make_toy, capsys, item):
    toy = make_toy()
    save(toy, [3, 7])
    checkpoint = toy.workdir / "checkpoints" / "7"
    keep = shutil.copytree(checkpoint, toy.workdir.parent / "keep")
    content = (keep / item / "metadata").read_bytes()
    steps = []
    for place in range(0, len(content), 7 if len(content) > 100 else 1):
        flipped = content[place] ^ 1 << place % 8
        (checkpoint / item / "metadata").write_bytes(
            content[:place] + bytes([flipped]) + content[place + 1 :]
        )
        state, memory = restore(toy)
        assert memory == {"note": int(state.step)}
        steps.append(int(state.step))
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(keep, checkpoint)
    assert steps.count(3) > 0.9 * len(steps)  # no harm: in the name of the seal, and in "best"
    capsys.readouterr()


def test_an_older_text_without_a_seal_is_taken(make_toy):
    toy = make_toy()
    save(toy, [7])
    path = toy.workdir / "checkpoints" / "7" / "description" / "metadata"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in stored.items() if k not in ("seal", "loop")}))
    assert restore(toy)[1] == {"note": 7}


@ignore_remains
def test_sums_of_an_earlier_version_are_not_compared(make_toy, monkeypatch, capsys):
    """It summed in another way, and its description calls them otherwise."""
    real, toy = module.checksums, make_toy()
    monkeypatch.setattr(module, "checksums", lambda tree: real(tree) + 1)
    saved = save(toy, [3, 7])
    monkeypatch.undo()
    path = toy.workdir / "checkpoints" / "3" / "description" / "metadata"
    stored = json.loads(path.read_text())
    stored["checksums"] = stored.pop("sums")
    path.write_text(json.dumps({k: v for k, v in stored.items() if k != "seal"}))
    assert_same(restore(toy)[0], saved[3])
    assert "checkpoint of step 7 is damaged" in capsys.readouterr().err
    assert [p.name for p in (toy.workdir / "damaged").iterdir()] == ["7"]


@ignore_remains
def test_all_damaged_is_an_error_and_loses_nothing(make_toy, capsys):
    toy = make_toy()
    save(toy, [3, 7])
    for step in ("3", "7"):
        damage_by_cutting(toy.workdir / "checkpoints" / step)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        restore(toy)
    assert sorted(p.name for p in (toy.workdir / "damaged").iterdir()) == ["3", "7"]
    capsys.readouterr()


def test_all_damaged_stays_an_error_at_the_next_start(make_toy, capsys):
    """A fresh start would empty the records of the steps that were taken."""
    toy = make_toy()
    toy.run(steps=4, evaluate=False)
    records = (toy.workdir / "metrics.jsonl").read_text()
    for step in steps_in(toy):
        damage_by_deleting(toy.workdir / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
            toy.run(steps=4, evaluate=False)
    assert (toy.workdir / "metrics.jsonl").read_text() == records
    capsys.readouterr()


def _wrapped(error):
    """As Orbax raises errors of reading arrays."""
    wrapper = Exception("Encountered error while reading array index: (slice(0, 3),)")
    wrapper.__cause__ = error
    return wrapper


NO_DAMAGE = [
    MemoryError(),
    PermissionError(errno.EACCES, "Permission denied", "params/d/0"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes."),
    ValueError("RESOURCE_EXHAUSTED: Error reading local file: Too many open files"),
    ValueError("UNKNOWN: Error reading local file: Input/output error"),
    ValueError("PERMISSION_DENIED: Error reading local file: Permission denied"),
    _wrapped(ValueError("UNKNOWN: Error reading local file: Input/output error")),
    _wrapped(ValueError("PERMISSION_DENIED: Error reading local file: Permission denied")),
]


@pytest.mark.parametrize("error", NO_DAMAGE, ids=lambda error: repr(error)[:30])
def test_what_is_no_damage_moves_nothing(make_toy, monkeypatch, capsys, error):
    toy = make_toy()
    saved = save(toy, [3, 7])

    def failing(*arguments, **named):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", failing)
        is_refused = "ermission denied" in f"{error} {error.__cause__}"
        with pytest.raises(UserError if is_refused else type(error)) as raised:
            restore(toy)
        assert is_refused == ("may not be read" in str(raised.value))
    assert steps_in(toy) == [3, 7]
    assert not (toy.workdir / "damaged").exists()
    assert capsys.readouterr().err == ""
    assert_same(restore(toy)[0], saved[7])


def test_a_state_is_freed_before_a_checkpoint_is_read_in_its_place(make_toy, monkeypatch):
    toy, freed = make_toy(average_decay=0.9), []
    real = Checkpoints._read_step

    def watched(*arguments):
        freed.extend(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
        return real(*arguments)

    monkeypatch.setattr(Checkpoints, "_read_step", watched)
    checkpoints, fresh = toy.checkpoints(), toy.state()
    assert checkpoints.restore(fresh) is None  # nothing saved: nothing freed
    checkpoints.save(fresh, {})
    checkpoints.wait()
    assert checkpoints.restore(fresh) is not None
    checkpoints.close()
    assert freed == [True] * len(jax.tree.leaves(fresh))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocabulary_fingerprint": "cd" * 32}, "its vocabulary_fingerprint is abab"),
        ({"model": {"name": "other"}}, "its model is"),
        ({"optimizer": {"name": "adafactor"}}, "its optimizer is"),
    ],
)
def test_checkpoint_of_another_run_is_refused(make_toy, fields, words):
    toy = make_toy()
    save(toy, [3, 7])
    with pytest.raises(UserError, match=words):
        restore(toy, **fields)
    assert steps_in(toy) == [3, 7]


def test_checkpoint_made_from_what_has_changed_is_refused(make_toy):
    toy = make_toy()
    save(toy, [3])  # as before sources were noted
    assert restore(toy, sources={"target": "ab"}) is not None
    save(toy, [7], sources={"target": "ab", "draft": "cd"})
    assert restore(toy, sources={"draft": "cd", "target": "ab"}) is not None
    with pytest.raises(UserError, match=r"7 was made with another target: what its path leads to"):
        restore(toy, sources={"target": "ac", "draft": "cd"})


def test_checkpoint_of_a_newer_format_is_refused(make_toy, monkeypatch):
    toy = make_toy()
    monkeypatch.setattr(module, "FORMAT", 2)
    save(toy, [3])
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"has format 2, .* reads up to 1"):
        restore(toy)


def test_description_says_what_is_inside(make_toy):
    toy = make_toy(average_decay=0.9)
    state = save(toy, [3], seed=13)[3]
    path = toy.workdir / "checkpoints" / "3" / "description" / "metadata"
    found = json.loads(path.read_text())
    assert found["model"] == {"name": "toy", "sizes": [5, 3]}
    assert (found["step"], found["best"], found["format"], found["seed"]) == (3, False, 1, 13)
    assert found["versions"]["jax"] == jax.__version__
    assert found["sums"] == checksums(state.average).tolist()


def test_leftovers_of_a_killed_save_are_cleaned_up(make_toy):
    toy = make_toy()
    saved = save(toy, [3])
    left = toy.workdir / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(toy.workdir / "checkpoints" / "3", left)
    assert_same(restore(toy)[0], saved[3])
    save(toy, [7])  # the cleaning goes on behind a restore; a save waits for it
    assert not left.exists()


def test_disk_full_leaves_the_last_good_checkpoint(make_toy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights")
    try:
        toy = make_toy()
        toy.workdir = disk
        rng = np.random.default_rng(0)  # noise: compression does not help
        big = {"w": rng.normal(size=200_003).astype(np.float32)}
        state = toy.state().replace(params=jax.tree.map(jnp.asarray, big))
        checkpoints = toy.checkpoints()

        def fill():
            for step in range(9):
                checkpoints.save(state.replace(step=jnp.int32(step)), {})
                checkpoints.wait()

        with pytest.raises(UserError, match="could not be saved"):
            fill()
        checkpoints.close()
        last = max(steps_in(toy))
        assert last >= 1
        checkpoints = toy.checkpoints()
        found, _ = checkpoints.restore(state)
        assert int(found.step) == last
        assert_same(found.params, big)
        checkpoints.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("Timed out while waiting for async_write_complete barrier."),
        ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        ValueError("UNAVAILABLE: Error writing: Stale file handle"),
    ],
)
def test_what_another_start_may_mend_is_no_bad_input(make_toy, monkeypatch, error):
    checkpoints = make_toy().checkpoints()

    def late():
        raise error

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", late)
    with pytest.raises(type(error), match=re.escape(str(error))):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()


def test_a_save_does_not_ask_whether_to_stop(make_toy, monkeypatch):
    """JAX takes the number asked last for that of the loop, and would stop nowhere."""
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step)
    )
    toy = make_toy("asks")
    save(toy, {1, 3})
    assert steps_in(toy) == [1, 3]
    assert asked == []
