"""JSON Lines of one's own: an object per line with a field for the input, one for the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distillspec_jax.data.examples import Example, Examples
from distillspec_jax.errors import UserError
from distillspec_jax.files import json_object


class JsonlExamples(Examples):
    """The validated examples of a JSONL file, held in memory."""

    def __init__(
        self,
        path: str | Path,
        *,
        input_field: str = "input",
        target_field: str = "target",
        prefix: str = "",
    ):
        """Reads and checks the whole file.

        Blank lines are skipped and other fields ignored. With `target_field=""` there are no
        references: every target is the empty text.

        Raises:
          UserError: the file is missing, unreadable or holds no example, a line is no JSON object,
            or a field is missing, empty or not a string; with path and line number.
        """
        self.path = path
        self._lines: list[int] = []
        self._examples: list[Example] = []
        for number, line in numbered_lines(path):
            if line.strip():
                record = read_record(path, number, line)
                source = prefix + read_text(path, number, record, input_field)
                target = read_text(path, number, record, target_field) if target_field else ""
                self._examples.append(Example(source, target))
                self._lines.append(number)
        if not self._examples:
            raise UserError(f"'{path}' holds no examples; every line should be a JSON object")

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, indices: Sequence[int]) -> list[Example]:
        return [self._examples[index] for index in indices]

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file of UTF-8 with their numbers from 1.

    Only a line feed ends a line: a text may hold U+2028 or a form feed, and a carriage return
    before the line feed is kept. A byte order mark is no part of the first line.

    Raises:
      UserError: the file is missing or unreadable, or a line is not UTF-8.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"the file '{path}' does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    numbered = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        try:
            numbered.append((number, line.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not valid UTF-8") from None
    return numbered


def read_record(path: str | Path, number: int, line: str) -> dict:
    """The object of a line; UserError with path and number if it is none."""
    try:
        return json_object(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: {error}") from None


def read_text(path: str | Path, number: int, record: dict, field: str) -> str:
    """A field's text; UserError if it is missing, empty, or no text."""
    if field not in record:
        found = ", ".join(repr(name) for name in record) or "none"
        raise UserError(f"{path}:{number}: no field '{field}'; the line has {found}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{path}:{number}: field '{field}' must be a string, not {type(text).__name__}"
        )
    if not text.strip():
        raise UserError(f"{path}:{number}: field '{field}' is empty")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{path}:{number}: field '{field}' holds half of a surrogate pair")
    return text
