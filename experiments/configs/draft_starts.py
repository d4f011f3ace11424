"""What a draft should begin as: a sibling, the target cut down, or fresh, on `arithmetic_stories`.

    C=experiments/configs/draft_starts.py RUNS=runs/starts
    SHAPE="--encoder_layers=1 --decoder_layers=8 --d_model=64 --d_ff=128 --num_heads=1"
    CUT="--from=stories-target --format=native $SHAPE"
    for I in 0 1; do  # seeds
      python -m experiments.convert $CUT            --to=$RUNS/cut-start-$I
      python -m experiments.convert $CUT --fresh=$I --to=$RUNS/fresh-start-$I
      for S in cut fresh; do
        python -m experiments.finetune --config=$C:finetune,$S,$I --workdir=$RUNS/$S-tuned-$I
        python -m experiments.distill  --config=$C:distill,$S,$I  --workdir=$RUNS/$S-distilled-$I
      done
    done
    python -m experiments.distill  --config=$C:distill,sibling --workdir=$RUNS/sibling-distilled-0
    python -m experiments.evaluate --config=$C:evaluate        --workdir=$RUNS/evaluate

`cut` and `fresh` have the shape of the packaged draft (0.13M); the sibling is that draft, trained
for 8,000 steps before. The others get the same 600 steps on the references, and all the same 400
of distillation. Block efficiency is measured on 500 test prompts. About 8 minutes on two cores.
"""

from ml_collections import ConfigDict

RUNS = "runs/starts"
STARTS = ("sibling", "cut", "fresh")
STAGES = ("finetune", "distill", "evaluate")
SEEDS = (0, 1)


def get_config(options: str = "evaluate") -> ConfigDict:
    stage, _, rest = options.partition(",")
    start, _, seed = rest.partition(",")
    is_known = not rest if stage == "evaluate" else start in STARTS and (seed or "0").isdecimal()
    if stage not in STAGES or not is_known:
        known = f"stages: {', '.join(STAGES)}; starts: {', '.join(STARTS)}; seeds: from 0"
        raise ValueError(f"unknown option in '{options}'; {known}")
    config = ConfigDict({"task": {"name": "arithmetic_stories"}})
    if stage == "evaluate":
        return _evaluate(config)
    return _train(config, stage, start, int(seed or 0))


def _train(config: ConfigDict, stage: str, start: str, seed: int) -> ConfigDict:
    tunes = stage == "finetune"
    config.seed = seed
    config.steps = 600 if tunes else 400
    config.batch_size = 32 if tunes else 16
    config.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup_steps": 50, "floor": 0.05})
    config.loop = ConfigDict({"log_every": 50, "evaluate_every": 0, "save_every": 0})
    config.loop.best_metric = ""  # the last step is the one: the rate has fallen to its floor
    if tunes:
        config.validation_examples = 200
        config.model = f"{RUNS}/{start}-start-{seed}"
        config.length_bucket = 8
        return config
    config.target = "stories-target"
    config.draft = _tuned(start, seed)
    config.rollout_length = 48
    config.decoder = ConfigDict({"num_prompts": 100, "batch_size": 100, "gamma": 7})
    return config


def _evaluate(config: ConfigDict) -> ConfigDict:
    config.target = "stories-target"
    drafts = []
    for start in STARTS:
        for seed in SEEDS[: 1 if start == "sibling" else None]:
            distilled = f"{RUNS}/{start}-distilled-{seed}"
            for done, path in (("tuned", _tuned(start, seed)), ("distilled", distilled)):
                drafts.append(ConfigDict({"name": f"{start}, {done}", "path": path, "seed": seed}))
    config.drafts = tuple(drafts)
    config.num_prompts, config.batch_size = 500, 100
    config.tune, config.timed_prompts = False, 0
    return config


def _tuned(start: str, seed: int) -> str:
    return "stories-draft" if start == "sibling" else f"{RUNS}/{start}-tuned-{seed}"
