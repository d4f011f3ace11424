"""The one exception for bad input, and the helper that suggests the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
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
