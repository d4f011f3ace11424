"""Entrypoints called in this process, and a task and models small enough to train in seconds."""

import gc
import json
import sys

import jax
import numpy as np
import pytest
from absl import flags

from distillspec_jax import zoo
from distillspec_jax.data.stories import story
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params
from experiments import distill, door, finetune
from experiments.distill import DistillConfig
from experiments.finetune import FinetuneConfig

VOCABULARY = "arithmetic_stories"


@pytest.fixture
def leave(monkeypatch, capsys):
    """Calls what reads flags and then leaves, on some arguments: (exit code, stdout, stderr)."""
    monkeypatch.setattr(door, "_enable_compilation_cache", lambda: None)

    def leave(start, *arguments):
        monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            start()
        forget_flags()
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return leave


def no_plan(*_):
    pytest.fail("planned")


@pytest.fixture
def enter(leave):
    """Runs an entrypoint on some arguments: (exit code, stdout, stderr)."""

    def enter(main, config_class, *arguments):
        return leave(lambda: door.run(main, config_class, plan=no_plan), *arguments)

    return enter


def forget_flags():
    """Makes absl as it was before it parsed anything."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    for name in ("config", "workdir", "plan", "device_memory_gib"):
        flags.FLAGS[name].unparse()
        flags.FLAGS[name].value = flags.FLAGS[name].default


@pytest.fixture(scope="session")
def live_arrays():
    """How many arrays there are, without those that nobody holds any more."""

    def count():
        gc.collect()
        return len(jax.live_arrays())

    return count


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder with train.jsonl and validation.jsonl of a few stories each."""
    folder = tmp_path_factory.mktemp("stories")
    for split, count in (("train", 13), ("validation", 7)):
        pairs = [story(split, index) for index in range(count)]
        lines = [json.dumps({"input": question, "target": answer}) for question, answer in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny models: target, draft, and foreign (of another vocabulary)."""
    folder = tmp_path_factory.mktemp("models")
    own = load_vocabulary(VOCABULARY)
    for seed, (name, width, fingerprint) in enumerate(
        [("target", 16, own.fingerprint), ("draft", 8, own.fingerprint), ("foreign", 8, "ab" * 32)]
    ):
        config = ModelConfig(
            name=name,
            vocab_size=own.size,
            d_model=width,
            num_heads=2,
            head_dim=4,
            d_ff=11,
            num_encoder_layers=1,
            num_decoder_layers=1,
            tie_embeddings=True,
        )
        model = Transformer(config)
        shapes = jax.eval_shape(lambda key, m=model: init_params(m, key), jax.random.key(0))
        rng = np.random.default_rng(seed)  # numpy: nothing to compile
        params = jax.tree.map(lambda s, r=rng: np.float32(r.normal(0, 0.3, s.shape)), shapes)
        card = {"vocabulary_fingerprint": fingerprint}
        zoo.save_native(model, params, folder / name, card, dtype="float32")
    return folder


@pytest.fixture
def config_file(tmp_path, stories, models):
    """Writes a config file for `finetune` or `distill` with some keys changed; returns its path."""

    def write(kind, **changes):
        config = {
            "steps": 6,
            "batch_size": 4,
            "seed": 3,
            "mesh": {"data": 1},  # eight virtual devices take longer to compile for
            "task": {
                "name": "jsonl",
                "vocabulary": VOCABULARY,
                "train_file": str(stories / "train.jsonl"),
                "validation_file": str(stories / "validation.jsonl"),
                "metric": "exact_match_number",
                "input_length": 41,
                "target_length": 57,
            },
            "optimizer": {"learning_rate": 0.01, "schedule": "constant"},
            "loop": {"log_every": 2, "evaluate_every": 3, "save_every": 2},
        }
        if kind == "finetune":
            config |= {"model": str(models / "draft"), "validation_examples": 5}
        else:
            config |= {"target": str(models / "target"), "draft": str(models / "draft")}
            config["rollout_length"] = 11
            config["decoder"] = {
                "num_prompts": 5,
                "batch_size": 3,
                "gamma": 3,
                "temperatures": (1.0,),
            }
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        path = tmp_path / f"{kind}.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({config!r})\n"
        )
        return path

    return write


@pytest.fixture
def run(enter, config_file, tmp_path):
    """Runs `finetune` or `distill`: (exit code, stdout, stderr)."""
    entrypoints = {
        "finetune": (finetune.main, FinetuneConfig),
        "distill": (distill.main, DistillConfig),
    }

    def run(kind, *overrides, workdir="run", **changes):
        flags = [f"--config={config_file(kind, **changes)}", f"--workdir={tmp_path / workdir}"]
        return enter(*entrypoints[kind], *flags, *overrides)

    return run
