"""Progress without a terminal: plain lines, not too many, with a rate that is right."""

import contextlib
import os
import sys

import pytest

from distillspec_jax import progress as module
from distillspec_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def run(clock, total, seconds_a_step, **kwargs):
    with Progress("train", total, **kwargs) as progress:
        for done in range(1, total + 1):
            clock.now += seconds_a_step
            progress.update(done, f"loss {done}")


def test_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    run(clock, 23, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["5/23", "10/23", "15/23", "20/23", "23/23"]


def test_rate_time_left_and_text(clock, capsys):
    run(clock, 4001, 2.0)
    line = capsys.readouterr().err.splitlines()[10]  # at step 33
    assert line == "train: 33/4001 steps  0.5 steps/s, 2:12:16 left loss 33"


def test_the_rate_does_not_count_the_first_step(clock, capsys):
    with Progress("train", 3) as progress:
        clock.now += 60  # compiles
        progress.update(1)
        clock.now += 10
        progress.update(2)
    assert "2/3 steps  0.1 steps/s, 0:10 left" in capsys.readouterr().err


def test_an_unused_bar_says_nothing(capsys):
    with Progress("train", 3):
        pass
    assert capsys.readouterr().err == ""


def test_said_lines_go_out_at_once(capsys):
    with Progress("train", 3) as progress:
        progress.say("step 0: loss 1")
        assert capsys.readouterr().err == "step 0: loss 1\n"


def test_a_terminal_has_a_bar_and_brackets_are_no_markup(monkeypatch):
    screen, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("train [red]", 4, done=1, unit="token") as progress:
            progress.update(1)
            progress.update(3, "loss 1 [abc]")
            progress.say("step 2: [b]")
    shown = ""
    with contextlib.suppress(OSError), os.fdopen(screen, "rb", buffering=0) as screen:
        while part := screen.read(4096):  # an error where all of a closed terminal is read
            shown += part.decode()
    of_a_bar = "\x1b["  # it moves the cursor
    for part in ("train [red]", "step 2: [b]", "3/4", "tokens/s", "left loss 1 [abc]", of_a_bar):
        assert part in shown
