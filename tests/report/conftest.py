"""Files of runs as `evaluate` and `distill` write them, with figures made up to be told apart."""

import json
import shutil
from pathlib import Path

import pytest

from distillspec_jax.distill.recipes import RECIPES

NAMES = ("finetuned", "control", "distilled")
TUNED = {"finetuned": 4, "control": 5, "distilled": 5}
VERSIONS = {
    "jax_version": "0.10.2",
    "flax_version": "0.12.8",
    "distillspec_jax_version": "0.1.0",
    "device_kind": "cpu",
    "device_count": 1,
}


def with_interval(key, value, half):
    return {key: value, f"{key}_ci95": [value - half, value + half]}


def row(name, temperature, gamma, seeds=(0,)):
    """One row of a summary; the better the draft, the higher all its figures."""
    skill = 0.7 + 0.06 * NAMES.index(name) - 0.02 * temperature
    tau = sum(skill**k for k in range(gamma + 1))
    return {
        "name": name,
        "temperature": temperature,
        "gamma": gamma,
        "lenience": 1.0,
        "seeds": list(seeds),
        "lossless": True,
        "verification": "token",
        **with_interval("acceptance_rate", skill, 0.01),
        **with_interval("acceptance_rate_overlap", skill + 0.001, 0.01),
        **with_interval("acceptance_rate_blocks", skill + 0.002, 0.01),
        **with_interval("block_efficiency", tau, 0.08),
        **with_interval("block_efficiency_path", tau + 0.01, 0.08),
        "block_efficiency_iid": tau + 0.02,
        "accepted_histogram": [100 * (gamma + 1 - n) for n in range(gamma + 1)],
        "num_prompts": 500,
        "cost_ratio": 0.05,
        "verification_cost": 1 + 0.12 * gamma,
        "speedup_predicted": tau / (1 + 0.05 * gamma),
        "speedup_predicted_verification": tau / (1 + 0.17 * gamma),
        "memory_bound_speedup": tau / (1 + 0.02 * gamma),
        "quality_metric": "exact_match_number",
        **with_interval("quality", 61.2, 4.2),
        **({"greedy_mismatches": 0} if temperature == 0 else {}),
        "batch_size": 1,
        **with_interval("tokens_per_second_target", 1000.0, 30.0),
        **with_interval("tokens_per_second_speculative", 950.0 * tau / (1 + 0.17 * gamma), 50.0),
        **with_interval("speedup_wall_clock", 0.95 * tau / (1 + 0.17 * gamma), 0.05),
        "timed_prompts": 50,
        "timing_spread": 0.04,
        "compile_seconds": 3.2,
    }


def gain(figure, over, temperature, value):
    gains = {"figure": figure, "name": "distilled", "over": over, "temperature": temperature}
    gains |= with_interval("gain", value, 0.02)
    if figure == "block_efficiency":
        return gains | {"num_prompts": 500, "gamma": 7, "intervals_apart": True}
    gammas = {"gamma": TUNED["distilled"], "gamma_over": TUNED[over]}
    return gains | {"num_prompts": 50, **gammas, "batch_size": 1}


def evaluation():
    settings = [(name, t, gamma) for t in (0.0, 1.0) for gamma in (7, 5) for name in NAMES]
    pooled = [row(*setting, seeds=(0, 1, 2)) for setting in settings]
    drafts = [row(*setting) | {"seed": seed} for setting in settings for seed in range(3)]
    gains = [
        gain(figure, over, temperature, value)
        for figure, value in (("block_efficiency", 1.2), ("tokens_per_second", 1.1))
        for temperature in (0.0, 1.0)
        for over in ("finetuned", "control")
    ]
    return {**pooled[-1], "drafts": drafts, "pooled": pooled, "gains": gains, **VERSIONS}


def curves():
    keys = ("block_efficiency_path", "block_efficiency_path_ci95", "speedup_predicted_verification")
    return [
        {"kind": "curve", "name": name, "temperature": temperature, "gamma": gamma}
        | {key: row(name, temperature, gamma)[key] for key in keys}
        for name in NAMES
        for temperature in (0.0, 1.0)
        for gamma in (1, 2, 3, 5, 7, 10)
    ]


def training(recipe, slope):
    records = []
    for step in range(0, 1001, 100):
        loss = {"step": step, "kind": "train", "wall_time": 0.0, "loss": 0.3 / (1 + slope * step)}
        tau = {f"block_efficiency_t{t}": 4 + slope * step / 3 for t in (0, 1)}
        records += [loss, {"step": step, "kind": "eval", "wall_time": 0.0, **tau}]
    config = {
        "experiment": "distill",
        "seed": 0,
        "recipe": {"name": recipe, "loss": RECIPES[recipe].loss},
    }
    summary = {"steps": 1000, "best_step": 900, "train_seconds": 61.5, **VERSIONS}
    return config, records, summary


def write(folder, config, records, summary):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A folder like that of the quickstart, an evaluation and two training runs, to be read."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write(folder, {"experiment": "evaluate", "seed": 0}, curves(), evaluation())
    write(folder / "distilled", *training("distillspec", 0.003))
    write(folder / "control", *training("sft", 0.0003))
    return folder


@pytest.fixture
def two_evaluations(tmp_path):
    """A folder of two whose names are the same in the letters that a file's name may have."""
    for name in ("a/<b>", "a__b_"):
        write(tmp_path / "two" / name, {"experiment": "evaluate"}, curves(), evaluation())
    return tmp_path / "two"


@pytest.fixture
def runs_folder(quickstart, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(quickstart, tmp_path / "quickstart"))
