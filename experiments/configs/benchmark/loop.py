r"""What the training loop costs beside the compiled step, at the quickstart's sizes.

    python -m experiments.benchmark --config=experiments/configs/benchmark/loop.py \
        --workdir=runs/loop
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"benchmark": "loop", "loop": {}})
