"""Several processes as one job: the same numbers as one, and no hanging when one is missing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from distillspec_jax import hosts, zoo
from distillspec_jax.errors import UserError
from distillspec_jax.run_folders import FOLDER, saved_steps
from experiments import door

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("wall_time", "seconds", "compile_seconds", "tokens_per_second", "train_seconds")
PYTHON = f"""#!/usr/bin/env bash
[ "$1 $2" = "-m pip" ] || exec {sys.executable} "$@"
"""


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """An environment that is this one, and needs no installing."""
    folder = tmp_path_factory.mktemp("venv")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def environment(venv, tmp_path_factory):
    """Variables of a process with so many virtual devices."""
    cache = tmp_path_factory.mktemp("cache")

    def environment(devices, **more):
        flags = f"--xla_force_host_platform_device_count={devices}"
        own = {"XLA_FLAGS": flags, "DISTILLSPEC_VENV": str(venv), "XDG_CACHE_HOME": str(cache)}
        return {**os.environ, "JAX_PLATFORMS": "cpu", **own, **more}

    return environment


# A config file is Python that every host reads: this one has each step's record tell a number of 24
# bits, which float32 holds, for the texts learnt from, and one for the examples they belong to.
DIGESTS = """
import jax
import jax.numpy as jnp
from distillspec_jax.distill import step

def digest(x):
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    mixed = x.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ place * jnp.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE3D)
    return (jnp.sum(mixed ^ (mixed >> 13)) >> 8).astype(jnp.float32), jnp.ones(())

def with_digests(make):
    def make_rollout(*args, **kwargs):
        rollout = make(*args, **kwargs)

        def rollout_with_digests(*args):
            batch, metrics = rollout(*args)
            found = {"texts": digest(batch.targets), "example_ids": digest(batch.example_ids)}
            return batch, metrics | found

        return rollout_with_digests
    return make_rollout

step.make_rollout = with_digests(step.make_rollout)
"""

# and this says which thread keeps Orbax's books of a save
FILED = """
import threading
from distillspec_jax.training.checkpoints import Checkpoints

def saying(file):
    def said(*args):
        print("filed by", threading.current_thread().name, flush=True)
        file(*args)
    return said

Checkpoints._file = saying(Checkpoints._file)
"""


# a shell's `&`, under which the tests may run, ignores Ctrl-C
FOREGROUND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def start(environment, config_file, tmp_path):
    """Starts `distill` on so many hosts of so many devices each."""
    started = []

    def start(workdir, hosts, devices, mesh, *flags, **more):
        loop = {"log_every": 1, "evaluate_every": 0, "save_every": 3}
        config = config_file("distill", mesh=mesh, loop=loop)
        config.write_text(config.read_text() + DIGESTS + FILED)
        arguments = [f"--config={config}", f"--workdir={tmp_path / workdir}", *flags]
        command = ["bash", "launch/local_hosts.sh", str(hosts), "distill", *arguments]
        if hosts == 1:
            command = [sys.executable, "-m", "experiments.distill", *arguments]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", FOREGROUND, *command],
                cwd=ROOT,
                env=environment(devices, **more),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.stdout.close()
        job.wait()


def finish(job, code=0):
    out, _ = job.communicate(timeout=300)
    assert job.returncode == code, out[-3000:]
    return out


def records(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in found]


def assert_same_numbers(left, right):
    left, right = records(left), records(right)
    assert [list(record) for record in left] == [list(record) for record in right]
    for a, b in zip(left, right, strict=True):
        for key, value in a.items():
            if isinstance(value, str):
                assert value == b[key]
            else:
                np.testing.assert_allclose(value, b[key], rtol=1e-5, err_msg=f"{key}, {a['step']}")


def assert_same_texts(left, right):
    """What was sampled, and for which examples, in every step; each step's is another."""
    for name in ("texts", "example_ids"):
        left_digests, right_digests = (
            [record[name] for record in records(folder) if record["kind"] == "train"]
            for folder in (left, right)
        )
        assert left_digests == right_digests, name
        assert len(set(left_digests)) == len(left_digests) > 5


