"""Conversion from the command line: every pair of formats, and nothing by halves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file

from distillspec_jax import zoo
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.errors import UserError
from experiments import convert, tokenizers

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("from", "to", "format", "dtype", "verify", "tokenizer", "encoder_layers")
FLAGS += ("decoder_layers", "d_model", "num_heads", "d_ff", "fresh")


@pytest.fixture
def run(capsys):
    """--flag=value... -> what it prints."""

    def run(**values):
        flags.FLAGS(["prog", *(f"--{name}={value}" for name, value in values.items())])
        try:
            convert.main()
        finally:
            flags.FLAGS.unparse_flags()
            for name in FLAGS:
                flags.FLAGS[name].unparse()
        return capsys.readouterr().out

    return run


def from_to(source, folder, **more):
    return {"from": source, "to": folder, **more}


@pytest.mark.parametrize("second", convert.FORMATS)
@pytest.mark.parametrize("first", convert.FORMATS)
def test_every_pair_of_formats_keeps_every_bit(tmp_path, run, first, second):
    run(**from_to("stories-draft", tmp_path / "a", format=first))
    said = run(**from_to(tmp_path / "a", tmp_path / "b", format=second, verify=True))
    assert "largest difference of logits: 0 (0 of the largest logit)" in said
    params = zoo.load("stories-draft")[1]
    jax.tree.map(np.testing.assert_array_equal, params, zoo.load(tmp_path / "b")[1])


def test_t5x_to_everything(tmp_path, run, shared_data):
    source = shared_data / "t5x_testdata" / "test_t5_tiny.checkpoint_0"
    for kind in convert.FORMATS:
        said = run(**from_to(source, tmp_path / kind, format=kind, verify=True))
        assert "t5x, 518,240 parameters" in said
        assert "largest difference of logits: 0 " in said


def test_verify_tells_what_rounding_cost(tmp_path, run):
    said = run(**from_to("cpu_draft", tmp_path / "a", dtype="bfloat16", verify=True))
    difference = float(said.split("largest difference of logits: ")[1].split()[0])
    assert 1e-4 < difference < 1
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"bfloat16"}


def test_a_draft_is_cut_out_of_a_target(tmp_path, run):
    sizes = {"d_model": 32, "num_heads": 2, "d_ff": 40, "decoder_layers": "0,4"}
    said = run(**from_to("stories-target", tmp_path / "d", format="native", **sizes))
    assert "cut to" in said
    config = zoo.load(tmp_path / "d")[0].config
    assert (config.name, config.d_model, config.num_heads, config.d_ff) == ("d", 32, 2, 40)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (2, 2)
    card = json.loads((tmp_path / "d" / "card.json").read_text())
    assert "steps" not in card  # they were the target's
    assert card["vocabulary_fingerprint"] == load_vocabulary("arithmetic_stories").fingerprint


def test_a_fresh_draft_reads_no_weights(tmp_path, run, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("read"))
    said = run(**from_to("stories-target", tmp_path / "a", fresh=1, d_ff=40, format="native"))
    assert re.search(r"parameters\ncut to [\d,]+ parameters\nweights drawn anew, seed 1\n", said)


def test_a_fresh_draft_has_the_shape_and_the_vocabulary_alone(tmp_path, run):
    sizes = {"d_model": 32, "num_heads": 2, "d_ff": 40, "decoder_layers": "0,4", "format": "native"}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        said = run(**from_to("stories-target", tmp_path / name, fresh=seed, **sizes))
        assert f"weights drawn anew, seed {seed}" in said
    run(**from_to("stories-target", tmp_path / "cut", **sizes))
    a, b, c, cut = (zoo.load(tmp_path / name)[1] for name in ("a", "b", "c", "cut"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for other in (c, cut):
        assert np.abs(a["embedding"] - other["embedding"]).max() > 0.1
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert "steps" not in card
    assert card["vocabulary_fingerprint"] == load_vocabulary("arithmetic_stories").fingerprint


def test_the_card_of_a_model_goes_with_it(tmp_path, run):
    run(**from_to("stories-draft", tmp_path / "a", format="native"))
    card, source = (zoo.describe(name) for name in (tmp_path / "a", "stories-draft"))
    assert (card["command"], card["seed"]) == (source["command"], source["seed"])
    assert card["converted_from"] == "stories-draft"


def test_tokenizers_go_with_the_weights(tmp_path, run):
    run(**from_to("stories-draft", tmp_path / "a"))
    stories = load_vocabulary("arithmetic_stories")
    assert load_vocabulary(tmp_path / "a").fingerprint == stories.fingerprint
    run(**from_to(tmp_path / "a", tmp_path / "b"))
    for name in ("spiece.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "no tokenizer is known" in run(**from_to("cpu_draft", tmp_path / "c"))
    run(**from_to("cpu_draft", tmp_path / "d", tokenizer=tmp_path / "a"))
    assert (tmp_path / "d" / "spiece.model").exists()
    run(**from_to("cpu_draft", tmp_path / "e", tokenizer=tmp_path / "a" / "spiece.model"))
    settings = json.loads((tmp_path / "e" / "tokenizer_config.json").read_text())
    assert settings["extra_ids"] == 0


def test_a_tokenizer_of_other_pieces_is_refused_unread(tmp_path, run, shared_data, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_: pytest.fail("read the weights"))
    other = shared_data / "t5_sentencepiece" / "seqio_test_vocab" / "sentencepiece.model"
    with pytest.raises(UserError, match=r"the model and --tokenizer=.* have different vocab"):
        run(**from_to("stories-draft", tmp_path / "a", tokenizer=other))
    found = {"kind": "run", "model": {"vocab_size": 20}}
    with pytest.raises(UserError, match="has 26 pieces, the model only 20 rows"):
        tokenizers.files_for(str(other), found)
    assert list(tmp_path.iterdir()) == []


def test_t5_gets_its_hundred_sentinels(shared_data):
    found = {"kind": "run", "model": {"vocab_size": 32128}}
    files = tokenizers.files_for(str(shared_data / "t5_sentencepiece" / "spiece.model"), found)
    assert json.loads(files["tokenizer_config.json"])["extra_ids"] == 100


def test_the_folder_of_a_byt5_is_a_tokenizer(tmp_path):
    settings = b'{"tokenizer_class": "ByT5Tokenizer"}'
    (tmp_path / "tokenizer_config.json").write_bytes(settings)
    found = {"kind": "run", "model": {"vocab_size": 384}}
    assert tokenizers.files_for(str(tmp_path), found) == {"tokenizer_config.json": settings}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"to": "x"}, "--from=MODEL and --to=FOLDER are needed"),
        ({"from": "cpu_draft"}, "--from=MODEL and --to=FOLDER are needed"),
        (from_to("cpu_drat", "x"), "did you mean 'cpu_draft'"),
        (from_to("cpu_draft", "x", format="hugging"), "did you mean 'huggingface'"),
        (from_to("cpu_draft", "x", dtype="int8"), "--dtype=int8 must be"),
        (from_to("cpu_draft", "x", format="orbax", dtype="bfloat16"), "leave --dtype out"),
        (from_to("cpu_draft", "x", encoder_layers="0,a"), "--encoder_layers=0,a must be numbers"),
        (from_to("cpu_draft", "x", decoder_layers="3"), "must be numbers in order within 0 and 0"),
        (from_to("cpu_draft", "x", tokenizer="nowhere"), "nowhere"),
        (
            from_to("cpu_draft", "x", tokenizer="nowhere", format="native"),
            "--tokenizer=nowhere goes with --format=huggingface alone",
        ),
        (from_to("lm1b_33m", "x"), "decoder-only"),
        (from_to("cpu_draft", "x", fresh=-1), "--fresh is -1, must be within 0"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, monkeypatch, run, values, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(**values)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, run):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("precious")
    for kind in convert.FORMATS:
        with pytest.raises(UserError, match="exists already and is not an empty folder"):
            run(**from_to("cpu_draft", tmp_path / "x", format=kind))
    assert [path.read_text() for path in (tmp_path / "x").iterdir()] == ["precious"]


def test_the_command_leaves_with_2_and_one_sentence(tmp_path):
    for arguments, message in (
        (["--from=nothing/here", f"--to={tmp_path / 'x'}"], "error: no model at 'nothing/here'"),
        (["--form=native"], "error: bad flags: Unknown command line flag 'form'"),
        (["extra"], "error: 'extra' is not a flag"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.convert", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
