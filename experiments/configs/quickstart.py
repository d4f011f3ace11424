"""The quickstart's stages; `bash launch/quickstart.sh` runs them in this order.

    C=experiments/configs/quickstart.py
    python -m experiments.distill  --config=$C:distill  --workdir=runs/quickstart/distilled
    python -m experiments.distill  --config=$C:control  --workdir=runs/quickstart/control
    python -m experiments.evaluate --config=$C:evaluate --workdir=runs/quickstart
    python -m experiments.report   --workdir=runs/quickstart

Behind the stage may follow, with commas: `fast` (a fifth of the work), `seeds=3` (evaluate: drafts
of seeds 0 to 2, from `distilled`, `distilled-1`, ...), `scratch` (models trained from scratch in
`target` and `finetuned` instead of the packaged ones). Everything was chosen on the split `tuning`;
`evaluate` measures on `test`.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "distill") -> ConfigDict:
    stage, *options = argument.split(",")
    if stage not in ("distill", "control", "evaluate"):
        raise ValueError(f"unknown stage '{stage}'; known: distill, control, evaluate")
    given = dict(option.partition("=")[::2] for option in options)
    if unknown := set(given) - {"fast", "seeds", "scratch"}:
        raise ValueError(f"unknown option {sorted(unknown)}; known: fast, seeds=N, scratch")
    is_fast = "fast" in given
    root = "runs/quickstart-fast" if is_fast else "runs/quickstart"
    target, draft = "stories-target", "stories-draft"
    if "scratch" in given:
        target, draft = f"{root}/target", f"{root}/finetuned"
    if stage == "evaluate":
        return _evaluate(target, draft, root, is_fast, int(given.get("seeds", 1)))
    return _train(target, draft, stage, is_fast)


def _train(target: str, draft: str, stage: str, is_fast: bool) -> ConfigDict:
    """The control differs from the distillation in its recipe alone."""
    config = ConfigDict()
    config.target, config.draft = target, draft
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.recipe = ConfigDict({"name": "sft" if stage == "control" else "distillspec"})
    config.rollout_length = 48
    config.seed = 0
    config.batch_size = 16
    config.steps = 300 if is_fast else 2_500
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "floor": 0.02}
    )
    config.decoder = ConfigDict({"num_prompts": 100, "batch_size": 100})
    config.loop = ConfigDict({"log_every": 50, "save_every": 500})
    # the end of the schedule is the draft: nothing is picked on the prompts that are watched
    config.loop.evaluate_every = config.steps if is_fast else config.steps // 2
    config.loop.best_metric = ""
    return config


def _evaluate(target: str, draft: str, root: str, is_fast: bool, seeds: int) -> ConfigDict:
    def run(name: str, seed: int) -> ConfigDict:
        folder = f"{root}/{name}-{seed}" if seed else f"{root}/{name}"
        return ConfigDict({"name": name, "path": folder, "seed": seed})

    config = ConfigDict()
    config.target = target
    config.drafts = (
        ConfigDict({"name": "finetuned", "path": draft}),
        *(run(name, seed) for name in ("control", "distilled") for seed in range(seeds)),
    )
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.num_prompts = 200 if is_fast else 1_000
    config.batch_size = 100
    config.num_tuning_prompts = 100
    config.timed_prompts = 20 if is_fast else 50
    return config
