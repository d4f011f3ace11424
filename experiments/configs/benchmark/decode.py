"""Decoding beside Hugging Face; `decode.py:fast` is a minute of it, with tiny models.

    python -m experiments.benchmark --config=experiments/configs/benchmark/decode.py \
        --workdir=runs/benchmark-decode
"""

from ml_collections import ConfigDict


def get_config(options: str = "") -> ConfigDict:
    if options not in ("", "fast"):
        raise ValueError(f"unknown option '{options}'; there is 'fast'")
    config = ConfigDict({"benchmark": "decode", "decode": {}})
    return config
