"""Wherever a draft meets a target: the same pieces and special ids, or one sentence and nothing."""

import json
import shutil

import pytest

from experiments import decode, distill, evaluate, finetune
from experiments.decoder import DecodeConfig
from experiments.distill import DistillConfig
from experiments.evaluate import EvaluateConfig
from experiments.finetune import FinetuneConfig

DOORS = ("distill", "evaluate", "decode")
STRANGERS = {
    "pieces": ({}, "0" * 64, "fingerprint of the pieces f46db506f80f... and 000000000000..."),
    "size": ({"num_pieces": 421}, None, "number of pieces 423 and 421"),
    "pad": ({"pad_id": 3}, None, "id of padding 0 and 3"),
    "eos": ({"eos_id": 2}, None, "id of the end of sequence 1 and 2"),
    "start": ({"decoder_start_id": 5}, None, "id that starts decoding 0 and 5"),
    "all": (
        {"pad_id": 3, "eos_id": 2},
        None,
        "id of padding 0 and 3; id of the end of sequence 1 and 2",
    ),
}


@pytest.fixture
def stranger(models, tmp_path):
    """what of STRANGERS -> folder of a draft that differs in it from the target."""

    def make(what):
        fields, pieces, _ = STRANGERS[what]
        folder = tmp_path / "stranger"
        shutil.copytree(models / "draft", folder)
        config = json.loads((folder / "config.json").read_text())
        config["model"] |= fields
        (folder / "config.json").write_text(json.dumps(config))
        card = json.loads((folder / "card.json").read_text())
        card["vocabulary_fingerprint"] = pieces or card["vocabulary_fingerprint"]
        (folder / "card.json").write_text(json.dumps(card))
        (folder / "model.safetensors").unlink()  # refused before any weights are read
        return str(folder)

    return make


@pytest.fixture
def knock(enter, config_file, models, stories, tmp_path):
    """Runs an entrypoint on the target and some draft: (exit code, stderr)."""
    target = str(models / "target")

    def write(values):
        path = tmp_path / "config.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({values!r})\n"
        )
        return path

    def knock(door, draft):
        if door == "distill":
            main, config_class, path = distill.main, DistillConfig, config_file(door, draft=draft)
        elif door == "evaluate":
            task = {"name": "jsonl", "vocabulary": "arithmetic_stories"}
            task["validation_file"] = str(stories / "validation.jsonl")
            drafts = ({"name": "draft", "path": draft},)
            values = {"target": target, "drafts": drafts, "task": task, "split": "validation"}
            main, config_class, path = evaluate.main, EvaluateConfig, write(values)
        else:
            values = {"target": target, "draft": draft, "prompt": ("Tom has 3 apples .",)}
            main, config_class, path = decode.main_with_flags, DecodeConfig, write(values)
        code, _, err = enter(
            main, config_class, f"--config={path}", f"--workdir={tmp_path / 'run'}"
        )
        return code, err

    return knock


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("door", DOORS)
def test_a_draft_of_another_vocabulary_is_refused(door, what, knock, stranger, tmp_path):
    path = stranger(what)
    code, err = knock(door, path)
    assert code == 2
    assert err.startswith("error: target '")
    assert f"draft '{path}' have different vocabularies: {STRANGERS[what][-1]}; pieces" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_draft_of_another_kind_is_refused(door, knock, tmp_path):
    code, err = knock(door, "lm1b_33m")
    assert code == 2
    assert "is an encoder-decoder but draft 'lm1b_33m' is decoder-only" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["pieces", "pad", "eos"])
def test_a_model_that_does_not_speak_the_task_is_refused(
    what, enter, config_file, stranger, tmp_path
):
    path = config_file("finetune", model=stranger(what))
    flags = f"--config={path}", f"--workdir={tmp_path / 'run'}"
    code, _, err = enter(finetune.main, FinetuneConfig, *flags)
    assert code == 2
    assert "stranger' and the task have different vocabularies: " in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
