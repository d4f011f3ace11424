"""The run that `experiments.faults` interrupts: on-policy, small, saved at every other step.

python -m experiments.faults --workdir=runs/faults --kills=50 --terms=20
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict({"target": "stories-target", "draft": "stories-draft"})
    config.task = ConfigDict({"name": "arithmetic_stories"})
    config.steps = 1_000
    config.batch_size = 4
    config.rollout_length = 24
    config.average_decay = 0.9
    config.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "constant"})
    config.decoder = ConfigDict({"num_prompts": 8, "batch_size": 8, "gamma": 3})
    config.decoder.temperatures = (1.0,)
    config.loop = ConfigDict({"log_every": 10, "evaluate_every": 250, "save_every": 2})
    return config
