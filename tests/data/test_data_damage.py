"""A prepared data set whose file is damaged stops the run in words; it never yields other texts."""

import json

import pytest

from distillspec_jax.data.builders import base
from distillspec_jax.data.builders.gsm8k import Gsm8k
from distillspec_jax.data.examples import BuiltExamples
from distillspec_jax.errors import UserError

COUNT = 53


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """(The file of a prepared split, a function that reads it anew)."""
    monkeypatch.setenv("DISTILLSPEC_DATA", str(tmp_path / "data"))
    lines = [json.dumps({"question": f"{n}?" * 9, "answer": f"{n}" * 9}) for n in range(COUNT)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    builder = base.prepare(Gsm8k, str(tmp_path))
    [file] = (tmp_path / "data").rglob("*.array_record*")

    def read():
        return list(BuiltExamples(builder.as_data_source("train"), "gsm8k/train"))

    return file, read


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_byte_is_told(prepared, place):
    file, read = prepared
    whole = read()
    assert len(whole) == COUNT
    data = bytearray(file.read_bytes())
    used = [index for index, byte in enumerate(data) if byte]  # the file is padded with zeros
    data[used[int(place * len(used))]] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(UserError, match="gsm8k/train are damaged"):
        read()


def test_a_file_cut_short_is_told(prepared):
    file, read = prepared
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises((UserError, RuntimeError, ValueError)):
        read()