def assert_same_weights(left, right):
    """Of the last step, to 1e-5 of the largest weight of each array; the best may be the first."""
    left, right = (
        zoo.load(folder / FOLDER / str(saved_steps(folder / FOLDER)[-1]))[1]
        for folder in (left, right)
    )

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    jax.tree.map(same, left, right)


CALM = "--config.optimizer.epsilon=1e-4"  # at 1e-8 AdamW makes steps of rounding errors
TWENTY = ("--config.steps=20", CALM)
PACKAGED = (
    "--config.target=stories-target",
    "--config.draft=stories-draft",
    # at 1e-3 rounding grows tenfold in six steps of a trained draft, at 1e-2 it is thrown about
    "--config.optimizer.learning_rate=1e-4",
    *TWENTY,
)


@pytest.mark.parametrize(
    ("count", "devices", "mesh", "flags"),
    [
        (2, 2, {"data": 2, "fsdp": 2}, ()),
        pytest.param(2, 2, {"data": 2, "fsdp": 2}, TWENTY, marks=pytest.mark.slow),
        # the target crosses hosts; both read all rows
        pytest.param(2, 1, {"data": 1, "tensor": 2}, PACKAGED, marks=pytest.mark.slow),
        pytest.param(4, 1, {"data": 2, "fsdp": 2}, TWENTY, marks=pytest.mark.slow),
    ],
)
def test_several_hosts_take_the_steps_of_one(start, tmp_path, count, devices, mesh, flags):
    several = finish(start("several", count, devices, mesh, *flags))
    finish(start("alone", 1, 1, {}, *flags))
    assert_same_texts(tmp_path / "several", tmp_path / "alone")
    assert_same_weights(tmp_path / "several", tmp_path / "alone")
    assert_same_numbers(tmp_path / "several", tmp_path / "alone")
    assert several.count("weights of step ") == 1  # one process talks
    assert set(re.findall(r"filed by (\w+)", several)) == {"checkpoints_0"}  # beside the steps
    assert f"[0]   devices: {count * devices} x cpu on {count} hosts" in several


@pytest.mark.slow
def test_a_run_goes_on_with_other_hosts_and_another_mesh(start, tmp_path):
    finish(start("several", 2, 2, {"data": 1, "fsdp": 4}))
    finish(start("alone", 1, 1, {}))
    out = finish(start("several", 1, 1, {}, "--config.steps=8"))
    assert "goes on from the checkpoint of step 6" in out
    finish(start("alone", 1, 1, {}, "--config.steps=8"))
    assert_same_numbers(tmp_path / "several", tmp_path / "alone")


