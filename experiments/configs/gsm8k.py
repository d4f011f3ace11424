"""GSM8K with the T5 vocabulary, from fine-tuning to evaluation: as in the paper, or on two cores.

The word behind the colon is the stage, with `cpu_` before it for the sizes of two cores:

    COMMON="--config.task.source_dir=GSM8K_FOLDER --config.task.vocabulary=spiece.model"
    C=experiments/configs/gsm8k.py
    python -m experiments.finetune --config=$C:cpu_target   --workdir=runs/gsm8k/target   $COMMON
    python -m experiments.finetune --config=$C:cpu_draft    --workdir=runs/gsm8k/draft    $COMMON
    python -m experiments.distill  --config=$C:cpu_distill  --workdir=runs/gsm8k/distilled $COMMON
    python -m experiments.distill  --config=$C:cpu_control  --workdir=runs/gsm8k/control  $COMMON
    python -m experiments.evaluate --config=$C:cpu_evaluate --workdir=runs/gsm8k          $COMMON

GSM8K_FOLDER holds train.jsonl and test.jsonl as published. On two cores (models of 5.8M and 2.2M,
mostly vocabulary) the five commands take about 25 minutes; such models solve nothing, what they
show is real text going through. Without `cpu_`: T5 1.1 XL and small with the paper's optimiser
(arXiv 2310.08461, appendix B), for accelerators; start them from converted checkpoints.
"""

from ml_collections import ConfigDict

RUNS = "runs/gsm8k"
STAGES = ("target", "draft", "distill", "control", "evaluate")


def get_config(stage: str = "cpu_distill") -> ConfigDict:
    on_cpu, stage = stage.startswith("cpu_"), stage.removeprefix("cpu_")
    if stage not in STAGES:
        raise ValueError(f"unknown stage '{stage}'; known: {', '.join(STAGES)}, cpu_ before each")
    config = ConfigDict()
    config.task = ConfigDict({"name": "gsm8k", "truncate": True})
    config.task.input_length, config.task.target_length = (96, 128) if on_cpu else (512, 320)
    if stage == "evaluate":
        return _evaluate(config)
    config.seed = 0
    config.train_split, config.validation_split = "train[:7000]", "train[7000:]"
    config.batch_size = 8 if on_cpu else 32
    config.optimizer = _optimizer(stage, on_cpu)
    every = 200 if on_cpu else 5_000
    config.loop = ConfigDict({"log_every": every // 10, "evaluate_every": every})
    config.loop.save_every = every
    if stage in ("target", "draft"):
        config.steps = 600 if on_cpu else 40_000
        config.length_bucket = 16
        sizes = ("cpu_t5_target", "cpu_t5_draft") if on_cpu else ("t5_1_1_xl", "t5_1_1_small")
        config.model = sizes[stage == "draft"]
        config.validation_examples = 64 if on_cpu else 473
        config.loop.update({"best_metric": "loss", "best_mode": "min"})
        return config
    config.steps = 400 if on_cpu else 300_000
    config.target, config.draft = f"{RUNS}/target", f"{RUNS}/draft"
    config.recipe = ConfigDict({"name": "sft" if stage == "control" else "distillspec"})
    config.loss_chunk = 32
    config.decoder = ConfigDict({"num_prompts": 32 if on_cpu else 200, "batch_size": 32})
    return config


def _optimizer(stage: str, on_cpu: bool) -> ConfigDict:
    if on_cpu:
        rate = 1e-3 if stage == "target" else 2e-3
        return ConfigDict({"learning_rate": rate, "warmup_steps": 50, "floor": 0.1})
    distils = stage in ("distill", "control")
    return ConfigDict(
        {
            "name": "adafactor",
            "learning_rate": 3e-4,
            "warmup_steps": 5_000 if distils else 2_000,
            "decay_start": 150_000 if distils else 10_000,
            "floor": 0.1,
            "scale_by_parameter": False,
        }
    )


def _evaluate(config: ConfigDict) -> ConfigDict:
    config.target = f"{RUNS}/target"
    config.drafts = tuple(
        ConfigDict({"name": name, "path": f"{RUNS}/{folder}"})
        for name, folder in (
            ("finetuned", "draft"),
            ("control", "control"),
            ("distilled", "distilled"),
        )
    )
    config.num_prompts = 200
    config.tuning_split, config.num_tuning_prompts = "train[7000:]", 64
    config.timed_prompts = 20
    return config
