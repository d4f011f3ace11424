"""Records of a run: JSON that stays valid, and no step told twice after a restart."""

import errno
import json
import math
import threading

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from distillspec_jax.training import metrics
from distillspec_jax.training.metrics import MetricsWriter, drop_records_after


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_record_a_line_with_step_kind_and_values(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 3, {"loss": 0.5})
        writer.write("eval", 5, {"tau": 2.0, "tau_ci95": [1.5, 2.5]})
    first, second = read(tmp_path)
    assert (first["step"], first["kind"], first["loss"]) == (3, "train", 0.5)
    assert (second["kind"], second["tau_ci95"]) == ("eval", [1.5, 2.5])
    assert 0 <= second["wall_time"] - first["wall_time"] < 60


def test_not_finite_becomes_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            "train", 1, {"loss": math.nan, "norm": np.float32(np.inf), "ci": [1.0, math.nan]}
        )
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    [record] = read(tmp_path)
    assert (record["loss"], record["norm"], record["ci"]) == (None, None, [1.0, None])


def test_a_full_disk_is_told_by_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter.__new__(MetricsWriter)  # /dev/full never ends: there is nothing to drop
    writer._file = (tmp_path / "metrics.jsonl").open("w")
    with pytest.raises(OSError, match="No space left") as error:
        writer.write("eval", 3, {"loss": 0.5})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No space left"):
        writer._file.close()


def test_a_record_is_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1.0})
        assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("resumed", "kept"), [(-1, []), (0, [0]), (6, [0, 3, 6]), (9, [0, 3, 6, 9])]
)
def test_resuming_drops_the_steps_after(tmp_path, resumed, kept):
    with MetricsWriter(tmp_path) as writer:
        for step in (0, 3, 6, 9):
            writer.write("train", step, {"loss": 1.0})
    with MetricsWriter(tmp_path, resumed_step=resumed) as writer:
        writer.write("train", 12, {"loss": 1.0})
    assert [record["step"] for record in read(tmp_path)] == [*kept, 12]


def test_resuming_drops_the_evaluations_that_are_made_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for kind, step in (("eval", 0), ("train", 3), ("eval", 3), ("train", 4)):
            writer.write(kind, step, {"loss": 1.0})
    for evaluated, kept in ((3, 3), (0, 2)):
        with MetricsWriter(tmp_path, resumed_step=3, evaluated_step=evaluated):
            pass
        assert [(r["kind"], r["step"]) for r in read(tmp_path)] == [
            ("eval", 0),
            ("train", 3),
            ("eval", 3),
        ][:kept]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "ki',
        b'{"step": 2, "kin\xc3',
        b'{"step": ' + b"9" * 5_000 + b', "kind": "train"}\n',
        b"[" * 100_000,
        b"\0" * 100,
    ],
    ids=["cut", "no UTF-8", "number", "nested", "zeros"],
)
def test_a_line_cut_short_by_a_kill_or_damaged_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + line)
    drop_records_after(path, 5)
    assert path.read_text() == '{"step": 1, "kind": "train"}\n'


def events(workdir):
    """What the event files hold, in the order of their names."""
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def scalars(workdir):
    """(tag, step) -> value."""
    return {
        (value.tag, event.step): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
    }


def test_event_files_hold_the_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 3, {"loss": 0.5})
        writer.write("eval", 5, {"tau": 2.0, "tau_ci95": [1.5, 2.5]})
    assert scalars(tmp_path) == {("train/loss", 3): 0.5, ("eval/tau", 5): 2.0}


def test_event_files_hide_the_steps_that_are_undone(tmp_path):
    with MetricsWriter(tmp_path, resumed_step=4):
        pass
    [start] = [each for each in events(tmp_path) if each.session_log.status]
    assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)


def test_event_files_are_read_in_the_order_of_the_starts(tmp_path, monkeypatch):
    clock = iter([1_000.0, 1_000.0, 400.0, 2_000.0])  # stands, goes back, goes on
    for start in range(4):
        with monkeypatch.context() as patch:
            now = next(clock)
            patch.setattr(metrics.time, "time", lambda now=now: now)
            with MetricsWriter(tmp_path, resumed_step=start - 1) as writer:
                writer.write("train", start, {"loss": float(start)})
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [path.name.split(".")[3] for path in files] == ["1000", "1001", "1002", "2000"]
    assert scalars(tmp_path) == {("train/loss", start): float(start) for start in range(4)}


def test_kept_records_are_on_the_disk_and_the_next_ones_behind_them(tmp_path, monkeypatch):
    synced, real = [], metrics.os.fsync
    monkeypatch.setattr(metrics.os, "fsync", lambda file: synced.append(real(file)))
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1.0})
        first = writer._file
        synced.clear()  # the event file has been flushed, too
        writer.keep()
        assert (len(synced), first.closed) == (1, True)
        writer.write("train", 2, {"loss": 2.0})
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


@pytest.mark.parametrize("method", ["write", "close"])
def test_event_files_that_cannot_be_written_stop_nothing(tmp_path, monkeypatch, capsys, method):
    real = getattr(record_writer.RecordWriter, method)

    def full(*arguments):
        real(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    def run():
        with MetricsWriter(tmp_path) as writer:
            monkeypatch.setattr(record_writer.RecordWriter, method, full)
            for step in range(100):
                writer.write("train", step, {"loss": 0.5, "norm": 1.5})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert [record["step"] for record in read(tmp_path)] == list(range(100))
    err = capsys.readouterr().err
    assert err.startswith("warning: the files for TensorBoard end here ([Errno 28] No space left")
    assert err.count("\n") == 1