def processes(job):
    """pid of each host's Python, by number."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(
                pair.split("=", 1) for pair in entry.read_text().split("\0") if "=" in pair
            )
            command = (entry.parent / "cmdline").read_text()
            is_of_job = os.getsid(int(entry.parent.name)) == job.pid
        except (OSError, ValueError):
            continue
        if is_of_job and "experiments.distill" in command and "local_hosts" not in command:
            found[int(variables["DISTILLSPEC_HOST"])] = int(entry.parent.name)
    return found


def wait_for(job, words):
    for line in job.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came")


LONG = ("--config.steps=100000", "--config.loop.log_every=0")


def stopped_at(tmp_path, out):
    """The step that the hosts stopped at, which is saved."""
    step = int(re.search(r"stopped at step (\d+), all saved", out)[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    return step


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [1, 3])
def test_one_host_told_to_stop_stops_all_and_all_is_saved(start, tmp_path, save_every):
    job = start("run", 2, 1, {"data": 2}, *LONG, f"--config.loop.save_every={save_every}")
    wait_for(job, "distill: ")
    time.sleep(6)
    os.kill(processes(job)[1], signal.SIGTERM)
    stopped_at(tmp_path, finish(job, 143))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_terminal_tells_all_processes_stops_the_hosts_and_all_is_saved(
    start, tmp_path, number
):
    """Those that mark the lines as well, and the script itself in the middle of its sleep."""
    job = start("run", 2, 1, {"data": 2}, *LONG, "--config.loop.save_every=100000")
    wait_for(job, "distill: ")
    time.sleep(6)
    os.killpg(job.pid, number)
    assert stopped_at(tmp_path, finish(job, 143)) > 0


NAMED = (  # how the engine names host 0, which all others ask, and how host 1
    re.compile("leader task was preempted/died"),
    re.compile(r"tasks are unhealthy \(stopped sending heartbeats\):\n(\[0\] )?1\n"),
)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_host_that_dies_ends_the_others_in_time(start, victim):
    job = start("run", 2, 1, {"data": 2}, *LONG, DISTILLSPEC_HOSTS_TIMEOUT="10")
    wait_for(job, "distill: ")
    time.sleep(6)
    os.kill(processes(job)[victim], signal.SIGKILL)
    died = time.monotonic()
    out, _ = job.communicate(timeout=60)
    assert time.monotonic() - died < 10 + 15
    assert job.returncode not in (0, None)
    assert NAMED[victim].search(out), out[-3000:]


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


MEETING = """
import pathlib, sys, time
import jax
from distillspec_jax import hosts
from distillspec_jax.errors import UserError
from experiments import door

def late(host):
    time.sleep(90 * (jax.process_index() == host))

def bad():
    raise UserError("bad \u2713")

def split():
    mesh = jax.make_mesh((2,), ("data",))
    return jax.device_put(jax.numpy.arange(2.0), jax.NamedSharding(mesh, jax.P("data")))

def meet():
    hosts.initialize(pathlib.Path(sys.argv[1]))
    rows = split()
    assert list(hosts.fetch(rows)) == [0, 1]
    print("met", flush=True)
    {}

