"""What a draft should begin as: a sibling, the target cut down, or fresh, on `arithmetic_stories`.

    C=experiments/configs/draft_starts.py RUNS=runs/starts
    CUT="--from=stories-target --format=native --encoder_layers=1 --decoder_layers=4"
    NARROW="--d_model=64 --d_ff=128 --num_heads=1"
    python -m experiments.convert $CUT $NARROW           --to=$RUNS/cut-start
    python -m experiments.convert $CUT $NARROW --fresh=0 --to=$RUNS/fresh-start
    python -m experiments.convert $CUT                   --to=$RUNS/wide_cut-start
    python -m experiments.convert $CUT         --fresh=0 --to=$RUNS/wide_fresh-start
    for S in cut fresh wide_cut wide_fresh; do
      python -m experiments.finetune --config=$C:finetune,$S --workdir=$RUNS/$S-tuned
      python -m experiments.distill  --config=$C:distill,$S  --workdir=$RUNS/$S-distilled
    done
    python -m experiments.distill  --config=$C:distill,sibling --workdir=$RUNS/sibling-distilled
    python -m experiments.evaluate --config=$C:evaluate        --workdir=$RUNS/evaluate

`cut` and `fresh` have the shape of the packaged draft (0.13M), the `wide_` ones keep the target's
width (2.1M), and the sibling is the packaged draft, trained for 8,000 steps before. All others get
the same 600 steps on the references, and all the same 400 of distillation. Block efficiency is
measured on 500 test prompts. About 15 minutes on two cores.
"""

from ml_collections import ConfigDict

RUNS = "runs/starts"
STARTS = ("sibling", "cut", "fresh", "wide_cut", "wide_fresh")
STAGES = ("finetune", "distill", "evaluate")


def get_config(options: str = "evaluate") -> ConfigDict:
    stage, _, start = options.partition(",")
    if stage not in STAGES or start not in ("", *STARTS):
        known = f"stages: {', '.join(STAGES)}; starts: {', '.join(STARTS)}"
        raise ValueError(f"unknown option in '{options}'; {known}")
    config = ConfigDict({"task": {"name": "arithmetic_stories"}})
    return _evaluate(config) if stage == "evaluate" else _train(config, stage, start)


def _train(config: ConfigDict, stage: str, start: str) -> ConfigDict:
    tunes = stage == "finetune"
    config.steps = 600 if tunes else 400
    config.batch_size = 32 if tunes else 16
    config.validation_examples = 200
    rate = 1e-3 if start.startswith("wide") else 3e-3
    config.optimizer = ConfigDict({"learning_rate": rate, "warmup_steps": 50, "floor": 0.05})
    config.loop = ConfigDict({"log_every": 50, "evaluate_every": 0, "save_every": 0})
    config.loop.best_metric = ""  # the last step is the one: the rate has fallen to its floor
    if tunes:
        config.model = f"{RUNS}/{start}-start"
        config.length_bucket = 8
        return config
    config.target = "stories-target"
    config.draft = _tuned(start)
    config.rollout_length = 48
    config.decoder = ConfigDict({"num_prompts": 100, "batch_size": 100, "gamma": 7})
    return config


def _evaluate(config: ConfigDict) -> ConfigDict:
    config.target = "stories-target"
    config.drafts = tuple(
        ConfigDict({"name": f"{start}, {done}", "path": path})
        for start in STARTS
        for done, path in (
            ("tuned", _tuned(start)),
            ("distilled", f"{RUNS}/{start}-distilled"),
        )
    )
    config.num_prompts, config.batch_size = 500, 100
    config.tune, config.timed_prompts = False, 0
    return config


def _tuned(start: str) -> str:
    return "stories-draft" if start == "sibling" else f"{RUNS}/{start}-tuned"
