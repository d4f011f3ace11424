"""The scripts of launch/: which Python, what is installed when, which stages with which flags."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.configs import quickstart
from experiments.distill import DistillConfig
from experiments.evaluate import EvaluateConfig
from experiments.schema import to_dataclass

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    ROOT / "launch" / "slurm.sbatch",
    ROOT / ".ci" / "run",
]
SOURCED = ("environment.sh", "xla_flags.sh", "slurm.sbatch")  # by a script, or by sbatch

# Stands in for Python: notes what it is asked to do, and fails where $FAIL occurs in it.
FAKE = """#!/usr/bin/env bash
case "$1" in
  -c) [ "$2" = 'import pip' ] || echo "${VERSION:-3.11}"; exit 0 ;;
  --version) echo "Python ${VERSION:-3.11}.7"; exit 0 ;;
esac
echo "$*" >>"$LOG"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python"
fi
if [ -n "${FAIL:-}" ] && [[ "$*" == *"$FAIL"* ]]; then exit 7; fi
"""


TOOLS = ("bash", "env", "cat", "cksum", "cp", "dirname", "ls", "mkdir", "sed", "tee", "touch")


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts in a project where the fake is the only Python."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "setup.py").write_text("# version 1\n")
    (folder / "pyproject.toml").write_text("")
    executable(tmp_path / "bin" / "python3.11", FAKE)
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return folder


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run(project, tmp_path):
    """Runs a command line in the project: the process, with the fake's notes as `.log`."""
    log = tmp_path / "log"

    def run(command, **variables):
        log.write_text("")
        environment = {
            "PATH": str(tmp_path / "bin"),
            "HOME": str(tmp_path / "home"),
            "LOG": str(log),
            **variables,
        }
        done = subprocess.run(
            ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True
        )
        done.log = log.read_text().splitlines()
        return done

    return run


def shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")  # where pip puts it
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(not shellcheck(), reason="shellcheck comes with the extra 'dev'")
def test_scripts_pass_shellcheck():
    files = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    done = subprocess.run([shellcheck(), "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_executed():
    for path in SCRIPTS:
        assert bool(path.stat().st_mode & stat.S_IXUSR) != (path.name in SOURCED), path


def test_a_python_that_does_not_run_is_passed_over(run, tmp_path):
    """As pyenv's shims are: on the path, but of a version that is not active."""
    executable(tmp_path / "bin" / "python3.12", "#!/bin/sh\nexit 127\n")
    done = run("source launch/environment.sh; find_python 3.12 3.11")
    assert done.stdout.strip() == str(tmp_path / "bin" / "python3.11")


def test_the_newest_python_comes_first(run, tmp_path):
    executable(tmp_path / "bin" / "python3.12", FAKE.replace("3.11", "3.12"))
    done = run("source launch/environment.sh; find_python 3.12 3.11")
    assert done.stdout.strip() == str(tmp_path / "bin" / "python3.12")


def test_pyenv_versions_are_found_without_shims(run, tmp_path):
    (tmp_path / "bin" / "python3.11").unlink()
    path = tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python"
    executable(path, FAKE.replace("3.11", "3.12"))
    done = run("source launch/environment.sh; find_python 3.12 3.11")
    assert done.stdout.strip() == str(path)


def test_no_python_is_one_clear_sentence(run):
    done = run("bash launch/quickstart.sh", VERSION="3.9")
    assert done.returncode == 2
    assert "error: needs Python 3.12 or 3.11 and found none that runs" in done.stderr
    assert done.log == []


def test_installs_once_and_again_when_the_requirements_change(run, project):
    make = "source launch/environment.sh; make_environment '' && echo $python"
    first = run(make)
    assert [line.split()[1] for line in first.log] == ["venv", "pip"]
    assert first.log[1].endswith(f"--editable {project}")
    assert first.stdout.strip() == str(project / ".venv" / "bin" / "python")
    assert run(make).log == []
    (project / "setup.py").write_text("# version 2\n")
    assert [line.split()[1] for line in run(make).log] == ["pip"]
    assert run(make).log == []


def test_extras_have_their_own_stamp_and_include_the_base(run, project):
    make = "source launch/environment.sh; make_environment {}"
    run(make.format("dev"))
    assert run(make.format("''")).log == []
    assert run(make.format("dev")).log == []
    assert run(make.format("dev,peers")).log[0].endswith(f"--editable {project}[dev,peers]")


def test_a_version_has_an_environment_of_its_own(run, project):
    make = "source launch/environment.sh; make_environment '' 3.11"
    assert f"-m venv --clear {project}/.venv-3.11" in run(make).log
    elsewhere = run(make, DISTILLSPEC_VENV=str(project / "mine"))
    assert f"-m venv --clear {project}/mine" in elsewhere.log


def test_an_unfinished_environment_is_made_anew_but_nothing_else_is_cleared(run, project):
    make = "source launch/environment.sh; make_environment ''"
    (project / ".venv").mkdir()
    (project / ".venv" / "pyvenv.cfg").touch()
    assert run(make).log[0] == f"-m venv --clear {project}/.venv"
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").touch()
    done = run(make, DISTILLSPEC_VENV=str(project / "mine"))
    assert done.returncode == 2
    assert "holds files but no environment" in done.stderr
    assert (project / "mine" / "thesis.txt").exists()


def test_a_failed_installation_is_tried_again(run):
    make = "source launch/environment.sh; make_environment ''"
    done = run(make, FAIL="pip install")
    assert done.returncode == 2
    assert "the installation failed" in done.stderr
    assert len(run(make).log) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--quick", "unknown option --quick; known: --fast"),
        ("--seeds", "--seeds needs a value"),
        ("--seeds 0", "--seeds 0: give a number from 1"),
        ("--seeds two", "--seeds two: give a number from 1"),
        ("--python 3.10", "--python 3.10: the versions are 3.11 and 3.12"),
    ],
)
def test_bad_options_of_the_quickstart(run, arguments, words):
    done = run(f"bash launch/quickstart.sh {arguments}")
    assert done.returncode == 2
    assert f"error: {words}" in done.stderr
    assert done.log == []


def stages(log):
    """The entrypoints that were started: (module, config, workdir, other flags)."""
    found = []
    for line in log:
        _, _, module, *flags = line.split() if line.startswith("-u -m") else ("", "", "")
        if module:
            values = dict(flag.lstrip("-").split("=", 1) for flag in flags)
            config = values.pop("config", "").rpartition("/")[2]
            found.append((module, config, values.pop("workdir"), values))
    return found


def test_stages_of_the_quickstart(run):
    done = run("bash launch/quickstart.sh")
    assert done.returncode == 0, done.stderr
    folder = "runs/quickstart"
    assert stages(done.log) == [
        (
            "experiments.distill",
            "quickstart.py:distilled",
            f"{folder}/distilled",
            {"config.seed": "0"},
        ),
        ("experiments.distill", "quickstart.py:control", f"{folder}/control", {"config.seed": "0"}),
        ("experiments.evaluate", "quickstart.py:evaluate,seeds=1", folder, {}),
        ("experiments.report", "", folder, {}),
    ]
    assert "[1/4] distil the draft, seed 0 (0:0" in done.stdout
    assert "[4/4] write the report" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("", "runs/quickstart"),
        ("--seeds 3", "runs/quickstart"),
        ("--fast --seeds 2", "runs/quickstart-fast"),
        ("--from-scratch --fast", "runs/quickstart-fast-scratch"),
    ],
)
def test_what_is_evaluated_is_what_was_trained(run, arguments, folder):
    """The paths are written twice, in the script and in the config: they must agree."""
    started = stages(run(f"bash launch/quickstart.sh {arguments}").log)
    configs = {}
    for module, config, workdir, flags in started:
        if config.startswith("quickstart.py"):
            cls = EvaluateConfig if module.endswith("evaluate") else DistillConfig
            values = quickstart.get_config(config.partition(":")[2])
            configs[workdir] = to_dataclass(cls, values, "config"), flags
    evaluated = configs.pop(folder)[0]
    trained = {workdir for module, _, workdir, _ in started if "finetune" in module}
    drafts = {draft.path: draft for draft in evaluated.drafts}
    for workdir, (config, flags) in configs.items():
        name = "distilled" if config.recipe.name == "distillspec" else "control"
        assert (drafts[workdir].name, drafts[workdir].seed) == (name, int(flags["config.seed"]))
        assert config.target == evaluated.target
        assert config.draft == evaluated.drafts[0].path
    shallow = f"{folder}/shallow"  # what the target grows from
    expected = {shallow, evaluated.target, evaluated.drafts[0].path} if trained else set()
    assert trained == expected
    assert set(drafts) == {*configs, evaluated.drafts[0].path}
    assert evaluated.drafts[0].name == "finetuned"
    assert evaluated.drafts[-1].name == "distilled"


