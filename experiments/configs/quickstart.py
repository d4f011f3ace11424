"""The stages of `launch/quickstart.sh`, on the embedded data and the two models of the package.

    C=experiments/configs/quickstart.py
    python -m experiments.distill  --config=$C:distilled --workdir=runs/quickstart/distilled
    python -m experiments.distill  --config=$C:control   --workdir=runs/quickstart/control
    python -m experiments.evaluate --config=$C:evaluate  --workdir=runs/quickstart

Behind the stage, with commas: `fast` (small and rough, runs/quickstart-fast), `seeds=3` (for
`evaluate`: so many of control and distilled), `scratch` (models trained here instead of the
packaged ones, runs/quickstart-scratch). The control is the same draft trained for the same number
of steps on the references. Sizes, rates and loss were chosen on the split `tuning`; `evaluate`
measures on `test`.
"""

import re

from ml_collections import ConfigDict

STAGES = ("distilled", "control", "evaluate")
_OPTION = re.compile("fast|scratch|seeds=[1-9][0-9]*")


def get_config(options: str = "distilled") -> ConfigDict:
    stage, *rest = options.split(",")
    fast, scratch = "fast" in rest, "scratch" in rest
    unknown = [each for each in rest if not _OPTION.fullmatch(each)]
    if stage not in STAGES or unknown:
        known = f"stages: {', '.join(STAGES)}; behind them: fast, scratch, seeds=NUMBER from 1"
        raise ValueError(f"unknown option in '{options}'; {known}")
    seeds = next((int(each[6:]) for each in rest if each.startswith("seeds=")), 1)
    runs = "runs/quickstart" + "-fast" * fast + "-scratch" * scratch
    config = ConfigDict({"task": {"name": "arithmetic_stories"}})
    config.target = f"{runs}/target" if scratch else "stories-target"
    draft = f"{runs}/draft" if scratch else "stories-draft"
    return (
        _evaluate(config, runs, draft, seeds, fast)
        if stage == "evaluate"
        else _train(config, stage, draft, fast)
    )


def _train(config: ConfigDict, stage: str, draft: str, fast: bool) -> ConfigDict:
    config.draft = draft
    config.recipe = ConfigDict({"name": "sft"})
    if stage == "distilled":  # half the steps on the draft's own samples, half on the references
        config.recipe = ConfigDict({"name": "distillspec", "lambda1": 0.5})
    config.seed = 0
    config.steps = 200 if fast else 3_000
    config.batch_size = 16
    config.rollout_length = 48  # the longest twentieth of the answers is cut
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "floor": 0.02}
    )
    config.decoder = ConfigDict({"num_prompts": 100, "batch_size": 100, "gamma": 7})
    config.loop = ConfigDict({"log_every": 25, "save_every": 500, "best_metric": ""})
    config.loop.evaluate_every = 0 if fast else config.steps // 2  # to watch, not to choose
    return config


def _evaluate(config: ConfigDict, runs: str, draft: str, seeds: int, fast: bool) -> ConfigDict:
    names = ["finetuned"] + [name for name in ("control", "distilled") for _ in range(seeds)]
    drafts = []
    for name in dict.fromkeys(names):
        for seed in range(names.count(name)):
            path = f"{runs}/{folder_of(name, seed)}" if name != "finetuned" else draft
            drafts.append(ConfigDict({"name": name, "path": path, "seed": seed}))
    config.drafts = tuple(drafts)
    config.num_prompts = 100 if fast else 500 if seeds == 1 else 1_000  # more for a claim
    config.num_tuning_prompts = 20 if fast else 100
    config.batch_size = 100
    config.gamma_grid = (2, 3, 4, 5, 7)
    config.timed_prompts = 6 if fast else 30 if seeds == 1 else 50
    return config


def folder_of(name: str, seed: int) -> str:
    """Where `launch/quickstart.sh` trains a draft."""
    return f"{name}-seed{seed}" if seed else name
