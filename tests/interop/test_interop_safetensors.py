"""Safetensors headers: what the format's own library writes is read, anything else refused."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillspec_jax.errors import UserError
from distillspec_jax.interop import safetensors_files
from distillspec_jax.interop.safetensors_files import SafetensorsFile, TensorInfo

MUTATIONS = 6000


def encode(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=(7,)).astype(np.float16),
        "c": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "d": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    }


def test_reads_what_the_library_writes(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        found = file.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_the_library_reads_what_we_write(tmp_path, tensors):
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    path = tmp_path / "x.safetensors"
    safetensors_files.write(path, infos, iter(tensors.items()), {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    assert list(tmp_path.iterdir()) == [path]


def test_writing_refuses_an_array_that_the_header_did_not_promise(tmp_path):
    infos = {"a": TensorInfo((2,), np.dtype(np.float32))}
    wrong = iter([("a", np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match="promised"):
        safetensors_files.write(tmp_path / "x", infos, wrong, {})


GOOD = {"a": entry(), "b": entry(shape=(1,), offsets=(8, 12))}
BAD = {
    "nothing": (b"", "has 0 bytes"),
    "short": (b"\x04\0\0", "has 3 bytes"),
    "header past the end": (encode(GOOD, b"x" * 12, length=9999), "truncated"),
    "absurd header": (encode(GOOD, b"x" * 12, length=2**63), "truncated"),
    "not JSON": (encode(b"{nope", b""), "not a sound"),
    "not an object": (encode(b"[]"), "holds a list"),
    "deep": (encode(b"[" * 100_000), "nested too deeply"),
    "long number": (encode(b'{"a":' + b"9" * 5000 + b"}"), "not a sound"),
    "not a number": (encode(b'{"a": NaN}'), "NaN"),
    "repeated name": (encode(b'{"a": {}, "a": {}}'), "repeated"),
    "not UTF-8": (encode(b'{"\xff": {}}'), "not a sound"),
    "truncated data": (encode(GOOD, b"x" * 11), "truncated"),
    "more data": (encode(GOOD, b"x" * 13), "followed by something else"),
    "overlap": (
        encode({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, b"x" * 8),
        "overlaps",
    ),
    "hole": (encode({"a": entry(), "b": entry(shape=(1,), offsets=(12, 16))}, b"x" * 16), "hole"),
    "past the end": (
        encode({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"x" * 8),
        "truncated",
    ),
    "shape and place differ": (encode({"a": entry(shape=(3,))}, b"x" * 8), "needs 12 bytes, has 8"),
    "overflowing shape": (encode({"a": entry(shape=(2**62, 2**62))}, b"x" * 8), "needs"),
    "backwards": (encode({"a": entry(offsets=(8, 0))}, b"x" * 8), "needs 8 bytes, has -8"),
    "negative size": (encode({"a": entry(shape=(-2,))}, b"x" * 8), "no sound shape"),
    "true as size": (encode({"a": entry(shape=(True, 2))}, b"x" * 8), "no sound shape"),
    "many axes": (encode({"a": entry(shape=(1,) * 99 + (2,))}, b"x" * 8), "no sound shape"),
    "float offsets": (encode({"a": entry(offsets=(0.0, 8.0))}, b"x" * 8), "no sound data_offsets"),
    "dtype": (
        encode({"a": entry(dtype="I64", shape=(1,))}, b"x" * 8),
        "supported are F32, BF16, F16",
    ),
    "surplus field": (encode({"a": entry() | {"code": "x"}}, b"x" * 8), "needs exactly"),
    "entry is no object": (encode({"a": 3}, b"x" * 8), "needs exactly"),
    "metadata": (encode({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_a_header_larger_than_any_sane_one(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MAX_HEADER_BYTES", 50)
    (tmp_path / "x").write_bytes(encode(GOOD, b"x" * 12))
    with pytest.raises(UserError, match="at most 50"):
        SafetensorsFile(tmp_path / "x")


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    file = SafetensorsFile(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].begin)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends within"):
        file.read(last)


def mutate(rng, data):
    """One or more random edits: bytes, lengths, numbers of the header, cuts and insertions."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data))) if data else 0
        kind = rng.integers(6)
        if kind == 0 and data:
            data[at] = rng.integers(256)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            data[:8] = int(2 ** rng.uniform(0, 64)).to_bytes(9, "little")[:8]
        elif kind == 4:
            digits = [i for i, byte in enumerate(data[: 8 + 400]) if 48 <= byte < 58]
            if digits:
                at = digits[rng.integers(len(digits))]
                data[at : at + 1] = str(int(2 ** rng.uniform(0, 200))).encode()
        else:
            tokens = (b"[" * 60, b"null", b'"x":', b"{}", b"-1", b"1e400", b"\\u0000", b'"F32"')
            data[at : at + 3] = tokens[rng.integers(len(tokens))]
    return bytes(data)


def test_thousands_of_mutations_crash_nothing_and_cost_no_memory(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    good, rng = path.read_bytes(), np.random.default_rng(1)
    opened = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(rng, good))
        try:
            file = SafetensorsFile(path)
        except UserError:
            continue
        opened += 1
        assert sum(file.read(name).nbytes for name in file.tensors) <= path.stat().st_size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < opened < MUTATIONS / 2
    assert peak < 3 * 2**20