def test_fast_is_smaller():
    slow, fast = (quickstart.get_config(f"distilled{option}") for option in ("", ",fast"))
    assert fast.steps < slow.steps / 5
    slow, fast = (quickstart.get_config(f"evaluate{option}") for option in ("", ",fast"))
    assert fast.num_prompts < slow.num_prompts


def test_unknown_options_of_the_config_are_refused():
    wrong = ("distilled,fsat", "evaluated", "evaluate,seeds=2,slow", "evaluate,seeds=x")
    for options in (*wrong, "evaluate,seeds=0"):
        with pytest.raises(ValueError, match=r"unknown option in .*, seeds=NUMBER from 1"):
            quickstart.get_config(options)


def test_the_quickstart_stops_where_a_stage_fails(run):
    done = run("bash launch/quickstart.sh", FAIL="quickstart.py:control")
    assert done.returncode == 7
    assert [module for module, *_ in stages(done.log)] == ["experiments.distill"] * 2


def checks(log):
    return [line for line in log if line.startswith("-m") and "pip" not in line][-3:]


@pytest.mark.parametrize("script", ["bash launch/test.sh", ".ci/run"])
def test_all_checks_run_and_pytest_is_the_last(run, project, script):
    done = run(f"{script} --slow -k name")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in checks(done.log)] == ["ruff", "mypy", "pytest"]
    assert done.log[-1].endswith("--slow -k name")
    assert done.log[1].endswith(f"{project}[dev]")


@pytest.mark.parametrize(("broken", "code"), [("ruff", 1), ("mypy", 1), ("pytest", 7)])
def test_any_broken_check_fails_and_the_others_still_run(run, broken, code):
    done = run("bash launch/test.sh", FAIL=f"-m {broken}")
    assert done.returncode == code
    assert len(checks(done.log)) == 3


def test_options_of_the_checks(run, project):
    done = run("bash launch/test.sh --peers --python 3.11")
    assert f"-m venv --clear {project}/.venv-3.11" in done.log
    assert f"{project}[dev,peers]" in done.log[1]
    done = run("bash launch/test.sh --gpu --slow")
    assert any(line.endswith(f"{project}[dev,cuda]") for line in done.log)
    assert done.log[-1].endswith("-n 0 -m gpu --slow")
    assert "--slow" in run("bash launch/test.sh --help").stdout
    assert "--seeds" in run("bash launch/quickstart.sh --help").stdout


def test_nothing_but_bash_and_the_usual_tools_is_needed():
    """macOS has bash 3.2 and tools of its own."""
    for path in SCRIPTS:
        text = path.read_text()
        for unusual in ("declare -A", "readlink -f", "sed -i", "mapfile", "${,,}"):
            assert unusual not in text, (path.name, unusual)
