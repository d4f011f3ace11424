"""The launchers of clusters: what they would run, with which flags, and the JobSet's schema."""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "tests" / "golden" / "jobset_schema.json").read_text())
FLAGS = ["--config=experiments/configs/a.py:b,c", "--workdir=/mnt/bucket/a run", "--config.x='y'"]

# Stands in for Python: says what it was given, waits or fails as the flags ask for.
FAKE = """#!/usr/bin/env bash
case "$*" in
  "-c import sys"*) echo 3.11; exit ;;
  "-c import socket"*) echo 4711; exit ;;
  "-c"* | "-m pip"*) exit ;;
  "--version") echo Python 3.11.7; exit ;;
esac
echo "$DISTILLSPEC_HOST of $DISTILLSPEC_HOSTS at $JAX_COORDINATOR_ADDRESS: $*"
for flag in "$@"; do
  case "$flag" in "--after="*) until [ -e "${flag#*=}" ]; do :; done ;; esac
  if [ "$flag" = "--fail=$DISTILLSPEC_HOST" ]; then exit 7; fi
  if [ "$flag" = "--stop=$DISTILLSPEC_HOST" ]; then exit 143; fi
  if [ "$flag" = "--wait" ]; then echo "pid $$"; exec sleep 60; fi
done
"""


def run(script, *arguments, **variables):
    command = ["bash", f"launch/{script}", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def venv(tmp_path):
    """An environment whose Python is the fake."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    return str(tmp_path / "venv")


def test_a_pod_gets_the_commit_and_the_flags_on_all_workers():
    done = run("tpu_pod.sh", "--dry-run", "my-v5e", "us-west4-a", "distill", *FLAGS)
    assert done.returncode == 0, done.stderr
    archive, copy, command = done.stdout.split("\n", 2)
    path = re.fullmatch(r"git archive --output=(\S+\.tar\.gz) HEAD", archive)[1]
    assert copy.startswith(f"gcloud compute tpus tpu-vm scp {path} ")
    assert copy.endswith("my-v5e: --zone=us-west4-a --worker=all")
    assert command.startswith(
        "gcloud compute tpus tpu-vm ssh my-v5e --zone=us-west4-a --worker=all"
    )
    last = command.strip().splitlines()[-1]
    assert shlex.split(last)[-len(FLAGS) :] == FLAGS  # quoted for the shell on the other side
    assert 'DISTILLSPEC_HOSTS=auto exec "$python" -m experiments.distill' in last


def test_the_command_of_a_pod_is_shell():
    done = run("tpu_pod.sh", "--dry-run", "my-v5e", "us-west4-a", "distill", *FLAGS)
    command = done.stdout.partition("--command=")[2]
    checked = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_an_entrypoint_of_a_pod_without_flags_gets_none():
    done = run("tpu_pod.sh", "--dry-run", "my-v5e", "us-west4-a", "evaluate")
    assert done.stdout.endswith(" -m experiments.evaluate\n")


def test_a_pod_keeps_nothing_of_the_commit_before(tmp_path):
    """All that Python could import or a shell run; environment and runs stay."""
    done = run("tpu_pod.sh", "--dry-run", "pod", "zone", "distill")
    command = done.stdout.partition("--command=")[2]
    unpacking = command[: command.index("  rm ../")]
    archive = re.search(r"tar -xzf (\S+)", unpacking)[1]
    place = tmp_path / "distillspec_jax"
    for folder in ("distillspec_jax/distillspec_jax", "distillspec_jax/experiments", "new/launch"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("distillspec_jax/gone.py", "experiments/gone.py", "kept"):
        (place / name).write_text("")
    sent = str(place / archive)
    subprocess.run(["tar", "-C", tmp_path / "new", "-czf", sent, "launch"], check=True)
    subprocess.run(["bash", "-c", unpacking], cwd=tmp_path, check=True)
    assert sorted(path.name for path in place.iterdir()) == ["kept", "launch"]


# Stands in for git and gcloud: makes the archive, and notes what is there when it is sent.
SENDER = """#!/usr/bin/env bash
case "$1" in
  archive) echo "the commit" >"${2#--output=}" ;;
  *) echo "$*"; for word in "$@"; do if [ -f "$word" ]; then cat "$word"; fi; done ;;
