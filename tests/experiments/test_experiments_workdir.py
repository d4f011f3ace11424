"""The workdir: one run, one job at a time, and nothing overwritten by mistake."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distillspec_jax
from distillspec_jax.errors import UserError
from experiments.workdir import Workdir, write_json

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (2, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 7
    inner: Inner = dataclasses.field(default_factory=Inner)


def start(path, config=None, experiment="toy", **fields):
    Workdir(path, experiment, config or Config(), **fields).close()


def started(path):
    start(path)
    (path / "metrics.jsonl").write_text("{}\n")
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_new_folder_gets_the_resolved_config(tmp_path):
    start(tmp_path / "a" / "b")
    found = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert found == {"experiment": "toy", "steps": 7, "inner": {"rate": 0.5, "sizes": [2, 3]}}


def test_the_same_config_goes_on(tmp_path):
    before = started(tmp_path)
    start(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_runs_may_lie_in_the_folder_of_another(tmp_path):
    before = started(tmp_path / "distilled")
    start(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "distilled").iterdir()} == before


@pytest.mark.parametrize(
    ("config", "experiment", "words"),
    [
        (Config(steps=8), "toy", "holds another run: its steps is 7, yours is 8"),
        (Config(inner=Inner(rate=0.1)), "toy", r"its inner\.rate is 0\.5, yours is 0\.1"),
        (Config(inner=Inner(sizes=(2, 5))), "toy", r"its inner\.sizes is \[2, 3\], yours is"),
        (Config(), "other", "holds a run of 'toy', this is 'other'"),
    ],
)
def test_another_run_is_refused_and_untouched(tmp_path, config, experiment, words):
    before = started(tmp_path)
    with pytest.raises(UserError, match=words):
        start(tmp_path, config, experiment)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_keys_that_may_change_may_change(tmp_path):
    started(tmp_path)
    start(tmp_path, Config(steps=9), may_change=["steps"])
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9


def test_keys_newer_than_the_run_have_their_defaults(tmp_path):
    started(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["inner"]["rate"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    start(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"inner\.rate"):
        start(tmp_path, Config(inner=Inner(rate=0.1)))


def test_keys_older_than_the_program_are_told(tmp_path):
    started(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"gone": 1}))
    with pytest.raises(UserError, match=r"config\.json\.gone'"):
        start(tmp_path)


def test_a_start_that_wrote_nothing_else_may_be_corrected(tmp_path):
    start(tmp_path)
    start(tmp_path, Config(steps=8))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 8


def test_files_that_are_no_run_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        start(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_no_one_can_make_is_told():
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc")
    with pytest.raises(UserError, match="--workdir=/proc/nothing cannot be made there; choose"):
        Workdir(Path("/proc/nothing"), "finetune", Config())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, must be a folder"):
        start(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"steps": ', r"config\.json is not valid JSON \(Expecting value\); choose an empty"),
        (b"[" * 200_000, r"config\.json is not valid JSON \(nested too deeply\); choose"),
        (b"\xff\xfe\x00", r"config\.json is not UTF-8 text; choose"),
        (b"[]", r"config\.json is not a JSON object but a list; choose"),
        (b'{"model_type": "t5"}', r"is not that of a run: .*; choose an empty or a new folder"),
    ],
)
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_config_json_that_is_no_run_s_is_told_and_kept(tmp_path, content, words, is_alone):
    if not is_alone:
        started(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        start(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content


def make_folder(path):
    (path / "config.json").mkdir(parents=True)  # as the folder of a run has


@pytest.mark.parametrize("name", ["config.json", ".lock"])
@pytest.mark.parametrize(
    "make", [Path.mkdir, make_folder, os.mkfifo, lambda path: path.symlink_to("nowhere")]
)
def test_what_has_the_name_of_a_file_of_a_run_and_is_none_is_told(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"/{name} is not a file; choose an empty or a new folder"):
        start(tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_a_path_that_no_folder_can_have_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--workdir='.*a\\x00b' has a NUL byte, no path can"):
        start(tmp_path / "a\0b")


def test_a_second_job_is_refused_until_the_first_ends(tmp_path):
    first = Workdir(tmp_path, "toy", Config())
    with pytest.raises(UserError, match="another job is at work"):
        Workdir(tmp_path, "toy", Config())
    first.close()
    start(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_job(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"file system of --workdir={tmp_path} has no locks \("):
        start(tmp_path)


@pytest.mark.parametrize("is_done", [False, True])
def test_bad_input_leaves_no_folder_that_was_not_there(tmp_path, is_done):
    """Unless the run has left something in it."""

    def fail(name, file=None):
        with Workdir(tmp_path / name, "x", Config()) as run:
            if file:
                (run.path / file).write_text("{}")
            raise UserError("it is too long")

    with pytest.raises(UserError, match="too long"):
        fail("run", "outputs.jsonl" if is_done else None)
    assert (tmp_path / "run").exists() == is_done
    with Workdir(tmp_path / "old", "x", Config()):
        pass
    with pytest.raises(UserError, match="too long"):
        fail("old")
    assert (tmp_path / "old" / "config.json").is_file()


def test_a_killed_job_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from experiments.workdir import _lock; from pathlib import Path\n"
        f"lock = _lock(Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(600)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with job:
        assert job.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another job is at work"):
            start(tmp_path)
        job.kill()
    start(tmp_path)


def test_summary_says_what_it_was_made_with(tmp_path):
    workdir = Workdir(tmp_path, "toy", Config())
    workdir.write_summary({"block_efficiency": 3.5}, seed=13)
    workdir.close()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["block_efficiency"] == 3.5
    assert found["seed"] == 13
    assert found["distillspec_jax_version"] == distillspec_jax.__version__
    assert found["device_count"] == 8
    assert {"jax_version", "flax_version", "device_kind"} < set(found)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_full_disk_is_told_by_file_and_leaves_no_part_of_one(tmp_path):
    (tmp_path / ".config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        start(tmp_path)
    assert error.value.filename == str(tmp_path / "config.json")
    assert os.listdir(tmp_path) == [".lock"]


def test_a_start_that_was_killed_in_its_first_write_goes_through_later(tmp_path):
    (tmp_path / ".config.json.tmp").write_text("{")
    start(tmp_path)
