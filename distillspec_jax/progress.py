"""Progress of long loops: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows how far a loop is, its rate and the time left; use it as a context manager.

    On a terminal a bar of `rich`; in a log file one line every few seconds, and one at the end;
    nothing at all if `silent`, as all hosts but the first are.
    The rate counts from the second update on, so that compiling does not spoil the time left.
    """

    def __init__(
        self, name: str, total: int, *, done: int = 0, unit: str = "step", silent: bool = False
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._silent = silent
        self._done = done
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()
        self._console = Console(file=sys.stderr)
        self._bar: rich.progress.Progress | None = None
        self._text = ""

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._silent:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TextColumn(
                    "{task.completed}/{task.total} {task.fields[text]}", markup=False
                ),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._name, total=self._total, completed=self._done, text=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._start is not None:
            self._print_line()

    def update(self, done: int, text: str = "") -> None:
        """Says that `done` of the total are done; `text` is shown behind the rate."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        self._done, self._text = done, text
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self._status())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            self._print(line)

    def _status(self) -> str:
        assert self._start is not None
        seconds, steps = time.monotonic() - self._start[0], self._done - self._start[1]
        if steps == 0 or seconds == 0:
            return self._text
        rate = steps / seconds
        left = (self._total - self._done) / rate
        return f"{rate:.3g} {self._unit}s/s, {_clock(left)} left {self._text}".rstrip()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        done = f"{self._done}/{self._total} {self._unit}s"
        self._print(f"{self._name}: {done}  {self._status()}")

    def _print(self, line: str) -> None:
        if not self._silent:
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
