"""A prepared data set whose file is damaged stops the run in words; it never yields other texts."""

import json
import re
import subprocess
import sys

import pytest

from distillspec_jax.data.builders import base
from distillspec_jax.data.builders.gsm8k import Gsm8k
from distillspec_jax.data.examples import BuiltExamples, EncodedExample
from distillspec_jax.data.written import Settings, WrittenTexts, is_written, write_shard
from distillspec_jax.errors import UserError

COUNT = 53
BROKEN = r"is no file of texts, or broken .*; remove it and start experiments\.generate again"


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


def flip(file, place):
    """Changes the used byte at a part of the file; the rest is padding of zeros."""
    data = bytearray(file.read_bytes())
    used = [index for index, byte in enumerate(data) if byte]
    data[used[int(place * len(used))]] ^= 0x55
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_byte_is_told(prepared, place):
    file, read = prepared
    whole = read()
    assert len(whole) == COUNT
    flip(file, place)
    with pytest.raises(UserError, match="gsm8k/train are damaged"):
        read()


def test_a_file_cut_short_is_told(prepared):
    file, read = prepared
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="gsm8k/train are damaged"):
        read()


@pytest.fixture
def texts(tmp_path):
    """(Folder, settings) of texts in two files."""
    settings = Settings("t", "there", "v", {}, {}, seed=0, prompts=7, examples=7, shard_size=4)
    for shard in range(settings.shards):
        rows = [EncodedExample([n, 2, 3], [n] * 9) for n in settings.rows(shard)]
        write_shard(tmp_path, settings, shard, rows)
    return tmp_path, settings


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_byte_in_written_texts_is_told(texts, place):
    folder, settings = texts
    file = settings.path(folder, 1)
    flip(file, place)
    for read in (lambda: is_written(folder, settings, 1), lambda: WrittenTexts(folder)):
        with pytest.raises(UserError, match=rf"{file.name} {BROKEN}"):
            read()


def test_a_byte_flipped_after_opening_is_told(texts):
    folder, settings = texts
    opened = WrittenTexts(folder)
    file = settings.path(folder, 1)
    flip(file, 0.5)  # in a text
    with pytest.raises(UserError, match=rf"{file.name} {BROKEN}"):
        opened.take(range(4, 7))
    assert opened[3].target == [3] * 9


def test_written_texts_cut_short_are_told(texts):
    folder, settings = texts
    file = settings.path(folder, 1)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{file.name} {BROKEN}"):
        is_written(folder, settings, 1)


FEW_FILES = """
import resource, sys
from pathlib import Path
from distillspec_jax.data import written
from distillspec_jax.data.examples import EncodedExample

folder, shards, limit = Path(sys.argv[1]), 150, 100
settings = written.Settings("ab" * 32, "t", "cd" * 32, {}, {}, 0, shards, shards, 1)
for shard in range(shards):
    written.write_shard(folder, settings, shard, [EncodedExample([5], [shard, 1])])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
texts = written.WrittenTexts(folder)
read = [text.target[0] for text in texts.take(range(shards))]
assert read == list(range(shards)), read
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
texts.take([0])
"""


def test_more_files_of_texts_than_a_process_may_open(tmp_path):
    """And no file is called broken that the system does not open."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, tmp_path], capture_output=True, text=True, timeout=300
    )
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"UserError: .*/texts-00000-of-00150\.array_record cannot be read \(too many open files\); "
        r"allow this process more of them \(ulimit -n\)$",
        last,
    ), done.stderr
