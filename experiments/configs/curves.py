r"""How the gain of a distilled draft depends on the number of references, and on that of steps.

    python -m experiments.sweep --config=experiments/configs/curves.py:references \
        --workdir=runs/curve-references
    python -m experiments.sweep --config=experiments/configs/curves.py:steps \
        --workdir=runs/curve-steps

`references`: 300, 3,000 and 30,000 of them; on each a fresh draft is fine-tuned first, and from
there control and distilled drafts see the same data. `steps`: the packaged draft, whose 3,000
references are those it was fine-tuned on.
"""

from ml_collections import ConfigDict


def get_config(axis: str = "references") -> ConfigDict:
    if axis not in ("references", "steps"):
        raise ValueError(f"unknown axis '{axis}'; there are 'references' and 'steps'")
    config = ConfigDict({"target": "stories-target", "draft": "stories-draft"})
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.divergences, config.sources = ("jsd",), ("fixed", "draft")
    config.seeds = (0, 1)
    config.batch_size = 16
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "floor": 0.02}
    )
    config.decoder = ConfigDict({"num_prompts": 300, "batch_size": 100})
    if axis == "steps":
        config.steps = (125, 500, 2_000)
        return config
    config.steps = (1_000,)
    config.draft = "cpu_draft"
    config.train_splits = ("train[:300]", "train", "pretrain[:30000]")
    config.finetune = ConfigDict({"steps": 8_000})
    config.finetune.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 200, "floor": 0.02}
    )
    return config
