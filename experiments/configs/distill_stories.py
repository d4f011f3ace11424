r"""Distillation on `arithmetic_stories`, of the two models in the package.

    python -m experiments.distill --config=experiments/configs/distill_stories.py \
        --workdir=runs/distilled
    python -m experiments.distill --config=experiments/configs/distill_stories.py:sft \
        --workdir=runs/control

The word behind the colon is a recipe (sft, seqkd, supkd, imitkd, f_distill, gkd, distillspec,
skd); nothing else differs between them. sft is the control: as many more steps on references.
"""

from ml_collections import ConfigDict


def get_config(recipe: str = "distillspec") -> ConfigDict:
    config = ConfigDict()
    config.target = "stories-target"
    config.draft = "stories-draft"
    config.recipe = ConfigDict({"name": recipe})
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.batch_size = 32
    config.steps = 2_500
    config.seed = 0
    config.optimizer = ConfigDict(
        {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100, "floor": 0.02}
    )
    config.decoder = ConfigDict({"num_prompts": 200, "gamma": 7, "temperatures": (0.0, 1.0)})
    config.loop = ConfigDict({"log_every": 50, "evaluate_every": 500, "save_every": 500})
    return config
