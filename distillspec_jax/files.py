"""Text files: what a JSON object may be, and writing that leaves the old file or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distillspec_jax.errors import naming


def json_object(text: str) -> dict[str, Any]:
    """The object that `text` holds; ValueError, to be read behind a place and "is", if none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise ValueError("not valid JSON (a number is too long)") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole at every moment: the old one or the new one.

    It is on the disk before it takes its name: a node that fails then leaves no empty file.
    """
    beside = name_beside(path)
    with naming(path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """Where `write_text` writes before it puts the file in its place."""
    return path.with_name(f".{path.name}.tmp")
