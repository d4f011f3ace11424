r"""Fine-tuning on `arithmetic_stories`, as it was done for the two models in the package.

    C=experiments/configs/finetune_stories.py
    python -m experiments.finetune --config=$C:target --workdir=runs/stories-shallow
    python -m experiments.convert --from=runs/stories-shallow --to=runs/stories-start \
        --format=native --decoder_layers=0,0,1,1,2,2,3,3,4
    python -m experiments.finetune --config=$C:deeper --workdir=runs/stories-target
    python -m experiments.finetune --config=$C:draft --workdir=runs/stories-draft

The target sees the large `pretrain` split, as in real life it has seen far more than the task; it
grows from five decoder layers to nine, whose 40 MB no longer fit a CPU's cache, as those of
real targets do not. The draft sees the 3,000 references of the task, up to its plateau (block
efficiency at gamma 7 no longer grows). On two cores the target takes about an hour, the draft 3
minutes; the cards in `distillspec_jax/pretrained` have the figures.
"""

from ml_collections import ConfigDict

STEPS = {"target": 5_500, "deeper": 1_200, "draft": 8_000}
RATES = {"target": 4e-4, "deeper": 3e-4, "draft": 3e-3}


def get_config(which: str = "draft") -> ConfigDict:
    if which not in STEPS:
        raise ValueError(f"unknown model '{which}'; known: {', '.join(STEPS)}")
    is_target = which != "draft"
    config = ConfigDict()
    config.model = "cpu_target" if is_target else "cpu_draft"
    if which == "deeper":
        config.model = "runs/stories-start"
    config.seed = int(which == "deeper")  # another order of the stories
    config.steps = STEPS[which]
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.train_split = "pretrain" if is_target else "train"
    config.batch_size = 32
    config.length_bucket = 8
    config.optimizer = ConfigDict(
        {
            "learning_rate": RATES[which],
            "schedule": "cosine",
            "warmup_steps": 200,
            "floor": 0.02,
        }
    )
    config.decode_prompts = 500 if is_target else 0
    config.loop = ConfigDict({"log_every": 50, "evaluate_every": 500, "save_every": 500})
    config.loop.best_metric = ""  # the last step is the one: the rate has fallen to its floor
    return config
