"""The one exception for bad input, and helpers: checks of a setting, and the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
import numbers
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what would be right.

    Entrypoints print it as `error: ...` and leave with exit code 2.
    """


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts `path` into an OSError that names no file: a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters of it; its type if it has none."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def unknown_name(
    kind: str, name: str, known: Iterable[str], where: str = "", *, prefix: str = ""
) -> UserError:
    """Returns the error for a `name` that is not among `known`, with the nearest valid one.

    `prefix` is told before all of them, and makes none of them nearer.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    all_names = ", ".join(prefix + each for each in names)
    hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {all_names}"
    place = f" in {where}" if where else ""
    return UserError(f"unknown {kind} '{prefix}{name}'{place}; {hint}")


def check_count(name: str, value: object, least: int = 1, *, zero: str = "") -> None:
    """Raises UserError unless a setting is an integer of at least `least`; 2.0 is none.

    `zero` says what a 0 stands for where that is no count.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        right = f"0 ({zero}) or a positive integer" if zero else f"an integer of at least {least}"
        raise UserError(f"{name} is {value}; it must be {right}")


def check_number(name: str, value: object) -> None:
    """Raises UserError unless a setting is a number; a text or a bool is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be a number")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raises UserError unless a setting is a `kind`: a Sampling, a BlockLength ..."""
    if not isinstance(value, kind):
        raise UserError(f"{name} is {value!r}; it must be a {kind.__name__}")
