"""Where every parameter of every preset lies, against the file that a review sees change."""

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("most_layers", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_every_parameter_lies_where_it_did(most_layers):
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make_partition_specs.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    kept, found = json.loads(make.FILE.read_text()), make.splits(most_layers)
    assert found.keys() == kept.keys()
    for name in found:
        assert found[name] == kept[name], (
            f"{name} is split otherwise than before; if that is meant, run "
            "tests/golden/make_partition_specs.py and look at the diff"
        )
