r"""Weak scaling by the compiler, from 1 to 64 virtual devices.

    python -m experiments.benchmark --config=experiments/configs/benchmark/scaling.py \
        --workdir=runs/scaling
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"benchmark": "scaling", "scaling": {}})
