"""The door: configs become dataclasses, and bad input becomes one sentence and exit code 2."""

import dataclasses
import io
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from distillspec_jax.errors import UserError
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments import door, schema
from experiments.decoder import DecodeConfig
from experiments.report import ReportConfig
from experiments.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(name="of the outer"))
    others: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    flag: bool = False


def convert(**values):
    return schema.to_dataclass(Outer, ConfigDict(values), "config")


def test_nested_values_lists_and_defaults():
    found = convert(steps=3, inner={"rate": 1, "sizes": [5]}, others=({"name": "b"}, {"limit": 7}))
    assert found == Outer(
        3, Inner(1.0, "of the outer", (5,)), others=(Inner(name="b"), Inner(limit=7))
    )
    assert isinstance(found.inner.rate, float)


def test_lists_of_a_config_file_can_be_overridden(call, tmp_path):
    path = tmp_path / "lists.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'steps': 3, 'inner': {'sizes': [7, 8]}, 'pair': [4, 5.0]})\n"
    )
    seen = []
    flags = f"--config={path}", f"--workdir={tmp_path}", "--config.inner.sizes=(9,)"
    code, _, err = call(*flags, main=lambda config, workdir: seen.append(config))
    assert code is None, err
    assert (seen[0].inner.sizes, seen[0].pair) == ((9,), (4, 5.0))


def test_a_section_left_out_is_the_default():
    assert convert(steps=3).inner == Inner(name="of the outer")


def test_what_a_section_refuses_is_told_with_the_section():
    for values, words in (
        ({"learning_rate": -1.0}, r"learning_rate is -1.0, must be above 0 \(config.optimizer\)"),
        (
            {"name": "adam"},
            r"unknown optimizer 'adam'; .*'adamw'.* \(config.optimizer\)",
        ),
    ):
        with pytest.raises(UserError, match=words):
            schema.to_dataclass(OptimizerConfig, values, "config.optimizer")
    given = {"target": "a", "max_new_tokens": 0}
    with pytest.raises(UserError, match=r"must be at least 1$"):
        schema.to_dataclass(DecodeConfig, given, "config")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stesp": 3}, r"unknown config key 'config\.stesp'; did you mean 'config\.steps'"),
        ({"sets": 3}, r"'config\.sets'; did you mean 'config\.steps'"),
        ({"decoder": 3}, r"'config\.decoder'; known: config\.flag, config\.inner, config\.others"),
        ({"steps": 3, "inner": {"raet": 1}}, r"'config\.inner\.raet'.*'config\.inner\.rate'"),
        ({}, r"'config\.steps' is missing"),
        ({"steps": 3.5}, r"'config\.steps' is 3\.5, must be int"),
        ({"steps": True}, r"'config\.steps' is True, must be int"),
        ({"steps": "3"}, r"'config\.steps' is '3', must be int"),
        ({"steps": 3, "flag": 1}, r"'config\.flag' is 1, must be bool"),
        ({"steps": 3, "inner": 5}, r"'config\.inner' is 5, must be a section"),
        ({"steps": 3, "inner": {"rate": "fast"}}, r"'config\.inner\.rate' is 'fast'"),
        ({"steps": 3, "inner": {"rate": float("nan")}}, r"inner\.rate' is nan, must be a finite n"),
        ({"steps": 3, "pair": (1, float("inf"))}, r"'config\.pair\[1\]' is inf, must be a finite"),
        ({"steps": 3, "inner": {"sizes": (1, "x")}}, r"'config\.inner\.sizes\[1\]' is 'x'"),
        ({"steps": 3, "inner": {"limit": "x"}}, r"'config\.inner\.limit' is 'x', must be int"),
        ({"steps": 3, "pair": (1, 2, 3)}, r"'config\.pair' is \(1, 2, 3\)"),
    ],
)
def test_bad_values_are_told_with_the_full_key(values, words):
    with pytest.raises(UserError, match=words):
        convert(**values)


