"""What is imported is what is installed: nothing comes by way of another library's needs."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"distillspec_jax", "experiments"}


def imported():
    """Top-level names of other projects that any module imports, anywhere in it."""
    names = set()
    for path in (path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def test_every_import_is_declared():
    lists = {}
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("INSTALL", "EXTRAS"):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    extras = [each for name in ("peers", "report") for each in lists["EXTRAS"][name]]
    declared = {re.match(r"[\w-]+", each)[0].lower() for each in lists["INSTALL"] + extras}
    known = packages_distributions()
    lacking = {
        name
        for name in imported()
        if not declared & {d.lower().replace("_", "-") for d in known.get(name, [name])}
    }
    assert lacking == set()


@pytest.mark.slow
def test_a_wheel_has_every_module_and_what_they_read(tmp_path):
    """Configs too, though no file makes a package of them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *OURS, "setup.py", "pyproject.toml", "README.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")[:-1]
    for name in listed:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path]
    subprocess.run([*wheel, tmp_path / "tree"], check=True)
    [made] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(made).namelist())
    read = {name for name in listed if name.endswith((".py", ".model", ".safetensors", ".json"))}
    assert read - packed == {"setup.py"}
