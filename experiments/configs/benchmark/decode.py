r"""Decoding beside Hugging Face; `decode.py:fast` is a minute of it, with small models.

`decode.py:accelerator` is for a GPU or TPU: T5 1.1 XL and XXL with fresh weights in bfloat16 (6 and
22 GB), alone and drafted by T5 1.1 small, as shares of the memory's bandwidth.

    /path/to/env/with/peers/python -m experiments.benchmark \
        --config=experiments/configs/benchmark/decode.py --workdir=runs/benchmark-decode

Parts: `plain` (T5 1.1 base and small with fresh weights), `drafted` (the target of the package with
its draft; give a distilled one by --config.decode.draft=FOLDER) and `products` (XLA's own products
of few rows beside the kernel's, on a CPU).
"""

from ml_collections import ConfigDict


def get_config(options: str = "") -> ConfigDict:
    if options not in ("", "fast", "accelerator"):
        raise ValueError(f"unknown option '{options}'; there are 'fast' and 'accelerator'")
    config = ConfigDict({"benchmark": "decode", "decode": {}})
    if options == "accelerator":
        config.decode.parts = ("plain",)
        config.decode.shapes = ("t5_1_1_xl", "t5_1_1_xxl")
        config.decode.dtype = "bfloat16"
        config.decode.fresh_draft = "t5_1_1_small"
        config.decode.read_megabytes = 4096
    if options == "fast":
        config.decode.shapes = ("t5_1_1_small", "cpu_t5_target")
        config.decode.input_length = 32
        config.decode.new_tokens = (8, 16)
        config.decode.rounds = 3
        config.decode.gammas = (3, 5)
        config.decode.product_rows = (1, 8)
        config.decode.tuning_prompts = config.decode.prompts = 16
    return config