@pytest.fixture
def call(enter, tmp_path):
    """Runs a toy entrypoint on some flags: (exit code, stdout, stderr)."""
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(steps='3'):\n"
        "    return ConfigDict({'steps': int(steps), 'inner': {'rate': 0.5}})\n"
    )

    def print_and_touch(config, workdir):
        print(config)
        workdir.mkdir()
        (workdir / "touched").write_text("")

    def call(*arguments, main=print_and_touch):
        return enter(main, Outer, *(each.replace("CONFIG", str(config)) for each in arguments))

    return call


def test_good_flags_reach_main(call, tmp_path):
    workdir = tmp_path / "run"
    code, out, err = call(
        "--config=CONFIG:5", f"--workdir={workdir}", "--config.inner.rate=2", "--config.flag"
    )
    assert (code, err) == (None, "")
    assert out == f"{Outer(5, Inner(2.0, 'of the outer'), flag=True)}\n"
    assert (workdir / "touched").exists()


def test_keys_that_the_file_leaves_out_can_be_set(call, tmp_path):
    _, out, _ = call(
        "--config=CONFIG",
        f"--workdir={tmp_path / 'run'}",
        "--config.inner.name=b",
        "--config.inner.limit=7",
        "--config.inner.sizes=(4,5)",
    )
    assert out == f"{Outer(3, Inner(0.5, 'b', (4, 5), 7))}\n"


