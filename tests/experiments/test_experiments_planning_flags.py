"""--plan as a flag: every entrypoint takes it, and writes nothing."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

from distillspec_jax import zoo
from distillspec_jax.errors import UserError
from experiments import convert, distill, door, faults, planning, planning_decoding

ROOT = Path(__file__).resolve().parents[2]
DRAFT = "stories-draft"  # its caches are not as large as those of the target


@pytest.mark.parametrize("name", ["generate", "evaluate", "sweep"])
def test_entrypoints_take_the_flag(leave, tmp_path, monkeypatch, name):
    def planner(outline_of):
        return lambda config, memory: print(outline_of.__name__, type(config).__name__, memory)

    monkeypatch.setattr(planning_decoding, "planner", planner)
    values = {"target": "t", "draft": "d", "drafts": ({"name": "a", "path": "d"},)}
    keys = {"generate": ("target",), "evaluate": ("target", "drafts"), "sweep": ("target", "draft")}
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({ {key: values[key] for key in keys[name]} })\n"
    )
    code, out, err = leave(
        lambda: runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__"),
        f"--config={path}",
        "--plan",
        "--device_memory_gib=2",
    )
    assert (code, err) == (None, "")
    assert out == f"of_{name} {name.capitalize()}Config 2.0\n"


def run_as_main(name):
    return lambda: runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")


def test_a_report_holds_nothing(leave, tmp_path):
    flags = f"--workdir={tmp_path / 'run'}", "--plan"
    code, out, err = leave(run_as_main("report"), *flags)
    assert (code, err) == (None, "")
    assert (
        out == "plan of report: it reads the files of runs, loads no model and compiles nothing\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_run_of_faults_is_planned(leave, tmp_path, monkeypatch):
    def planner(prepare, pauses):
        return lambda run, memory: print(prepare, pauses, run.batch_size, memory)

    monkeypatch.setattr(planning, "planner", planner)
    run = lambda: door.run_flags(faults.main, plan=faults.plan, has_workdir=True)  # noqa: E731
    flags = f"--workdir={tmp_path / 'run'}", "--plan", "--device_memory_gib=2"
    code, out, err = leave(run, *flags)
    assert (code, err) == (None, "")
    assert out == f"{distill.prepare} {planning.trial} 4 2.0\n"
    assert not (tmp_path / "run").exists()


@pytest.fixture
def converting(leave):
    """Runs convert on some flags, and forgets them: (exit code, stdout, stderr)."""

    def call(*arguments):
        try:
            return leave(lambda: door.run_flags(convert.main, plan=convert.plan), *arguments)
        finally:
            for flag in flags.FLAGS.flags_by_module_dict()[convert.__name__]:
                flag.unparse()
                flag.value = flag.default

    return call


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ((), ["read: 127,488 parameters, 0.000 GiB as float32", "written: 0.000 GiB of native"]),
        (("--d_ff=3",), ["cut to: 79,488 parameters"]),
        (("--fresh=1",), ["drawn: 127,488 parameters, 0.000 GiB as", "holds up to 0.000 GiB"]),
        (("--fresh=1", "--d_ff=3"), ["drawn: 79,488 parameters"]),
        (("--device_memory_gib=0.0004", "--verify"), ["does not fit: 0.00 of 0.0004 GiB; leave"]),
    ],
)
def test_a_conversion_is_planned_without_reading(converting, tmp_path, monkeypatch, more, lines):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("read"))
    given = f"--from={DRAFT}", f"--to={tmp_path / 'out'}", "--format=native", "--plan", *more
    code, out, err = converting(*given)
    assert (code, err) == (planning.TOO_LARGE if "does not" in lines[0] else None, "")
    assert "plan of convert, nothing is allocated\n" in out
    for line in lines:
        assert line in out
    assert out.count("parameters, ") == 1 + ("--d_ff=3" in more and "--fresh=1" not in more)
    assert not (tmp_path / "out").exists()


def test_what_a_conversion_holds_and_writes(converting, tmp_path):
    """Source, cut and what is read again, in float32; half of it written in bfloat16."""
    given = f"--from={DRAFT}", f"--to={tmp_path}", "--format=native", "--dtype=bfloat16"
    cut, limit = ("--decoder_layers=0,0", "--verify"), (4 * 127_488 + 8 * 185_024) / planning.GIB
    for memory, code in ((limit, None), (limit * 0.999, planning.TOO_LARGE)):
        found, out, _ = converting(*given, *cut, "--plan", f"--device_memory_gib={memory}")
        assert found == code
        assert f"written: {2 * 185_024 / planning.GIB:.3f} GiB of native, bfloat16" in out


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config=x.py", "this entrypoint takes no --config;"),
        ("--config.steps=3", "this entrypoint takes no --config;"),
        ("--device_memory_gib=16", "--device_memory_gib belongs to --plan; give both, or neither"),
        ("--workdir=x", "this entrypoint takes no --workdir;"),
    ],
)
def test_flags_that_convert_does_not_read_are_refused(converting, tmp_path, flag, words):
    folder = tmp_path / "out"
    arguments = f"--from={DRAFT}", f"--to={folder}", "--format=native", flag
    code, out, err = converting(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("flag", ["--config=x.py", "--device_memory_gib=16"])
def test_faults_reads_a_workdir_and_no_other_flag_of_the_door(leave, tmp_path, flag):
    def call(*flags):
        workdir = f"--workdir={tmp_path / 'run'}"
        main = lambda: print("runs")  # noqa: E731
        run = functools.partial(door.run_flags, main, plan=pytest.fail, has_workdir=True)
        return leave(run, workdir, *flags)

    assert call()[:2] == (None, "runs\n")
    assert call(flag)[:2] == (2, "")


def test_memory_of_a_device_without_a_plan_is_refused(leave, tmp_path):
    def call(*flags):
        return leave(run_as_main("report"), *flags)

    assert call(f"--workdir={tmp_path}", "--device_memory_gib=16")[::2] == (
        2,
        "error: --device_memory_gib belongs to --plan; give both, or neither\n",
    )


def test_faults_compares_runs_of_one_length(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_start", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(faults, "_STEPS", SimpleNamespace(value=200))
    (tmp_path / "summary.json").write_text('{"steps": 200}')
    faults._run(tmp_path, log=tmp_path / "log")
    (tmp_path / "summary.json").write_text('{"steps": 1000}')
    with pytest.raises(UserError, match="has 1000 steps, and --steps is 200; give --steps=1000"):
        faults._run(tmp_path, log=tmp_path / "log")
