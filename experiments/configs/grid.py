"""Divergence x source of the data, three seeds, on `arithmetic_stories`, beside the control.

    python -m experiments.sweep --config=experiments/configs/grid.py --workdir=runs/grid
    python -m experiments.sweep --config=experiments/configs/grid.py:fast --workdir=runs/grid-fast

Four divergences, four sources, three seeds, and the control: 51 drafts from the packaged one,
decoded with gamma 7 at T = 0 and T = 1. `fast` is a rough minute of it.
"""

from ml_collections import ConfigDict


def get_config(options: str = "") -> ConfigDict:
    if options not in ("", "fast"):
        raise ValueError(f"unknown option '{options}'; there is 'fast'")
    fast = options == "fast"
    config = ConfigDict({"target": "stories-target", "draft": "stories-draft"})
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.seeds = (0,) if fast else (0, 1, 2)
    config.steps = (20,) if fast else (500,)
    config.batch_size = 16
    if fast:
        config.divergences, config.sources = ("jsd", "tvd"), ("fixed", "draft")
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "floor": 0.02}
    )
    prompts = 20 if fast else 300
    config.decoder = ConfigDict({"num_prompts": prompts, "batch_size": min(prompts, 100)})
    return config
