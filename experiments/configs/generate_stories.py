r"""The packaged target writes an answer to each of the 3,000 training prompts.

    python -m experiments.generate --config=experiments/configs/generate_stories.py \
        --workdir=runs/teacher-data
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict({"target": "stories-target", "task": {"name": "arithmetic_stories"}})
    config.split = "train"
    config.temperature = 1.0
    config.batch_size = 64
    config.shard_size = 1_000
    config.seed = 0
    return config
