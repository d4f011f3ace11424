"""Who may know whom: the rooms of the package, and what is read above its door alone."""

import ast
from pathlib import Path

import pytest

import distillspec_jax

PACKAGE = Path(distillspec_jax.__file__).parent

ANY_ROOM = {"errors", "files", "hosts", "progress", "run_folders"}  # they know no room
MAY_KNOW = {
    "models": set(),
    "data": set(),
    "sharding": {"models"},
    "interop": {"models"},
    "decoding": {"models", "data"},
    "evaluation": {"models", "decoding"},
    "distill": {"models", "decoding"},
    "training": {"models", "distill"},
    "report": set(),
    "zoo": {"models", "data", "interop"},
    "cluster": set(),
    "errors": set(),
    "files": set(),
    "hosts": {"cluster"},
    "progress": set(),
    "run_folders": set(),
}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at its head or in a function, by its whole name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_room_is_known():
    rooms = {path.stem for path in PACKAGE.glob("[!_]*") if list(path.glob("*.py"))}
    files = {path.stem for path in PACKAGE.glob("[!_]*.py")}
    assert rooms | files == set(MAY_KNOW)


@pytest.mark.parametrize("room", MAY_KNOW)
def test_a_room_knows_no_more_than_it_may(room):
    place = PACKAGE / room
    known = set().union(
        *map(imports, place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")])
    )
    parts = [name.split(".") for name in known]
    rooms = {part[1] for part in parts if part[0] == "distillspec_jax" and len(part) > 1}
    assert rooms - {room, "__version__"} <= MAY_KNOW[room] | ANY_ROOM
    # configs and flags end at the door, which is above the package
    assert not {part[0] for part in parts} & {"absl", "ml_collections", "experiments"}