@pytest.mark.parametrize("folder", ["", "new"])
def test_a_read_only_workdir_is_one_sentence_and_code_2(call, tmp_path, folder):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs rights")

    def open_workdir(config, workdir):
        Workdir(workdir, "toy", config).close()

    try:
        code, out, err = call("--config=CONFIG", f"--workdir={disk / folder}", main=open_workdir)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: Read-only file system: {disk}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py"], "there is no config file nowhere.py"),
        ([], "--config=FILE.py is missing"),
        (["--config=CONFIG", "--config.stesp=3"], "did you mean 'config.steps'"),
        (["--config=CONFIG", "--config.inner.raet=3"], "did you mean 'config.inner.rate'"),
        (["--config=CONFIG", "--config.iner.rate=3"], "did you mean 'config.inner'"),
        (["--config=CONFIG", "--config."], "unknown config key 'config.'; known: config.flag"),
        (["--config=CONFIG", "--config.=3"], "unknown config key 'config.'; known: config.flag"),
        (["--config=CONFIG", "--config.inner.=3"], "unknown config key 'config.inner.'; known"),
        (["--config=CONFIG", "--config.steps.more=3"], "config.steps is a single value"),
        (["--config=CONFIG", "--config.steps=many"], "'config.steps' is 'many', must be int"),
        (["--config=CONFIG", "--config.inner.rate=fast"], "'fast', must be a finite number"),
        (["--config=CONFIG", "--wrokdir=x"], "wrokdir"),
        (["--config=CONFIG", "stray"], "'stray' is not a flag"),
    ],
)
def test_bad_flags_are_one_sentence_and_code_2(call, tmp_path, arguments, words):
    code, out, err = call(*arguments, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", ["nan", "inf", "-inf", "0", "-3"])
def test_a_memory_that_no_device_has_is_refused(call, memory):
    code, out, err = call("--config=CONFIG", "--plan", f"--device_memory_gib={memory}")
    assert (code, out) == (2, "")
    assert err == (
        f"error: --device_memory_gib is {float(memory)}, must be a finite number above 0\n"
    )


def test_missing_workdir_is_told(call):
    assert call("--config=CONFIG")[::2] == (
        2,
        "error: --workdir=FOLDER is missing; see --help\n",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "def get_config():\n    return 5\n",
            "error: get_config() of FILE returns no ConfigDict\n",
        ),
        ("def get_config(:\n", "error: FILE:1: invalid syntax (--config)\n"),
        ("x = 5\n", "error: FILE (--config) has no function get_config\n"),
        ("def get_config(stage):\n    return 5\n", "error: FILE needs options (--config)\n"),
    ],
)
def test_a_bad_config_file_is_told(call, tmp_path, content, words):
    file = tmp_path / "bad.py"
    file.write_text(content)
    code, _, err = call(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert (code, err) == (2, words.replace("FILE", str(file)))


def test_options_that_a_config_does_not_take_are_told(call, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("def get_config():\n    return 5\n")
    code, _, err = call(f"--config={file}:fast", f"--workdir={tmp_path / 'run'}")
    assert (code, err) == (2, f"error: {file} takes no options: leave ':fast' out (--config)\n")


def test_a_file_that_is_no_python_is_told(call, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, err = call(f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}")
    assert (code, err) == (2, f"error: {tmp_path / 'config.json'} (--config) is no Python file\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("the draft is too long"), "error: the draft is too long\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            "error: Permission denied: /x; allow access or choose another place\n",
        ),
        (
            OSError(28, "No space left on device", "/x"),
            "error: No space left on device: /x; make room or choose another place\n",
        ),
        (
            OSError(122, "Disk quota exceeded"),
            "error: Disk quota exceeded; make room or choose another place\n",
        ),
        (
            OSError(30, "Read-only file system", "/x"),
            "error: Read-only file system: /x; allow access or choose another place\n",
        ),
        (
            NotADirectoryError(20, "Not a directory", "/x/y"),
            "error: Not a directory: /x/y; give the path of a folder or choose another place\n",
        ),
        (
            MemoryError("74.5 GiB"),
            "error: this does not fit into memory (74.5 GiB); --plan says what is needed and which "
            "option makes it less\n",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmore"),
            "error: this does not fit into memory (RESOURCE_EXHAUSTED: Out of memory.); --plan "
            "says what is needed and which option makes it less\n",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 7."),
            "error: this does not fit into memory (INTERNAL: Error dispatching: Out of memory "
            "allocating 7.); --plan says what is needed and which option makes it less\n",
        ),
    ],
)
def test_errors_of_main_are_one_sentence_and_code_2(call, tmp_path, error, words):
    def main(config, workdir):
        raise error

    code, _, err = call("--config=CONFIG", f"--workdir={tmp_path}", main=main)
    assert (code, err) == (2, words)


def test_the_number_of_main_is_the_exit_code(call, tmp_path):
    assert call("--config=CONFIG", f"--workdir={tmp_path}", main=lambda *_: 143)[0] == 143


def test_faults_of_the_program_keep_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        door._or_exit(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        door._or_exit(lambda: (tmp_path / "x").read_text())

    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError):
        door._or_exit(fail)


def test_compilation_cache_is_below_the_users_cache_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        door._enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "distillspec_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_user_without_a_home_has_no_compilation_cache(monkeypatch):
    def getpwuid(uid):
        raise KeyError(f"uid not found: {uid}")

    before = jax.config.jax_compilation_cache_dir
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    door._enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_real_process_leaves_with_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.finetune", "--config=nowhere.py", "--workdir=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no config file nowhere.py (--config)\n",
    )


INTERRUPTED = """
import gc, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments import door
from experiments.decoder import DecodeConfig
from experiments.report import ReportConfig

class Swallows:
    def __del__(self):  # as a callback of a library, which drops what is raised in it
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            print("dropped", flush=True)

def main(config, workdir):
    Swallows()
    print("went on", flush=True)

door.run(main, ReportConfig, plan=None)
"""


def test_ctrl_c_stops_wherever_it_comes(tmp_path):
    job = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, f"--workdir={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (door.INTERRUPTED, "")
    assert err == "\nstopped; the same command goes on or starts again\n"


def test_a_job_in_the_background_leaves_ctrl_c_to_the_terminal_s_other_jobs(call, tmp_path):
    """As a shell starts it: with SIGINT ignored."""
    seen = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        call(
            "--config=CONFIG",
            f"--workdir={tmp_path}",
            main=lambda config, workdir: seen.append(signal.getsignal(signal.SIGINT)),
        )
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]


