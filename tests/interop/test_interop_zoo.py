"""One name for every model: presets, packaged models, folders and runs, and nothing by mistake."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.errors import UserError
from distillspec_jax.interop import huggingface, orbax
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import PRESETS
from distillspec_jax.sharding.mesh import MeshConfig, make_mesh
from distillspec_jax.sharding.rules import param_shardings
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=26,
    num_pieces=23,
    d_model=10,
    num_heads=2,
    head_dim=3,
    d_ff=8,
    num_encoder_layers=1,
    num_decoder_layers=2,
    layer_norm_epsilon=1e-5,
    dropout_rate=0.25,
)


@pytest.fixture(scope="module")
def tiny(random_model):
    return random_model(CONFIG)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        zoo.load(path)
    assert "\n" not in str(error.value)


def test_a_preset_is_fresh_and_a_function_of_the_seed():
    model, params = zoo.load("cpu_draft", seed=3)
    assert_same(params, zoo.load("cpu_draft", seed=3)[1])
    other = zoo.load("cpu_draft", seed=4)[1]
    assert np.abs(params["embedding"] - other["embedding"]).max() > 1
    assert zoo.describe("cpu_draft")["model"] == dataclasses.asdict(model.config)


def test_packaged_models_fit_the_packaged_vocabulary():
    vocabulary = load_vocabulary("arithmetic_stories")
    assert {"stories-target", "stories-draft"} <= set(zoo.packaged())
    for name in ("stories-target", "stories-draft"):
        described = zoo.describe(name)
        assert described["vocabulary_fingerprint"] == vocabulary.fingerprint
        assert described["model"]["num_pieces"] == vocabulary.size
    model, params = zoo.load("stories-draft")
    assert params["embedding"].shape == (model.config.vocab_size, model.config.d_model)
    assert params["embedding"].dtype == jnp.float32


def test_unknown_and_ambiguous_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("cpu_drfat", "unknown model 'cpu_drfat'; did you mean 'cpu_draft'")
    refused(
        "flan-t5-small", "did you mean 'flan_t5_small'. .no such folder is here, and presets ha"
    )
    refused("./flan_t5_small", "no model at './flan_t5_small': there is no such file or folder")
    refused("stories_target", "did you mean 'stories-target'")
    refused("runs/nothing", "no model at 'runs/nothing': there is no such file or folder")
    (tmp_path / "cpu_draft").mkdir()
    refused("cpu_draft", "is a model of the zoo and a path here; write './cpu_draft' for it")
    refused("./cpu_draft", "no model in")
    (tmp_path / "cpu_draft" / "config.json").write_text('{"d_model": 3}')
    refused("./cpu_draft", "expected a run's workdir")
    refused("cpu_draft/config.json", "is a file of a model; give its folder")
    refused("x" * 300, "unknown model 'xxx")
    os.mkfifo(tmp_path / "pipe")
    refused("./pipe", "no model at '.*/pipe': it is neither a file nor a folder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_folders_round_trip(tmp_path, tiny, dtype):
    model, params = tiny
    card = {"vocabulary_fingerprint": "f" * 64, "command": "train a|b", "steps": 5}
    zoo.save_native(model, params, tmp_path / "x", card, dtype=dtype)
    found, read = zoo.load(tmp_path / "x")
    assert found.config == CONFIG
    assert_same(read, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params))
    described = zoo.describe(tmp_path / "x")
    assert described | card == described
    assert described["kind"] == "native"
    assert "| command | train a b |" in (tmp_path / "x" / "README.md").read_text()
    sizes = {path.name for path in (tmp_path / "x").iterdir()}
    assert sizes == {"model.safetensors", "config.json", "card.json", "README.md"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_mode": 3}, "unknown field 'd_mode'.*did you mean 'd_model'"),
        ({"d_model": "10"}, "d_model is '10', must be"),
        ({"gated": 1}, "gated is 1, must be"),
        ({"d_model": True}, "d_model is True, must be"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"num_decoder_layers": 10**8}, "more than 2048 layers"),
        ({"num_decoder_layers": 3}, "lacks .*decoder/layers_2"),
        ({"num_decoder_layers": 1}, "holds .*decoder/layers_1.* too many"),
        ({"d_ff": 9}, "has shape .* its config asks for"),
        ({"d_ff": None}, "d_ff is None, must be"),
        ({"activation": "tanh"}, "config.json: unknown activation"),
        ({"layer_norm_epsilon": -1.0}, "config.json: layer_norm_epsilon .* is -1.0, must be"),
        ({"relative_max_distance": 16}, "config.json: relative_max_distance .* is 16, must be"),
        ({"num_encoder_layers": -3}, "config.json: num_encoder_layers .* is -3, must be"),
        ({"dropout_rate": 7.5}, "config.json: dropout_rate .* is 7.5, must be"),
        ({"decoder_start_id": 999}, "config.json: decoder_start_id .* is 999, must be"),
        ({"pad_id": 77}, "config.json: pad_id .* is 77, must be"),
        ({"eos_id": 77}, "config.json: eos_id .* is 77, must be"),
        ({"eos_id": -1}, "config.json has eos_id -1, must be the id of a piece"),
    ],
)
def test_a_native_config_that_does_not_fit_is_refused(tmp_path, tiny, fields, message):
    zoo.save_native(*tiny, tmp_path / "x", {})
    path = tmp_path / "x" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"model": stored["model"] | fields}))
    refused(tmp_path / "x", message)


def test_a_model_whose_texts_nothing_ends_has_no_place_in_a_file(tmp_path, tiny):
    model = zoo.model(dataclasses.replace(CONFIG, eos_id=-1))  # as a benchmark has it
    for write in (
        lambda: zoo.save_native(model, tiny[1], tmp_path / "x", {}),
        lambda: orbax.save(model, tiny[1], tmp_path / "x", {}),
        lambda: huggingface.save(model, tiny[1], tmp_path / "x"),
    ):
        with pytest.raises(UserError, match="model 'tiny' has eos_id -1, must be the id of"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path, tiny):
    params = jax.tree.map(lambda leaf: 1e6 * leaf, tiny[1])
    with pytest.raises(UserError, match=r"tensor 'embedding' holds .*e\+06, more than float16"):
        zoo.save_native(tiny[0], params, tmp_path / "x", {}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_other_native_folders_that_are_refused(tmp_path, tiny):
    zoo.save_native(*tiny, tmp_path / "x", {})
    path = tmp_path / "x" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"version": 2}))
    refused(tmp_path / "x", "version 2, this version of distillspec_jax reads 1")
    path.write_text(json.dumps(stored | {"model": None}))
    refused(tmp_path / "x", "has no fields of a model")
    del stored["model"]["d_ff"]
    path.write_text(json.dumps(stored))
    refused(tmp_path / "x", "lacks d_ff")
    with pytest.raises(UserError, match="exists already"):
        zoo.save_native(*tiny, tmp_path / "x", {})


def test_a_run_gives_its_best_checkpoint(tmp_path, tiny):
    _, params = tiny
    optimizer = make_optimizer(OptimizerConfig(), 10)
    description = {"model": dataclasses.asdict(CONFIG), "vocabulary_fingerprint": "e" * 64}
    checkpoints = Checkpoints(tmp_path, description)
    state = TrainState.create(params, optimizer, seed=0)
    for step, best in ((2, True), (4, False)):
        shifted = jax.tree.map(lambda leaf, step=step: leaf + step, params)
        state = state.replace(step=jnp.int32(step), params=shifted)
        checkpoints.save(state, {}, best=best)
    checkpoints.wait()
    checkpoints.close()
    found, read = zoo.load(tmp_path)
    assert found.config == CONFIG
    assert_same(read, jax.tree.map(lambda leaf: leaf + 2, params))
    assert_same(
        zoo.load(tmp_path / "checkpoints" / "4")[1], jax.tree.map(lambda leaf: leaf + 4, params)
    )
    described = zoo.describe(tmp_path)
    assert (described["kind"], described["step"]) == ("run", 2)
    assert described["vocabulary_fingerprint"] == "e" * 64


def test_orbax_out_and_in(tmp_path, tiny):
    model, params = tiny
    orbax.save(model, params, tmp_path / "run", {"step": 12, "vocabulary_fingerprint": "a"})
    found, read = zoo.load(tmp_path / "run")
    assert found.config == CONFIG
    assert_same(read, params)
    described = zoo.describe(tmp_path / "run")
    assert (described["step"], described["vocabulary_fingerprint"]) == (12, "a")
    with pytest.raises(UserError, match="exists already"):
        orbax.save(model, params, tmp_path / "run", {})


# reads of a damaged checkpoint that were under way end in threads of TensorStore, at any time
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_runs_are_refused(tmp_path, tiny):
    def damaged(change):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        orbax.save(*tiny, tmp_path / "run", {})
        change(tmp_path / "run" / "checkpoints" / "0")
        return tmp_path / "run"

    refused(damaged(shutil.rmtree), "there is no checkpoint in")
    refused(damaged(lambda step: shutil.rmtree(step / "params" / "d")), "is damaged")
    refused(damaged(lambda step: (step / "params" / "_METADATA").write_text("x")), "is damaged")
    text = "description/metadata"
    refused(damaged(lambda step: (step / text).write_text("{")), "description cannot be read")
    refused(damaged(lambda step: (step / text).write_text("{}")), "not a checkpoint of this")

    def other_shape(step):
        stored = json.loads((step / text).read_text())
        stored["model"]["d_ff"] = 9
        (step / text).write_text(json.dumps(stored))
        refused(step, "is damaged: its texts are not those that were saved")
        del stored["seal"]
        (step / text).write_text(json.dumps(stored))

    def other_sums(step):
        stored = json.loads((step / text).read_text())
        stored["sums"][0] += 1
        del stored["seal"]
        (step / text).write_text(json.dumps(stored))

    refused(damaged(other_sums), "its weights are not those it was saved with")

    refused(damaged(other_shape), "has shape .* its config asks for")
    run = damaged(lambda step: (step / text).write_text("[" * 10**5))
    refused(run / "checkpoints" / "0", "description cannot be read")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bits_of_weights_are_refused_or_harmless(tmp_path):
    model, params = zoo.load("cpu_draft")
    orbax.save(model, params, tmp_path / "run", {})
    place = tmp_path / "run" / "checkpoints" / "0" / "params"
    file = max(place.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content, rng, noticed = file.read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(len(content), size=8):
        flipped = content[at] ^ 1 << int(rng.integers(8))
        file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        try:
            assert_same(zoo.load(tmp_path / "run")[1], params)
        except UserError as error:
            noticed += "is damaged" in str(error)
    assert noticed > 5


@pytest.mark.parametrize("linked", ["params", "params/d", "description", "description/metadata"])
def test_links_out_of_a_run_are_refused(tmp_path, tiny, linked):
    orbax.save(*tiny, tmp_path / "run", {})
    path = tmp_path / "run" / "checkpoints" / "0" / linked
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    refused(tmp_path / "run", f"checkpoints/0/{linked} is a link")


@pytest.mark.parametrize("kind", ["preset", "native", "run"])
def test_every_kind_goes_straight_to_its_shards(tmp_path, tiny, kind, monkeypatch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    if kind == "native":
        zoo.save_native(*tiny, tmp_path / "x", {}, dtype="float32")
    elif kind == "run":
        orbax.save(*tiny, tmp_path / "x", {})
    monkeypatch.setitem(PRESETS, "tiny", tiny[0].config)
    name = "tiny" if kind == "preset" else tmp_path / "x"
    _, whole = zoo.load(name)
    model, split = zoo.load(name, shardings=lambda c: param_shardings(zoo.model(c), mesh))
    assert_same(whole, split)
    for leaf, wanted in zip(
        jax.tree.leaves(split), jax.tree.leaves(param_shardings(model, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


@pytest.mark.parametrize("kind", ["native", "run"])
def test_bfloat16_parameters(tmp_path, tiny, kind):
    if kind == "native":
        zoo.save_native(*tiny, tmp_path / "x", {}, dtype="float32")
    else:
        orbax.save(*tiny, tmp_path / "x", {})
    _, found = zoo.load(tmp_path / "x", dtype="bfloat16")
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny[1]))
    with pytest.raises(UserError, match="float32 or bfloat16"):
        zoo.load(tmp_path / "x", dtype="float16")


def test_a_vocabulary_beside_the_weights_says_which_rows_are_padding(tmp_path, random_model):
    vocabulary = load_vocabulary("arithmetic_stories")
    config = dataclasses.replace(CONFIG, vocab_size=440, num_pieces=440)
    spiece = {"spiece.model": stories_model().read_bytes()}
    huggingface.save(*random_model(config), tmp_path / "x", extra_files=spiece)
    assert zoo.load(tmp_path / "x")[0].config.num_pieces == vocabulary.size
    assert zoo.describe(tmp_path / "x")["vocabulary_fingerprint"] == vocabulary.fingerprint

    small = dataclasses.replace(config, vocab_size=30, num_pieces=30)
    huggingface.save(*random_model(small), tmp_path / "y", extra_files=spiece)
    refused(tmp_path / "y", f"has {vocabulary.size} pieces, the model only 30 rows")

    (tmp_path / "x" / "spiece.model").unlink()
    assert zoo.load(tmp_path / "x")[0].config.num_pieces == 440
    (tmp_path / "x" / "spiece.model").symlink_to(stories_model())
    refused(tmp_path / "x", "is a link out of the folder")


def stories_model():
    return Path(zoo.__file__).parent / "data/vocabularies/arithmetic_stories.model"


def test_a_broken_vocabulary_beside_the_weights_is_no_missing_one(tmp_path, random_model):
    broken = {"spiece.model": b"broken"}
    huggingface.save(*random_model(CONFIG), tmp_path / "x", extra_files=broken)
    with pytest.raises(UserError, match=r"spiece\.model"):
        zoo.describe(tmp_path / "x")


def test_byt5_needs_no_vocabulary_file(tmp_path, random_model):
    config = dataclasses.replace(CONFIG, vocab_size=400, num_pieces=400)
    settings = {"tokenizer_config.json": b'{"tokenizer_class": "ByT5Tokenizer"}'}
    huggingface.save(*random_model(config), tmp_path / "x", extra_files=settings)
    assert zoo.load(tmp_path / "x")[0].config.num_pieces == 384


@pytest.mark.parametrize("step", ["../../../escaped", "3000 of 3000", -1, 2.0, True, None])
def test_a_step_that_is_no_number_names_no_folder(tiny, tmp_path, step):
    with pytest.raises(UserError, match=r"step of the description is .*; it must be"):
        orbax.save(*tiny, tmp_path / "a" / "b" / "run", {"step": step})
    assert list(tmp_path.iterdir()) == []
