"""Folders of other people's files: read only what lies inside, write whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError, naming

MAX_JSON_BYTES = 32 * 2**20  # an index of an 11B checkpoint has about 0.1 MB


def contained_file(folder: Path, name: str) -> Path:
    """The regular file `name` of `folder`, links resolved.

    Raises UserError if it does not exist, is no regular file (a pipe would hang), or if `name` or
    a link leads out of the folder. A snapshot of the Hugging Face cache may link to the blobs of
    the same model, which is how that cache is built.
    """
    root = folder.resolve()
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"'{name}' in {folder} is not a plain file name")
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    path = folder / name
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path} does not exist or its link leads nowhere") from error
    if not resolved.is_relative_to(root):
        raise UserError(f"{path} is a link out of the folder (to {resolved}); copy the file in")
    if not resolved.is_file():
        raise UserError(f"{path} is not a regular file")
    return resolved


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`; UserError if it is anything else."""
    path = contained_file(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes, no {name} is")
    try:
        return parse_json_object(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not a JSON object: {error}") from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Strict JSON: an object, no repeated keys, no NaN; raises ValueError."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def refuse_links(folder: Path) -> None:
    """Raises UserError if `folder` or anything in it is a link: who reads it would follow."""
    for path in itertools.chain([folder], folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link; put what it leads to in its place")


def refuse_existing(path: Path) -> None:
    """Raises UserError if `path` is there and no empty folder, or lies in what is no folder."""
    parent = next((each for each in path.absolute().parents if os.path.lexists(each)), path)
    if not parent.is_dir():
        raise UserError(f"{path} cannot be made: {parent} is not a folder; choose another place")
    is_folder = path.is_dir() and not path.is_symlink()
    if os.path.lexists(path) and (not is_folder or any(path.iterdir())):
        raise UserError(f"{path} exists already and is not an empty folder; choose another place")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` when the block ends well.

    Raises UserError, before anything is written, where `refuse_existing` does.
    """
    path = path.absolute()
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
        os.rename(temporary, path)  # replaces an empty folder, fails on any other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
