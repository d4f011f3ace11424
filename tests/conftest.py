"""Settings for the whole suite: eight virtual devices, rank promotion is an error."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# tiny programs take far longer to compile than to run; see also `_compile_as_needed`
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

HURRY = "jax_disable_most_optimizations"
PEERS = ("torch", "transformers")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long checks, too")


def pytest_collection_modifyitems(config, items):
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = "a long check: run with --slow"
        if jax.default_backend() != "gpu":
            skips["gpu"] = "needs a GPU and JAX_PLATFORMS=cuda,cpu; --slow takes the CPU instead"
    if absent:
        skips["peers"] = f"needs {' and '.join(absent)}: pip install -e .[peers]"
    for item in items:
        for mark in skips.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=skips[mark]))


@pytest.fixture(scope="module", autouse=True)
def _compile_as_needed(request):
    """Optimises, at XLA's level 1, what the modules marked `samples` compile, and nothing else."""
    before = jax.config.read(HURRY)
    if request.node.get_closest_marker("samples"):
        jax.config.update(HURRY, False)
    yield
    jax.config.update(HURRY, before)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code():
    """Each compiled program holds memory mappings, and the kernel allows a process 65,530 of them:
    past that XLA dies of a segmentation fault in the middle of a compilation."""
    yield
    jax.clear_caches()


@pytest.fixture
def device():
    """The first device of the default backend, for the checks marked `gpu`.

    There float32 products are asked for in full: a GPU otherwise rounds what they read to TF32.
    """
    chosen = jax.devices()[0]
    with jax.default_matmul_precision("highest"), jax.default_device(chosen):
        yield chosen


def _equations(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        for item in found:
            yield from _equations(item)
        return
    for equation in getattr(getattr(found, "jaxpr", found), "eqns", ()):
        yield equation
        yield from _equations(equation.params)


@pytest.fixture(scope="session")
def equations() -> Callable[[Any], Iterator[Any]]:
    """A function that walks all equations of what was traced, those of inner functions, too."""
    return _equations


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data needs ../shared/data beside the project")
    return SHARED / "data"
