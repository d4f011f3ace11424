"""Kills a run at random moments, during saves, too, and shows that nothing of it is lost.

    python -m experiments.faults --workdir=runs/faults --kills=50 --terms=20

One `distill` is left alone; another is ended again and again by SIGKILL or SIGTERM at a random
step and started again. In the end both must have the same bits: weights, optimiser, average,
records. Started again, this command goes on with the interruptions that are left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from distillspec_jax.errors import UserError
from distillspec_jax.files import json_object
from distillspec_jax.progress import Progress
from distillspec_jax.run_folders import FOLDER
from distillspec_jax.training.metrics import JSONL
from experiments import distill, door, planning, schema
from experiments.configs.faults import get_config
from experiments.workdir import SUMMARY, write_json

_KILLS = flags.DEFINE_integer("kills", 50, "SIGKILLs", lower_bound=0)
_TERMS = flags.DEFINE_integer("terms", 20, "SIGTERMs", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 1000, "steps of the run", lower_bound=100)
_SEED = flags.DEFINE_integer("faults_seed", 0, "of the moments")

CONFIG = "experiments/configs/faults.py"
INTERRUPTIONS, REPORT = "interruptions.json", "faults.json"
CLOCKS = ("wall_time", "seconds", "compile_seconds", "tokens_per_second")
SAVE_SECONDS = 0.1  # about what a save takes: a random part of it passes before the signal
EARLY_EVERY, EARLY_SECONDS = 5, 8.0  # which kills may fall into a start, and what it takes
_MARGIN = 40  # steps at the end without interruptions
START_SECONDS = 300.0  # a start that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Interruption:
    """One end before the end.

    `began`: the step that the life went on from; `saved`: newest whole checkpoint at its end;
    `in_save`: whether a save was being written at that moment.
    """

    kind: str
    began: int
    saved: int
    in_save: bool


def main() -> int | None:
    workdir = Path(flags.FLAGS.workdir or "").absolute()
    if not flags.FLAGS.workdir:
        raise UserError("--workdir=FOLDER is missing; see --help")
    workdir.mkdir(parents=True, exist_ok=True)
    kinds = ["SIGKILL"] * _KILLS.value + ["SIGTERM"] * _TERMS.value
    random.Random(_SEED.value).shuffle(kinds)
    _run(workdir / "alone", log=workdir / "alone.log")
    done = _load(workdir)
    with Progress("faults", len(kinds), done=len(done), unit="interruption") as progress:
        for number in range(len(done), len(kinds)):
            done.append(_interrupt(workdir, kinds[number], number, done, len(kinds)))
            write_json(workdir / INTERRUPTIONS, [dataclasses.asdict(each) for each in done])
            progress.update(number + 1, f"{kinds[number]} at step {done[-1].saved}")
    _run(workdir / "interrupted", log=workdir / "interrupted.log")
    return _report(workdir, done)


def plan(memory_gib: float | None) -> int | None:
    """Says what the run that is interrupted holds."""
    config = schema.to_dataclass(distill.DistillConfig, get_config(), "config")
    return planning.planner(distill.prepare, planning.trial)(config, memory_gib)


def _load(workdir: Path) -> list[Interruption]:
    try:
        stored = json.loads((workdir / INTERRUPTIONS).read_text("utf-8"))
    except FileNotFoundError:
        return []
    return [Interruption(**each) for each in stored]


def _start(workdir: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments.distill", f"--config={CONFIG}"]
    command += [f"--workdir={workdir}", f"--config.steps={_STEPS.value}"]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _run(workdir: Path, log: Path) -> None:
    """To the end, unless it is there."""
    if (workdir / SUMMARY).exists():
        steps = json_object((workdir / SUMMARY).read_text("utf-8")).get("steps")
        if steps != _STEPS.value:
            raise UserError(
                f"the run in {workdir} has {steps} steps, and --steps is {_STEPS.value}; give "
                f"--steps={steps} or another --workdir"
            )
        return
    code = _start(workdir, log).wait()
    if code:
        raise UserError(f"the run in {workdir} ended with exit code {code}; see {log}")


def _interrupt(
    workdir: Path, kind: str, number: int, done: list[Interruption], planned: int
) -> Interruption:
    """Starts the run and ends it after a random number of steps, or at a random time from then."""
    run, log = workdir / "interrupted", workdir / "interrupted.log"
    rng = random.Random(f"{_SEED.value} {number}")
    began = _newest(run)
    if done and began < done[-1].saved:
        raise UserError(f"step {done[-1].saved} was saved, but step {began} is the newest; {log}")
    left = _STEPS.value - _MARGIN - began
    life = rng.randint(1, max(2, 2 * left // (planned - number + 2)))
    is_early = kind == "SIGKILL" and number % EARLY_EVERY == 0
    goal = began + (1 if is_early else max(1, min(life, left)))
    job = _start(run, log)
    limit = time.monotonic() + (rng.random() * EARLY_SECONDS if is_early else START_SECONDS)
    while _newest(run) < goal and job.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    if time.monotonic() >= limit and not is_early:
        job.kill()
        raise UserError(f"the run in {run} did not come from step {began} to {goal}; see {log}")
    time.sleep(rng.random() * SAVE_SECONDS)
    in_save = any((run / FOLDER).glob("*tmp*"))
    job.send_signal(getattr(signal, kind))
    code = job.wait()
    expected = -signal.SIGKILL if kind == "SIGKILL" else door.STOPPED
    if code != expected:
        reason = "raise --steps" if code == 0 else f"see {log}"
        raise UserError(f"{kind} number {number} ended with exit code {code}; {reason}")
    return Interruption(kind, began, _newest(run), in_save)


def _newest(run: Path) -> int:
    """Step of the newest whole checkpoint; 0 if there is none."""
    try:
        names = os.listdir(run / FOLDER)
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _report(workdir: Path, done: list[Interruption]) -> int | None:
    alone, interrupted = workdir / "alone", workdir / "interrupted"
    differing = _differing(_arrays(alone), _arrays(interrupted))
    same_records = _records(alone) == _records(interrupted)
    damaged = len(list((interrupted / "damaged").glob("*")))
    figures = {
        "kills": sum(each.kind == "SIGKILL" for each in done),
        "terms": sum(each.kind == "SIGTERM" for each in done),
        "during_a_save": sum(each.in_save for each in done),
        "before_the_first_save": sum(each.saved == each.began for each in done),
        "steps": _STEPS.value,
        "arrays_that_differ": differing,
        "records_are_the_same": same_records,
        "damaged_checkpoints": damaged,
    }
    write_json(workdir / REPORT, figures)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"files: {workdir} ({REPORT}, {INTERRUPTIONS}, alone, interrupted)")
    return None if not differing and same_records and not damaged else 1


def _arrays(run: Path) -> dict[str, Any]:
    """Everything the last checkpoint holds."""
    folder, found = run / FOLDER / str(_newest(run)), {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "training"):
            for path, leaf in jax.tree_util.tree_leaves_with_path(reader.restore(folder / item)):
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def _differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    names = sorted(left.keys() | right.keys())
    return [
        name
        for name in names
        if name not in left or name not in right or left[name].tobytes() != right[name].tobytes()
    ]


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / JSONL).read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


if __name__ == "__main__":
    door.run_flags(main, plan=plan, has_workdir=True)
