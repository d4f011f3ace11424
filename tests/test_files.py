"""Text files: whole at every moment, after a fault of the machine, too."""

import os
from pathlib import Path

import pytest

from distillspec_jax.files import write_text


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "config.json", []
    path.write_text("old")

    def synced(descriptor):
        seen.append((path.read_text(), Path(f"/proc/self/fd/{descriptor}").read_text("utf-8")))

    monkeypatch.setattr(os, "fsync", synced)
    write_text(path, "new \u2713")
    assert seen == [("old", "new \u2713")]
    assert path.read_text("utf-8") == "new \u2713"
    assert list(tmp_path.iterdir()) == [path]


def test_a_fault_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_text(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
