r"""Decoding with the two models of the package; the draft may be any run's workdir.

    python -m experiments.decode --config=experiments/configs/decode.py --workdir=runs/decode \
        --config.draft=runs/quickstart/distilled --prompts=questions.jsonl
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"target": "stories-target", "draft": "stories-draft", "gamma": 5})