esac
if [ "${4:-}" = "${FAIL:-none}" ]; then exit 7; fi
"""


@pytest.mark.parametrize(("fail", "code"), [("", 0), ("scp", 7)])
def test_launches_of_pods_do_not_share_an_archive_and_leave_none(tmp_path, fail, code):
    for name in ("git", "gcloud"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(SENDER)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tmp").mkdir()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    names = set()
    for _ in range(2):
        variables = {"PATH": path, "TMPDIR": str(tmp_path / "tmp"), "FAIL": fail}
        done = run("tpu_pod.sh", "pod", "zone", "distill", **variables)
        assert done.returncode == code, done.stderr
        assert "\nthe commit\n" in done.stdout
        sent = re.search(r"scp \S+/(\S+\.tar\.gz) pod: ", done.stdout)[1]
        assert fail or f"tar -xzf ../{sent}\n  rm ../{sent}\n" in done.stdout
        names.add(sent)
    assert len(names) == 2
    assert os.listdir(tmp_path / "tmp") == []


def test_slurm_starts_one_process_per_gpu_with_the_flags():
    done = run("slurm.sbatch", "--dry-run", "distill", *FLAGS, DISTILLSPEC_VENV="/venv")
    assert done.returncode == 0, done.stderr
    expected = "srun --kill-on-bad-exit=1 /venv/bin/python -m experiments.distill"
    assert shlex.split(done.stdout) == [*expected.split(), *FLAGS]
    options = re.findall(
        r"^#SBATCH --([a-z-]+)=?(\S*)", (ROOT / "launch/slurm.sbatch").read_text(), re.M
    )
    options = dict(options)
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    # a job that is stopped saves itself and is put into the queue again
    assert "requeue" in options
    assert options["signal"].startswith("TERM@")


def test_slurm_hands_the_cores_of_a_process_to_srun(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\necho "cores: ${SRUN_CPUS_PER_TASK:-none}"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("slurm.sbatch", "distill", PATH=path, SLURM_CPUS_PER_TASK="8")
    assert done.stdout == "cores: 8\n"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_pod.sh", ["--dry-run", "name", "zone"]),
        ("slurm.sbatch", ["--dry-run"]),
        ("local_hosts.sh", ["2"]),
        ("local_hosts.sh", ["none", "distill"]),
    ],
)
def test_missing_arguments_are_refused(script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_local_hosts_prints_what_it_would_run(venv):
    done = run("local_hosts.sh", "--dry-run", "3", "distill", *FLAGS, DISTILLSPEC_VENV=venv)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "DISTILLSPEC_HOSTS=3 DISTILLSPEC_HOST=2" in lines[2]
    assert all(shlex.split(line)[-5:] == ["-m", "experiments.distill", *FLAGS] for line in lines)


def test_local_hosts_are_marked_and_meet_at_one_address(venv):
    done = run("local_hosts.sh", "2", "distill", "--a=b c", DISTILLSPEC_VENV=venv)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"[{host}] {host} of 2 at localhost:4711: -m experiments.distill --a=b c"
        for host in range(2)
    ]


def test_one_failed_host_stops_the_others(venv):
    done = run("local_hosts.sh", "3", "distill", "--fail=1", "--wait", DISTILLSPEC_VENV=venv)
    assert done.returncode == 7
    for pid in map(int, re.findall(r"pid (\d+)", done.stdout)):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_failure_is_not_hidden_by_a_host_that_stops_beside_it(venv, tmp_path):
    """Both end while the script sleeps: host 0 with 7, host 1 as one that was told to stop."""
    sleep, go = tmp_path / "sleep", tmp_path / "go"
    sleep.write_text(f"#!/usr/bin/env bash\ntouch {go}\nexec {shutil.which('sleep')} 0.5\n")
    sleep.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    flags = [f"--after={go}", "--fail=0", "--stop=1"]
    done = run("local_hosts.sh", "2", "distill", *flags, PATH=path, DISTILLSPEC_VENV=venv)
    assert done.returncode == 7


@pytest.fixture(scope="module")
def jobset():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    values = dict(NAME="distil-1", IMAGE="image", WORKERS="16", ACCELERATOR="tpu-v5-lite-podslice")
    values |= dict(TOPOLOGY="8x8", BUCKET="my-bucket", ENTRYPOINT="distill")
    values |= dict(FLAGS="--workdir=/bucket/run")
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(values)
    return yaml.safe_load(string.Template(text).substitute(values))


def problems(value, schema, where="jobset"):
    """What is wrong with a value, by the schema; nothing if all is well."""
    kinds = {"string": str, "integer": int}
    if "type" in schema and type(value) is not kinds[schema["type"]]:
        return [f"{where} is {value!r}, no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where} is {value!r}, none of {schema['enum']}"]
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        return [f"{where} is {value!r}, not like {schema['pattern']}"]
    if "items" in schema:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        items = enumerate(value)
        return [p for i, v in items for p in problems(v, schema["items"], f"{where}[{i}]")]
    if "properties" not in schema and "values" not in schema:
        return []
    if not isinstance(value, dict):
        return [f"{where} is no mapping"]
    missing = set(schema.get("required", ())) - set(value)
    found = [f"{where} has no {key}" for key in sorted(missing)]
    for key, inner in value.items():
        known = schema["values"] if "values" in schema else schema["properties"].get(key)
        inner_problems = [f"{where}.{key} is unknown"]
        if known is not None:
            inner_problems = problems(inner, known, f"{where}.{key}")
        found += inner_problems
    return found


def test_jobset_fits_the_schema(jobset):
    assert problems(jobset, SCHEMA) == []


def by_published_models(document):
    """What they make of it: without what they do not know, with what is missing, or None."""
    try:
        return JobsetV1alpha2JobSet.from_dict(document).to_dict()
    except ValueError:
        return None


def test_jobset_fits_the_published_models(jobset):
    assert by_published_models(jobset) == jobset


BROKEN = pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["kind"], "Jobset", "none of ['JobSet']"),
        (["metadata", "name"], "Distil_1", "not like"),
        (["spec", "replicatedJobs", 0, "replica"], 1, "replica is unknown"),
        (["spec", "replicatedJobs", 0, "template", "spec", "completions"], "16", "no integer"),
        (["spec", "failurePolicy", "rules", 0, "action"], "Fail", "none of"),
        (["spec", "replicatedJobs"], {}, "is no list"),
    ],
)


def changed(jobset, path, value):
    broken = json.loads(json.dumps(jobset))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return broken


@BROKEN
def test_the_schema_refuses_what_is_wrong(jobset, path, value, words):
    assert any(words in problem for problem in problems(changed(jobset, path, value), SCHEMA))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "replicatedJobs", 0, "replica"], 1),
        (["spec", "replicatedJobs", 0, "template", "spec", "completions"], "16"),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeselector"], {}),
        (["spec", "failurePolicy", "rules", 0], {"action": "FailJobSet"}),
    ],
)
def test_the_published_models_refuse_what_is_wrong(jobset, path, value):
    broken = changed(jobset, path, value)
    assert by_published_models(broken) != broken


def test_jobset_runs_one_indexed_worker_per_host_and_does_not_retry_bad_input(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    assert job["completionMode"] == "Indexed"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    [container] = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["command"][-1].endswith("-m experiments.distill --workdir=/bucket/run")
    [volume] = job["template"]["spec"]["volumes"]
    [mount] = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/bucket"}
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket",
        # else gcsfuse renames no folder that holds something, and no checkpoint is committed
        "mountOptions": "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0",
    }
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    checked = subprocess.run(["bash", "-n"], input=container["command"][-1], text=True)
    assert checked.returncode == 0


def test_gpu_flags_are_known_to_this_jax():
    """XLA ends the process at a flag that it does not know."""
    script = 'source launch/xla_flags.sh; xla_flags gpu; export JAX_PLATFORMS=cpu; exec "$0" -c '
    script += "'import jax; print(jax.devices())'"
    done = subprocess.run(
        ["bash", "-c", script, sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_flags_of_the_user_come_last_and_win():
    script = "source launch/xla_flags.sh; xla_flags tpu; echo $LIBTPU_INIT_ARGS"
    environment = {**os.environ, "LIBTPU_INIT_ARGS": "--mine=1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == "--mine=1"
    assert len(done.stdout.split()) > 3
