"""A cache of prepared data for the tests alone."""

import pytest


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """The stories are prepared once for all tests, and nothing outside is touched."""
    folder = tmp_path_factory.getbasetemp() / "prepared"
    monkeypatch.setenv("DISTILLSPEC_DATA", str(folder))
    return folder