def test_ctrl_c_in_the_middle_of_a_print_stops_as_well(monkeypatch):
    def left(code):
        raise SystemExit(code)

    def reentrant():
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=reentrant))
    with pytest.raises(SystemExit, match=str(door.INTERRUPTED)):
        door._interrupted(signal.SIGINT, None)


def test_ctrl_c_may_end_a_wait_alone():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), door.raising_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_flags_keys_and_defaults(call, flag):
    code, out, err = call(flag)
    assert (code, err) == (0, "")
    for line in (
        "  --config: path of the config file",
        "  --device_memory_gib: memory of a device: says whether the plan fits",
        "  --config.steps: int",
        "  --config.inner.name: str = 'of the outer'",
        "  --config.inner.limit: int | None = None",
        "  --config.pair: tuple[int, float] = (1, 2.0)",
    ):
        assert line in out.splitlines()


@pytest.mark.parametrize(
    "name",
    sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "    door.run" in p.read_text()),
)
def test_every_entrypoint_has_help(name):
    """Its words, with the lines as they are written."""
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"    python -m experiments.{name}" in done.stdout
    assert "         --" not in done.stdout
    assert "  --plan: " in done.stdout


def test_a_terminal_without_a_letter_shows_another_for_it(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    door._open()
    print("caf\u00e9 \u2713", flush=True)
    assert written.getvalue() == b"caf\xe9 ?\n"


def test_keys_are_flags_without_a_config_file_as_well(leave, tmp_path):
    seen = []

    def run():
        door.run(lambda config, workdir: seen.append(config), ReportConfig, plan=None)

    code, _, err = leave(run, f"--workdir={tmp_path}", "--config.title=Mine")
    assert (code, err) == (None, "")
    assert leave(run, f"--workdir={tmp_path}")[0] is None
    assert [config.title for config in seen] == ["Mine", ""]
    code, _, err = leave(run, f"--workdir={tmp_path}", "--config.titel=Mine")
    assert code == 2
    assert "did you mean 'config.title'?" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--config.steps=1e3", "error: config key 'config.steps' is '1e3', must be int\n"),
        ("--config.steps=", "error: config key 'config.steps' is '', must be int\n"),
        ("--config.flag=maybe", "error: config key 'config.flag' is 'maybe', must be bool\n"),
        ("--config.inner.rate=x", "key 'config.inner.rate' is 'x', must be a finite number\n"),
        (
            "--config.inner=5",
            "config key 'config.inner' is '5', must be a section with keys, of which "
            "--config.inner.rate sets one\n",
        ),
        ("--confg.steps=3", "error: bad flags: Unknown command line flag 'confg.steps'.\n"),
        ("--config=CONFIG", "error: --config is given 2 times (--config="),
    ],
)
def test_values_of_flags_are_refused_in_the_words_of_the_config(call, tmp_path, given, words):
    code, out, err = call("--config=CONFIG", f"--workdir={tmp_path}", "--config.steps=4", given)
    assert (code, out) == (2, "")
    assert words in err


def test_a_path_may_begin_at_home(call, tmp_path, monkeypatch):
    """A shell leaves the ~ of --flag=~/folder as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen = []

    def main(config, workdir):
        seen.append((config.inner.name, str(workdir)))

    assert call("--config=CONFIG", "--workdir=~/x", "--config.inner.name=~/y", main=main)[0] is None
    assert call("--config=CONFIG", f"--workdir={tmp_path}/~/x", main=main)[0] is None
    home = str(tmp_path / "home")
    assert seen[0] == (f"{home}/y", f"{home}/x")
    assert seen[1][1] == f"{tmp_path}/~/x"


TALKS = """
import sys
from experiments import door
from experiments.report import ReportConfig

def main(config, workdir):
    for number in range(3):
        print(number)

door.run(main, ReportConfig, plan=None)
"""


@pytest.mark.parametrize("flag", ["--help", "--workdir=x"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path, flag, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", TALKS, flag],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == door.UNREAD