door._among_hosts(meet)
"""


@pytest.fixture
def meet(environment, tmp_path):
    """Starts two hosts of a device each that meet and then do something."""
    started = []

    def meet(then, limit):
        for host in range(2):
            variables = environment(
                1,
                DISTILLSPEC_HOSTS="2",
                DISTILLSPEC_HOST=str(host),
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                DISTILLSPEC_HOSTS_TIMEOUT=str(limit),
            )
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", MEETING.format(then), str(tmp_path)],
                    cwd=ROOT,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for job in started:
            wait_for(job, "met")
        return started

    port = free_port()
    yield meet
    for job in started:
        job.kill()
        job.communicate()


@pytest.mark.parametrize(
    ("then", "missing"),
    [
        ("hosts.on_first(lambda: late(0))", 0),
        ("late(1); hosts.all_true(True)", 1),
        pytest.param("late(1); hosts.on_first(int)", 1, marks=pytest.mark.slow),
        pytest.param("late(0); hosts.fetch(rows)", 0, marks=pytest.mark.slow),
    ],
)
def test_a_host_that_lives_but_does_not_come_is_named(meet, then, missing):
    started = meet(then, limit=4)
    began = time.monotonic()
    out, _ = started[1 - missing].communicate(timeout=60)
    assert started[1 - missing].returncode == hosts.LOST, out
    assert f"error: host {missing} of 2 did not come within 4 seconds; look at" in out
    assert time.monotonic() - began < 4 + 15


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_host_that_dies_is_named(meet, victim):
    """The next collective then fails at once, and the engine names the host a little later."""
    together = "hosts.multihost_utils.sync_global_devices('there')"
    started = meet(f"late({victim}); time.sleep(2); {together}", limit=5)
    started[victim].kill()
    died = time.monotonic()
    out, _ = started[1 - victim].communicate(timeout=60)
    assert time.monotonic() - died < 5 + 15
    assert started[1 - victim].returncode not in (0, hosts.FAILED)
    assert NAMED[victim].search(out), out[-3000:]


@pytest.fixture
def run_first(environment, config_file, tmp_path):
    """Runs host 0 of several, and no other, at a port of its machine."""

    def run_first(count, port, **more):
        variables = environment(
            1,
            DISTILLSPEC_HOSTS=str(count),
            DISTILLSPEC_HOST="0",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            **more,
        )
        arguments = [f"--config={config_file('distill')}", f"--workdir={tmp_path / 'run'}"]
        return subprocess.run(
            [sys.executable, "-m", "experiments.distill", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run_first


def test_a_host_that_does_not_come_is_named(run_first):
    done = run_first(3, free_port(), DISTILLSPEC_HOSTS_TIMEOUT="2")
    assert done.returncode == hosts.LOST
    assert "error: hosts 1, 2 of 3 did not come within 2 seconds" in done.stderr


@pytest.mark.parametrize("port", [None, 70000])
def test_a_port_that_host_0_cannot_have_is_told(run_first, tmp_path, port):
    with socket.create_server(("localhost", 0)) as taken:
        port = port or taken.getsockname()[1]
        done = run_first(2, port)
    assert done.returncode == 2
    expected = f"error: host 0 cannot listen on port {port} of JAX_COORDINATOR_ADDRESS ("
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start_apart(environment):
    """Starts two hosts of `distill`, each with flags of its own and in a folder of its own."""
    started = []

    def start_apart(flags, folders=(ROOT, ROOT), **more):
        port = free_port()
        for host in range(2):
            variables = environment(
                1,
                DISTILLSPEC_HOSTS="2",
                DISTILLSPEC_HOST=str(host),
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                PYTHONPATH=str(ROOT),
                **more,
            )
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.distill", *flags[host]],
                    cwd=folders[host],
                    env=variables,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start_apart
    for job in started:
        job.kill()
        job.communicate()


def test_hosts_with_folders_of_their_own_are_told(start_apart, config_file, tmp_path):
    (tmp_path / "1" / hosts.ARRIVALS).mkdir(parents=True)
    left = tmp_path / "1" / hosts.ARRIVALS / hosts.SHARED
    left.write_text("")  # by a start that was ended
    config = f"--config={config_file('distill')}"
    flags = [[config, f"--workdir={tmp_path / str(host)}"] for host in range(2)]
    started = start_apart(flags, DISTILLSPEC_HOSTS_TIMEOUT="10")
    for host, job in enumerate(started):
        _, err = job.communicate(timeout=100)
        assert job.returncode == 2, err
        assert f"error: --workdir={tmp_path / str(host)} is not one folder that all" in err
        assert [path.name for path in (tmp_path / str(host)).iterdir()] == [hosts.ARRIVALS]


def test_hosts_that_would_not_do_the_same_are_told(start_apart, config_file, tmp_path):
    """They would wait for each other for ever, or train on two orders of the data."""
    both = [f"--config={config_file('distill', mesh={'data': 2})}", f"--workdir={tmp_path / 'run'}"]
    for job in start_apart([both, [*both, "--config.seed=4"]]):
        _, err = job.communicate(timeout=100)
        assert job.returncode == 2, err
        assert "started alike: config.seed is 3 on host 0 and 4 on host 1; start all with" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [hosts.ARRIVALS]


def test_hosts_with_other_data_behind_a_path_are_told(start_apart, config_file, stories, tmp_path):
    lines = (stories / "train.jsonl").read_text().splitlines(keepends=True)
    folders = [tmp_path / "here", tmp_path / "there"]
    for count, folder in enumerate(folders):
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(lines[count:]))
    changes = {"mesh": {"data": 2}, "task__train_file": "train.jsonl"}
    flags = [f"--config={config_file('distill', **changes)}", f"--workdir={tmp_path / 'run'}"]
    for job in start_apart([flags, flags], folders):
        _, err = job.communicate(timeout=200)
        assert job.returncode == 2, err
        assert "started alike: sources.data of 'train' is " in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [hosts.ARRIVALS]


def test_an_error_of_the_first_host_is_of_its_kind_on_all(meet):
    """A fault of the file system may pass, bad input does not: jobs are started again by that."""
    told = "print(type(e).__name__, e.args[0], e.filename, flush=True)"
    then = f"""
    try: hosts.on_first(lambda: open("/dev/null/nothing"))
    except OSError as e: {told}
    try: hosts.on_first(bad)
    except UserError as e: print(type(e).__name__, e, flush=True)
    try: hosts.check_same({{"path": "x" * 200 + str(jax.process_index())}})
    except UserError as e: print(e, flush=True)
    print(hosts.of_first(jax.process_index() + 7), flush=True)
    """
    for job in meet(then, limit=20):
        out, _ = job.communicate(timeout=60)
        assert job.returncode == 0, out
        *_, system, user, differing, first = out.splitlines()
        assert re.search('path is "x+0" on host 0 and "x+1" on host 1; start', differing)
        assert system == "NotADirectoryError 20 /dev/null/nothing"
        assert (user, first) == ("UserError bad \u2713", "7")


def test_a_file_is_no_workdir_of_several_hosts(tmp_path):
    (tmp_path / "file").write_text("mine")
    variables = {"DISTILLSPEC_HOSTS": "auto", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    with pytest.raises(UserError, match="file is a file, must be a folder"):
        hosts.initialize(tmp_path / "file", variables)
    assert (tmp_path / "file").read_text() == "mine"


def test_auto_outside_a_cluster_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def no_cluster(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(UserError, match=r"detects no cluster here \(coord.*; give the number"):
        hosts.initialize(tmp_path / "runs" / "run", {"DISTILLSPEC_HOSTS": "auto"})
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({}, True),
        ({"DISTILLSPEC_HOSTS": "1"}, True),
        ({"DISTILLSPEC_HOSTS": "2"}, False),
        ({"DISTILLSPEC_HOSTS": "auto", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),
        ({"DISTILLSPEC_HOSTS": "auto", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
        ({"DISTILLSPEC_HOSTS": "auto"}, False),  # a cluster that does not say how many
    ],
)
def test_an_entrypoint_of_one_host_runs_where_there_is_one(tmp_path, monkeypatch, variables, alone):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    if alone:
        door._join_hosts(tmp_path / "run", on_hosts=False)
    else:
        with pytest.raises(UserError, match="runs on one host, and DISTILLSPEC_HOSTS is"):
            door._join_hosts(tmp_path / "run", on_hosts=False)
    assert not (tmp_path / "run").exists()


def arrive(folder, ages):
    for name, age in ages.items():
        (folder / name).write_text("")
        os.utime(folder / name, (1e9 - age, 1e9 - age))


def test_hosts_of_an_earlier_start_are_not_counted_as_here(tmp_path):
    arrive(tmp_path, {"0": 0, "1": 900, "2": 3, "3": 6})  # host 3 gave up a second before 0 came
    assert hosts._missing(tmp_path, "0", 5, 5).startswith("hosts 1, 3, 4 of 5 did not come within")
    assert hosts._missing(tmp_path, "0", None, 5).startswith("only 0, 2 came within 5")


class Left(BaseException):
    """What `os._exit` raises in a test."""


def leave(code):
    raise Left(code)


def test_a_host_that_met_the_others_is_missed_at_a_quick_restart(tmp_path, monkeypatch, capsys):
    variables = {"DISTILLSPEC_HOSTS": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    for host in ("0", "1"):
        hosts.initialize(tmp_path, variables | {"DISTILLSPEC_HOST": host})

    def wait(**_):
        hosts._give_up(tmp_path / hosts.ARRIVALS, "0", 2, 300)

    monkeypatch.setattr(jax.distributed, "initialize", wait)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match=str(hosts.LOST)):
        hosts.initialize(tmp_path, variables | {"DISTILLSPEC_HOST": "0"})
    assert "error: host 1 of 2 did not come within 300 seconds" in capsys.readouterr().err


def test_a_wait_ends_even_if_nobody_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match=str(hosts.LOST)):
        hosts._give_up(tmp_path, "0", 2, 300)
    assert "error: not all hosts came within 300 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_PROCID": "11", "SLURM_NTASKS": "16"}, ("11", 16)),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, ("2", 4)),
        (
            {
                "TPU_WORKER_ID": "1",
                "TPU_WORKER_HOSTNAMES": "a,b",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_NUM_SLICES": "3",
            },
            ("5", 6),
        ),
        ({"SLURM_PROCID": "11"}, (socket.gethostname(), None)),
    ],
)
def test_a_cluster_tells_the_number_of_a_process(tmp_path, monkeypatch, variables, found):
    """Several tasks of a node share its name."""
    seen = []
    monkeypatch.setattr(hosts, "_give_up", lambda *arguments: seen.append(arguments[1:3]))
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(1.5))
    variables |= {"DISTILLSPEC_HOSTS": "auto", "DISTILLSPEC_HOSTS_TIMEOUT": "1"}
    hosts.initialize(tmp_path, variables)
    assert seen == [found]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", hosts.LOST, "lost each other"),
        ("DEADLINE_EXCEEDED: Barrier timed out", hosts.LOST, "lost each other"),
        ("UNKNOWN: Gloo all-reduce failed: closed", hosts.LOST, "lost each other"),
        ("INTERNAL: NCCL operation ncclAllReduce failed", hosts.LOST, "lost each other"),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.",
            1,
            "host 0 is out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.); ",
        ),
        ("INTERNAL: NCCL operation failed: Cuda failure 'out of memory'", 1, "--plan"),
        ("INVALID_ARGUMENT: Incompatible shapes", 1, "Traceback"),
    ],
)
def test_only_what_breaks_between_hosts_is_their_loss(monkeypatch, capsys, text, code, words):
    slept = []

    def action():
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(Left, match=f"^{code}$"):
        door._among_hosts(lambda: door._or_exit(action))
    assert words in capsys.readouterr().err
    assert slept == [310] * (code == hosts.LOST)  # the engine's heartbeat has the last word


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection reset by peer", hosts.LOST, "lost each other"),
        ("no connection between these two", hosts.FAILED, "Traceback"),
    ],
)
def test_a_value_error_is_a_loss_if_it_is_gloo_s(monkeypatch, capsys, text, code, words):
    """A CPU's collectives raise it, where they fail as they begin; our own code does, too."""

    def action():
        raise ValueError(text)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match=f"^{code}$"):
        door._among_hosts(action)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables",
    [
        {"DISTILLSPEC_HOSTS": "two"},
        {"DISTILLSPEC_HOSTS": "2"},
        {"DISTILLSPEC_HOSTS": "2", "DISTILLSPEC_HOST": "1"},
        {"DISTILLSPEC_HOSTS": "2", "DISTILLSPEC_HOST": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
        {"DISTILLSPEC_HOSTS": "2", "DISTILLSPEC_HOST": "1", "JAX_COORDINATOR_ADDRESS": "a"},
        {"DISTILLSPEC_HOSTS": "2", "DISTILLSPEC_HOST": "1", "JAX_COORDINATOR_ADDRESS": "a:b"},
        {"DISTILLSPEC_HOSTS": "auto", "DISTILLSPEC_HOSTS_TIMEOUT": "soon"},
        {"DISTILLSPEC_HOSTS": "auto", "DISTILLSPEC_HOSTS_TIMEOUT": "99999999999"},
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(tmp_path, variables):
    with pytest.raises(UserError, match="DISTILLSPEC_HOST"):
        hosts.initialize(tmp_path / "run", variables)
    assert not (tmp_path / "run").exists()


def test_alone_there_is_nothing_to_join(tmp_path):
    hosts.initialize(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    assert hosts.is_first()
    assert hosts.all_true(True)
    assert not hosts.all_true(False)
    assert hosts.on_first(lambda: 3) == 3
