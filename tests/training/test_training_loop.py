"""The loop: what it logs and when, how it stops, and that stopping and going on changes no bit."""

import itertools
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.run_folders import chosen_step
from distillspec_jax.training import loop as module
from distillspec_jax.training.loop import NO_HOOKS, LoopConfig, Memory, _Loop

CLOCKS = ("wall_time", "seconds", "compile_seconds", "tokens_per_second")


def records(toy, kind=None):
    lines = (toy.workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        for clock in CLOCKS:
            record.pop(clock, None)
    return [r for r in found if kind in (None, r["kind"])]


def assert_same_run(left, right):
    assert jax.tree.structure(left.state) == jax.tree.structure(right.state)
    for a, b in zip(jax.tree.leaves(left.state), jax.tree.leaves(right.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stop_at(step, number=signal.SIGTERM):
    def hook(now):
        if now == step:
            os.kill(os.getpid(), number)

    return hook


def test_logs_means_of_sums_and_counts(make_toy):
    toy = make_toy()
    losses = []

    def step_fn(state, batch, real=toy.step_fn):
        state, metrics = real(state, batch)
        losses.append(float(metrics["loss"][0]))
        return state, metrics

    toy.step_fn = step_fn
    toy.run(steps=11)
    logged = records(toy, "train")
    assert [r["step"] for r in logged] == [3, 6, 9, 11]  # the rest, too
    for record, first in zip(logged, (0, 3, 6, 9), strict=True):
        window = losses[first : record["step"]]
        assert record["loss"] == pytest.approx(sum(window) / (7 * len(window)), rel=1e-6)
        assert record["target_length"] == 3.0
    toy.run(steps=11)
    assert records(toy, "train") == logged


def test_the_first_step_of_a_start_is_no_part_of_the_speed(make_toy, monkeypatch):
    toy, now = make_toy(), 0.0

    def step_fn(state, batch, real=toy.step_fn):
        nonlocal now
        now += 50.0 if int(state.step) in (0, 7) else 2.0  # where a start compiles
        return real(state, batch)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    toy.step_fn, toy.hook = step_fn, stop_at(6)
    settings = {"evaluate": False, "log_every": 4}
    toy.run(steps=11, **settings)
    toy.hook = lambda step: None
    memory = toy.run(steps=11, **settings).memory
    assert (memory.seconds, memory.compile_seconds) == (2.0 * 9, 50.0 * 2)
    text = (toy.workdir / "metrics.jsonl").read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    assert [r["tokens_per_second"] for r in logged] == [21 / 2] * 3
    assert [(r["seconds"], r["compile_seconds"]) for r in logged] == [(6, 50), (12, 100), (18, 100)]


@pytest.mark.parametrize(("every", "at"), [(5, [0, 5, 10, 13]), (0, [0, 13])])
def test_evaluates_first_every_so_often_and_last(make_toy, every, at):
    toy = make_toy()
    toy.run(steps=13, evaluate_every=every)
    assert [r["step"] for r in records(toy, "eval")] == at
    assert [r["at"] for r in records(toy, "eval")] == at  # the state is that of the step
    assert records(toy, "eval")[0]["size"] == 15.0


def test_reads_a_step_only_after_the_next_one_has_started(monkeypatch):
    order = []

    class Packed:
        def __init__(self, step):
            self.step = step

        def copy_to_host_async(self):
            order.append(f"start {self.step}")

        def __array__(self, *_, **__):
            order.append(f"read {self.step}")
            return np.ones((2, 2), np.float32)

    class Silent:
        def __getattr__(self, name):
            return lambda *_, **__: None

    class State:
        skipped = skipped_in_row = jnp.int32(0)

    class NoIds:
        example_ids = ()

    steps = iter((1, 2, 3))
    monkeypatch.setattr(module, "_pack", lambda *_: Packed(next(steps)))
    loop = _Loop(LoopConfig(log_every=0), Memory(), Silent(), Silent(), Silent(), NO_HOOKS)
    for step in (1, 2, 3):
        loop.took_step(step, NoIds, {"loss": ()}, State)
    assert order == ["start 1", "read 1", "start 2", "start 3", "read 2"]  # the first compiles


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_uninterrupted(make_toy, number):
    whole, parts = make_toy("whole", average_decay=0.9), make_toy("parts", average_decay=0.9)
    expected = whole.run(steps=20, best_metric="size", best_mode="min")
    for stop in (0, 7, 8, 14):  # before, between, on and after saves, logs and evaluations
        parts.hook = stop_at(stop, number)
        result = parts.run(steps=20, best_metric="size", best_mode="min")
        assert (result.ended, int(result.state.step)) == ("signal", stop + 1)
        assert (parts.workdir / "checkpoints" / str(stop + 1)).is_dir()  # no step is lost
    parts.hook = lambda step: None
    result = parts.run(steps=20, best_metric="size", best_mode="min")
    assert result.ended == expected.ended == "finished"
    assert_same_run(result, expected)
    assert records(parts) == records(whole)
    assert result.memory.best_step == expected.memory.best_step > 0
    # a finished run started again does nothing, and says the same
    before = (parts.workdir / "metrics.jsonl").read_bytes()
    assert_same_run(parts.run(steps=20, best_metric="size", best_mode="min"), expected)
    assert (parts.workdir / "metrics.jsonl").read_bytes() == before


def test_a_stop_comes_before_an_evaluation_which_the_next_start_makes(make_toy):
    """The notice may be shorter than the evaluation; what it finds to be best is marked then."""
    whole, parts = make_toy("whole"), make_toy("parts")
    settings = {"steps": 7, "best_metric": "size", "best_mode": "min"}
    expected = whole.run(**settings)
    parts.hook = stop_at(4)
    assert parts.run(**settings).state.step == 5
    assert [r["step"] for r in records(parts, "eval")] == [0]
    assert chosen_step(parts.workdir) == 0
    parts.hook = stop_at(5)
    assert parts.run(**settings).state.step == 6
    assert [r["step"] for r in records(parts, "eval")] == [0, 5]
    assert chosen_step(parts.workdir) == 5
    parts.hook = lambda step: None
    assert_same_run(parts.run(**settings), expected)
    assert records(parts) == records(whole)
    assert chosen_step(parts.workdir) == chosen_step(whole.workdir)


def test_a_run_that_ends_by_the_evaluation_of_its_next_start_has_its_last_record(make_toy):
    """It takes no step there; started a third time it says nothing twice."""
    whole, parts = make_toy("whole"), make_toy("parts")
    settings = {"best_metric": "at", "best_mode": "min", "patience": 1, "log_every": 3}
    expected = whole.run(**settings)
    assert (expected.ended, expected.state.step) == ("early", 5)
    parts.hook = stop_at(4)
    assert parts.run(**settings).ended == "signal"
    parts.hook = lambda step: None
    for _ in range(3):
        assert_same_run(parts.run(**settings), expected)
        for kind in ("train", "eval"):
            assert records(parts, kind) == records(whole, kind)
    assert [r["step"] for r in records(parts, "train")] == [3, 5]


def test_a_stop_in_the_last_step_comes_too_late(make_toy):
    whole, told = make_toy("whole"), make_toy("told")
    expected = whole.run(steps=7)
    told.hook = stop_at(6)
    assert_same_run(told.run(steps=7), expected)
    assert records(told) == records(whole)
    assert [r["step"] for r in records(told, "eval")][-1] == 7


def test_error_in_a_step_leaves_a_run_that_goes_on(make_toy):
    whole, parts = make_toy("whole"), make_toy("parts")
    expected = whole.run()

    def fail(step):
        if step == 10:
            raise RuntimeError("power cut")

    parts.hook = fail
    with pytest.raises(RuntimeError, match="power cut"):
        parts.run()
    parts.hook = lambda step: None
    assert_same_run(parts.run(), expected)
    assert records(parts) == records(whole)


@pytest.mark.parametrize("best", ["", "size"])
def test_an_evaluation_of_a_start_that_died_before_a_save_is_recorded_once(make_toy, best):
    """Step 5 is saved and not evaluated; the next start evaluates it and dies before step 8."""
    whole, parts = make_toy("whole"), make_toy("parts")
    settings = {"steps": 9, "best_metric": best, "best_mode": "min"}
    expected = whole.run(**settings)
    parts.hook = stop_at(4)
    assert parts.run(**settings).state.step == 5

    def fail(step):
        if step == 6:
            raise RuntimeError("power cut")

    parts.hook = fail
    with pytest.raises(RuntimeError, match="power cut"):
        parts.run(**settings)
    assert [r["step"] for r in records(parts, "eval")] == [0, 5]
    parts.hook = lambda step: None
    assert_same_run(parts.run(**settings), expected)
    assert records(parts) == records(whole)


def test_signal_handlers_are_put_back(make_toy):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    make_toy().run(steps=2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_interrupt_is_not_caught(make_toy):
    toy = make_toy()

    def hook(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    toy.hook = hook
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            toy.run()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("mode", "best"), [("max", 0), ("min", 15)])
def test_best_is_by_the_named_metric(make_toy, mode, best):
    toy = make_toy()
    sizes = {0: 9.0, 5: 4.0, 10: 7.0, 15: 1.0, 20: 1.0}  # a tie is no improvement

    def evaluate(state):
        return {"size": sizes[int(state.step)]}

    result = toy.run(evaluate=evaluate, best_metric="size", best_mode=mode)
    assert result.memory.best_step == best
    assert result.memory.best_evaluation == {"size": sizes[best]}
    assert (toy.workdir / "checkpoints" / str(best)).is_dir()


def test_not_a_number_is_never_the_best(make_toy):
    def evaluate(state):
        return {"size": 1.0 if int(state.step) in (0, 10) else float("nan")}

    result = make_toy().run(evaluate=evaluate, best_metric="size", best_mode="min")
    assert result.memory.best_step == 0

    def evaluate_nan_first(state):
        return {"size": float("nan") if int(state.step) == 0 else 1.0}

    result = make_toy("other").run(evaluate=evaluate_nan_first, best_metric="size")
    assert result.memory.best_step == 5


def test_early_stop_after_patience_and_for_good(make_toy):
    toy = make_toy()

    def evaluate(state):
        return {"size": -abs(float(state.step) - 5)}

    config = {"best_metric": "size", "patience": 2, "log_every": 4}
    result = toy.run(steps=50, evaluate=evaluate, **config)
    assert [r["step"] for r in records(toy, "train")] == [4, 8, 12, 15]
    assert (result.ended, int(result.state.step), result.memory.best_step) == ("early", 15, 5)
    again = toy.run(steps=50, evaluate=evaluate, **config)
    assert (again.ended, int(again.state.step)) == ("early", 15)


def test_unknown_best_metric_is_told_before_the_first_step(make_toy):
    toy = make_toy()
    toy.hook = lambda step: pytest.fail("a step ran")
    with pytest.raises(UserError, match="did you mean 'size'"):
        toy.run(best_metric="sise")


def test_single_bad_gradients_are_skipped_and_counted(make_toy):
    toy = make_toy()
    toy.bad_steps = (2, 3, 7)
    result = toy.run(steps=9, max_skipped=3)
    assert result.ended == "finished"
    logged = records(toy, "train")
    assert [r["skipped_updates"] for r in logged] == [1, 2, 3]
    # a warm-up of eight updates: what is left out is no part of it
    assert [r["learning_rate"] for r in logged] == pytest.approx([0.05 * n / 8 for n in (2, 4, 6)])
    assert all(np.isfinite(r["loss"]) for r in logged)  # the mean of the steps that counted
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))


def test_many_bad_gradients_in_a_row_stop_and_say_where(make_toy):
    toy = make_toy()
    toy.bad_steps = (5, 7, 8, 9, 10, 11)
    words = r"3 steps in a row, 8 to 10 \(examples of step 10: \[63, 64, 65, 66, 67, 68, 69\]\)"
    for _ in range(2):  # step 9 is saved, and a restart reads its count
        with pytest.raises(UserError, match=words):
            toy.run(max_skipped=3, save_every=9)


def test_notices_are_said_once_until_it_was_well_again(make_toy, capsys):
    """The records are of steps 3, 6, 9, 12 and of what is left when the run ends."""
    toy, notices = make_toy(), iter(["bad", "bad", None, "bad", "worse"])
    toy.notice = lambda figures: next(notices)
    toy.run(steps=14, evaluate=False)
    assert re.findall(r"step \d+: \w+", capsys.readouterr().err) == ["step 3: bad", "step 12: bad"]
    assert next(notices, "none is left") == "none is left"


def test_end_of_data_is_told(make_toy):
    toy = make_toy()
    endless = toy.batches
    toy.batches = lambda step: itertools.islice(endless(step), 5)
    with pytest.raises(UserError, match="ended before step 6"):
        toy.run(evaluate=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"best_mode": "maximum"}, "did you mean 'max'"),
        ({"patience": 3}, "patience needs best_metric"),
        ({"patience": 3, "best_metric": "loss", "evaluate_every": 0}, "and evaluate_every is 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"keep_last": 0}, "keep_last"),
    ],
)
def test_bad_settings_are_refused_in_words(fields, words):
    with pytest.raises(UserError, match=words):
        LoopConfig(**fields)
