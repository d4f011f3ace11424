r"""Distillation beside TRL and torch; `distill.py:fast` is a minute of it, with tiny models.

`distill.py:accelerator` is for an H100: score and update of T5 1.1 XL and small in bfloat16, as a
share of the 989 TFLOP/s of its data sheet (another device: --config.distill.peak_teraflops, or 0
for what a large product reaches).

    /path/to/env/with/peers/python -m experiments.benchmark \
        --config=experiments/configs/benchmark/distill.py --workdir=runs/benchmark-distill

Parts: `trl` (the LM1B pair, 33M and 234M), `trl_small` (presets `cpu_draft` and `cpu_target`: the
quickstart's, its target with five of nine decoder layers), `torch` (T5 small and base), `chunked`
(memory and time of the vocabulary in chunks), `teacher` (tokens a second of the target's texts, and
of steps on them, with a draft's help; give a distilled one by
--config.distill.teacher_draft=FOLDER), `utilisation` (operations a second of score and update, and
their share of what a large product reaches, or of --config.distill.peak_teraflops).
"""

from ml_collections import ConfigDict


def get_config(options: str = "") -> ConfigDict:
    if options not in ("", "fast", "accelerator"):
        raise ValueError(f"unknown option '{options}'; there are 'fast' and 'accelerator'")
    config = ConfigDict({"benchmark": "distill", "distill": {}})
    if options == "accelerator":
        pair = {"target": "t5_1_1_xl", "draft": "t5_1_1_small", "batch_size": 64}
        config.distill.parts = ("utilisation",)
        config.distill.utilisation = ConfigDict({**pair, "input_length": 128})
        config.distill.compute_dtype = "bfloat16"
        config.distill.peak_teraflops = 989.0
        config.distill.product_size = 8192
    if options == "fast":
        tiny = {"target": "cpu_target", "draft": "cpu_draft", "batch_size": 2, "target_length": 8}
        config.distill.rounds = 2
        config.distill.parts = ("trl_small", "torch", "chunked", "teacher", "utilisation")
        for part in ("trl_small", "torch", "chunked", "utilisation"):
            config.distill[part] = ConfigDict(tiny)
        config.distill.chunk = 3
        config.distill.vocabularies = (64, 448)
        config.distill.teacher_batch_sizes = (2, 4)
        config.distill.teacher_length = 16
        config.distill.teacher_batches = 4
        config.distill.product_size = 256
    return config
