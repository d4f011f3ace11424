"""A T5 of your own: fine-tune a draft, distil it from your model, measure what it gains.

    C=experiments/configs/own_t5.py
    python -m experiments.finetune --config=$C:draft    --workdir=runs/own/draft
    python -m experiments.distill  --config=$C:distill  --workdir=runs/own/distilled
    python -m experiments.distill  --config=$C:control  --workdir=runs/own/control    (if wanted)
    python -m experiments.evaluate --config=$C:evaluate --workdir=runs/own/evaluate

Expected in the current folder: `my-t5`, the target (or a link to it), and `train.jsonl` and
`validation.jsonl`; in `runs/own/draft0` the draft's start, which experiments.convert makes out of
the target. For other places say --config.target=, --config.model=, --config.task.vocabulary=,
--config.task.train_file= and so on. Without references leave the first command out, put the start
at runs/own/draft and say --config.task.target_field= in the others.

The sizes suit one accelerator. Put `tiny,` before the stage for the same in minutes on two cores,
to see that everything fits together.
"""

from ml_collections import ConfigDict

TARGET, RUNS = "my-t5", "runs/own"
STAGES = ("draft", "distill", "control", "evaluate")


def get_config(options: str = "") -> ConfigDict:
    *rest, stage = options.split(",")
    if stage not in STAGES or rest not in ([], ["tiny"]):
        wrong = f"unknown stage '{options}'" if options else "a stage is missing, own_t5.py:STAGE"
        raise ValueError(f"{wrong}; known: {', '.join(STAGES)}, tiny, before each")
    tiny = bool(rest)
    config = ConfigDict()
    config.task = ConfigDict(
        {
            "name": "jsonl",
            "vocabulary": TARGET,
            "train_file": "train.jsonl",
            "validation_file": "validation.jsonl",
            "input_length": 128 if tiny else 512,
            "target_length": 32 if tiny else 128,
            "truncate": True,
        }
    )
    return _evaluate(config, tiny) if stage == "evaluate" else _train(config, stage, tiny)


def _train(config: ConfigDict, stage: str, tiny: bool) -> ConfigDict:
    config.steps = 200 if tiny else 5_000
    config.batch_size = 8 if tiny else 32
    rate = 3e-3 if tiny else 3e-4
    config.optimizer = ConfigDict({"learning_rate": rate, "warmup_steps": 20, "floor": 0.1})
    every = 100 if tiny else 500
    config.loop = ConfigDict({"log_every": every // 10, "evaluate_every": every})
    config.loop.save_every = every
    if stage == "draft":
        config.validation_examples = 32 if tiny else 500
        config.model = f"{RUNS}/draft0"
        return config
    config.target, config.draft = TARGET, f"{RUNS}/draft"
    config.recipe = ConfigDict({"name": "sft" if stage == "control" else "distillspec"})
    config.loss_chunk = 32  # logits of 32,128 pieces for all positions at once would be large
    prompts = 16 if tiny else 100
    config.decoder = ConfigDict({"num_prompts": prompts, "batch_size": prompts, "gamma": 5})
    return config


def _evaluate(config: ConfigDict, tiny: bool) -> ConfigDict:
    config.target = TARGET
    config.drafts = tuple(
        ConfigDict({"name": name, "path": f"{RUNS}/{folder}"})
        for name, folder in (("finetuned", "draft"), ("distilled", "distilled"))
    )
    # gamma is chosen on prompts apart from those that are measured; a test_file is better still
    config.num_prompts, config.num_tuning_prompts = (32, 16) if tiny else (500, 100)
    held_out = config.num_tuning_prompts
    config.tuning_split = f"validation[:{held_out}]"
    config.split = f"validation[{held_out}:]"
    config.batch_size = 16 if tiny else 64
    config.gammas, config.gamma_grid = (5,), (2, 3, 5, 7)
    config.timed_prompts = 4 if tiny else 50
    return config
