"""Hugging Face folders: bit-exact both ways, every field of the config counted or refused."""

import functools
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillspec_jax import zoo
from distillspec_jax.errors import UserError
from distillspec_jax.interop import folders, huggingface, huggingface_config, layout
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import score

ODD_CASES = (0, 5, 9)  # tied without scaled logits, or scaled without being tied
USUAL_CASES = sorted({*range(14)} - {*ODD_CASES})
FINAL_NORM = "decoder.final_layer_norm.weight"


@pytest.fixture
def folder(tmp_path, make_folder):
    """An untied T5 (case 2) to damage."""
    make_folder(tmp_path / "t5", 2)
    return tmp_path / "t5"


def edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def rewrite(folder, change):
    """Changes the tensors of a folder and writes them again."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        zoo.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", USUAL_CASES)
def test_round_trip_is_bit_exact(tmp_path, make_folder, index):
    _, tensors = make_folder(tmp_path / "in", index)
    model, params = zoo.load(tmp_path / "in")
    huggingface.save(model, params, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(found[name].view(np.uint32), tensors[name].view(np.uint32))
    again, again_params = zoo.load(tmp_path / "out")
    assert again.config == ModelConfig(**vars(model.config) | {"name": "out"})
    jax.tree.map(np.testing.assert_array_equal, params, again_params)


@pytest.mark.parametrize("index", ODD_CASES)
def test_an_export_means_the_same_to_transformers_4_and_5(tmp_path, make_folder, index):
    """4 has one flag for what is tied and what is scaled, so the scale moves into the last norm."""
    _, tensors = make_folder(tmp_path / "in", index)
    model, params = zoo.load(tmp_path / "in")
    assert model.config.scale_logits is not model.config.tie_embeddings
    huggingface.save(model, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["scale_decoder_outputs"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name in tensors.keys() - {FINAL_NORM}:
        np.testing.assert_array_equal(found[name].view(np.uint32), tensors[name].view(np.uint32))

    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(2, 50, (2, 3, 7), dtype=np.int32)

    def logits(model, params):
        return np.asarray(jax.jit(functools.partial(score, model))(params, inputs, targets))

    before = logits(model, params)
    tolerance = 2e-6 * np.abs(before).max()
    for scale in (written["scale_decoder_outputs"], "absent"):  # as 5 reads it, and as 4 does
        edit(tmp_path / "out", scale_decoder_outputs=scale)
        again = zoo.load(tmp_path / "out")
        assert again[0].config.tie_embeddings is model.config.tie_embeddings
        np.testing.assert_allclose(logits(*again), before, rtol=0, atol=tolerance)


def test_the_scale_of_an_mt5_is_that_of_the_transformers_that_wrote_it(tmp_path, make_folder):
    make_folder(tmp_path / "x", 5)  # an mT5, tied

    def is_scaled(**fields):
        edit(tmp_path / "x", **fields)
        return zoo.load(tmp_path / "x")[0].config.scale_logits

    assert not is_scaled()
    assert not is_scaled(transformers_version="5.24.0")
    assert is_scaled(transformers_version="4.57.1")
    assert not is_scaled(tie_word_embeddings="absent")  # 4 ties an mT5 only where it is told to


def test_half_precision_files_round_trip(folder, tmp_path):
    def halve(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype("bfloat16" if "norm" in name else "float16")

    rewrite(folder, halve)
    stored = load_file(folder / "model.safetensors")
    model, params = zoo.load(folder)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    for dtype in ("bfloat16", "float16"):
        huggingface.save(model, params, tmp_path / dtype, dtype=dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")
        same = [name for name in stored if stored[name].dtype == dtype]
        assert same
        for name in same:
            np.testing.assert_array_equal(found[name], stored[name])


def test_a_number_that_the_dtype_cannot_hold_is_refused(folder, tmp_path):
    model, params = zoo.load(folder)
    params["decoder"]["final_norm"]["scale"] *= 1e6
    with pytest.raises(UserError, match=rf"'{FINAL_NORM}' holds .*e\+06, more than float16 can"):
        huggingface.save(model, params, tmp_path / "x", dtype="float16")
    assert not (tmp_path / "x").exists()
    huggingface.save(model, params, tmp_path / "x", dtype="bfloat16")
    params["decoder"]["final_norm"]["scale"] *= np.inf  # was so before: a draft that diverged
    huggingface.save(model, params, tmp_path / "y", dtype="float16")


def test_shards_hold_what_one_file_holds(folder, tmp_path):
    model, params = zoo.load(folder)
    huggingface.save(model, params, tmp_path / "sharded", max_shard_bytes=9000)
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "sharded" / shard)[name], whole[name])
    jax.tree.map(np.testing.assert_array_equal, zoo.load(tmp_path / "sharded")[1], params)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(folder, tmp_path):
    model, params = zoo.load(folder)
    huggingface.save(model, params, tmp_path / "sharded", max_shard_bytes=1)
    tensors = len(load_file(folder / "model.safetensors"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == tensors


def test_copies_of_the_embedding_are_accepted_if_they_are_copies(folder):
    params = zoo.load(folder)[1]

    def add(tensors):
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].copy()
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[unused] = np.ones((3, 4), np.float32)

    rewrite(folder, add)
    jax.tree.map(np.testing.assert_array_equal, zoo.load(folder)[1], params)

    rewrite(folder, lambda tensors: tensors.pop("shared.weight"))
    jax.tree.map(np.testing.assert_array_equal, zoo.load(folder)[1], params)

    def differ(tensors):
        tensors["decoder.embed_tokens.weight"][0, 0] += 1

    rewrite(folder, differ)
    refused(folder, "decoder.embed_tokens.weight differs from encoder.embed_tokens.weight")


@pytest.mark.parametrize(
    ("flag", "head", "tied"),
    [
        (True, "own", False),  # transformers 5 says true always and keeps a matrix that differs
        (True, "copy", True),
        ("absent", "none", True),
        (False, "own", False),
        (False, "copy", False),
    ],
)
def test_who_decides_whether_the_output_matrix_is_tied(folder, flag, head, tied):
    edit(folder, tie_word_embeddings=flag, scale_decoder_outputs="absent")

    def change(tensors):
        own = tensors.pop("lm_head.weight")
        if head != "none":
            tensors["lm_head.weight"] = own if head == "own" else tensors["shared.weight"].copy()

    rewrite(folder, change)
    config = zoo.load(folder)[0].config
    assert config.tie_embeddings is tied
    assert config.scale_logits is (flag is not False)


def test_an_untied_model_without_its_output_matrix_is_refused(folder):
    edit(folder, tie_word_embeddings=False)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, r"lacks 1 tensor \(lm_head.weight\)")


def test_only_a_tied_output_matrix_stands_in_for_the_embedding(folder):
    rewrite(folder, lambda tensors: tensors.pop("shared.weight"))
    edit(folder, tie_word_embeddings=False)
    refused(folder, r"/t5 .*lacks 1 tensor \(shared.weight\)")
    edit(folder, tie_word_embeddings=True)
    model, params = zoo.load(folder)
    assert model.config.tie_embeddings
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(params["embedding"], stored)


def test_dropout_that_is_not_told_is_that_of_t5(folder):
    edit(folder, dropout_rate="absent")
    assert zoo.load(folder)[0].config.dropout_rate == 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert', supported are t5 and mt5"),
        ({"model_type": "umt5"}, "model_type 'umt5'"),
        ({"model_type": "longt5"}, "model_type 'longt5'"),
        ({"architectures": ["T5EncoderModel"]}, "architectures"),
        ({"architectures": 7}, "architectures"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"d_model": "absent"}, "d_model None, must be a positive"),
        ({"d_kv": 0}, "d_kv 0"),
        ({"hidden_size": 3}, "hidden_size 3 but another d_model"),
        ({"num_hidden_layers": 9}, "num_hidden_layers 9 but another num_layers"),
        ({"num_heads": 2.0}, "num_heads 2.0"),
        ({"num_decoder_layers": -1}, "num_decoder_layers -1"),
        ({"num_layers": 10**9}, "more than 2048 layers"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"feed_forward_proj": "gated-tanh"}, "unknown activation of feed_forward_proj 'tanh'"),
        ({"feed_forward_proj": "sparse-relu"}, "must be ACT or gated-ACT"),
        ({"feed_forward_proj": 3}, "must be ACT or gated-ACT"),
        ({"is_gated_act": False}, "another is_gated_act"),
        ({"dense_act_fn": ["x"]}, "unknown activation"),
        ({"relative_attention_max_distance": 3}, "relative_attention_max_distance 3"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets 2"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon 'tiny'"),
        ({"layer_norm_epsilon": -1.0}, "config.json has layer_norm_epsilon -1.0, must be"),
        ({"dropout_rate": 7.5}, "config.json has dropout_rate 7.5, must be"),
        ({"dropout_rate": 10**400}, "dropout_rate 1000.*, must be"),
        ({"eos_token_id": 999}, "eos_token_id 999, must be less than vocab_size"),
        ({"decoder_start_token_id": 999}, "decoder_start_token_id 999, must be less than"),
        ({"pad_token_id": 999}, "pad_token_id 999, must be less than"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'"),
        ({"d_ff": 24}, "has shape .*, its config asks for"),
        ({"num_layers": 7}, "lacks .* tensors"),
        ({"num_decoder_layers": 3}, "holds .*decoder.block.3.* too many"),
        ({"feed_forward_proj": "relu"}, r"lacks .*DenseReluDense\.wi\.weight.*too many"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(folder, fields, message):
    edit(folder, **fields)
    refused(folder, message)


def test_missing_and_surplus_tensors_are_listed(folder):
    def change(tensors):
        tensors["encoder.extra.weight"] = tensors.pop("encoder.final_layer_norm.weight")

    rewrite(folder, change)
    refused(folder, r"lacks .*encoder.final_layer_norm.weight.* holds .*encoder.extra.weight")


def test_special_ids_may_come_from_generation_config_but_not_differ(folder):
    edit(folder, decoder_start_token_id="absent")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"decoder_start_token_id": 5, "eos_token_id": None}))
    assert zoo.load(folder)[0].config.decoder_start_id == 5
    edit(folder, decoder_start_token_id=4)
    refused(folder, "decoder_start_token_id 4, generation_config.json beside it 5")
    edit(folder, decoder_start_token_id="absent")
    generation.write_text(json.dumps({"decoder_start_token_id": 999}))
    refused(folder, "generation_config.json beside .* has decoder_start_token_id 999, must be")


def test_config_that_is_no_json_object(folder):
    for text in ("", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 10**5):
        (folder / "config.json").write_text(text)
        refused(folder, "is not a JSON object")


def test_a_pickle_is_refused_with_the_way_to_convert_it(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickles can run code.*save_pretrained\('")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    weights = folder / "model.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    refused(folder, "is a link out of the folder")
    weights.unlink()
    weights.symlink_to(tmp_path / "nowhere")
    refused(folder, "leads nowhere")
    weights.unlink()
    weights.symlink_to(weights)
    refused(folder, "leads nowhere")
    weights.unlink()
    os.mkfifo(weights)  # opening it would wait for ever
    refused(folder, "is not a regular file")


def test_the_hub_cache_is_the_one_place_that_may_link(folder, tmp_path):
    root = tmp_path / "models--someone--t5"
    snapshot = root / "snapshots" / "abc"
    (root / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(root / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    zoo.load(snapshot)
    (root / "blobs" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../model.safetensors")
    refused(snapshot, "is a link out of the folder")


@pytest.fixture
def sharded(folder, tmp_path):
    huggingface.save(*zoo.load(folder), tmp_path / "sharded", max_shard_bytes=9000)
    return tmp_path / "sharded"


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i["weight_map"].update({"shared.weight": "no.safetensors"}),
            "not there: no.saf",
        ),
        (lambda i: i["weight_map"].update({"x": "../model-00001"}), "not there"),
        (lambda i: i["weight_map"].update({"x": "x" * 300}), "not there: xxx"),
        (lambda i: i["weight_map"].update({"x": "a\0b"}), "not there"),
        (lambda i: i["weight_map"].update({"x": 3}), "no weight_map"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
        (lambda i: i["weight_map"].pop("shared.weight"), "disagree about where.*shared.weight"),
        (lambda i: i["weight_map"].update({"x": next(iter(i["weight_map"].values()))}), "disagree"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, change, message):
    reindex(sharded, change)
    refused(sharded, message)


def test_an_index_that_points_out_of_the_folder_is_refused(sharded, tmp_path):
    first = sorted(sharded.glob("*.safetensors"))[0]
    (tmp_path / first.name).write_bytes(first.read_bytes())

    def change(index):
        for name, shard in index["weight_map"].items():
            if shard == first.name:
                index["weight_map"][name] = f"../{shard}"

    reindex(sharded, change)
    refused(sharded, "is not a plain file name")


def test_the_same_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    refused(sharded, "the same tensor lies in two shards")


def test_nothing_is_overwritten_and_nothing_half_written(folder, tmp_path):
    model, params = zoo.load(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        huggingface.save(model, params, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    broken = jax.tree.map(lambda x: x, params)
    broken["decoder"]["final_norm"]["scale"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="cannot reshape"):
        huggingface.save(model, broken, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t5"]


def test_a_place_within_a_file_is_refused(tmp_path):
    """A folder that cannot be made, and a link that a folder cannot replace."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, message in (
        ("file", "exists already"),
        ("file/x", "file/x cannot be made: .*/file is not a folder"),
        ("file/x/y", "file/x/y cannot be made: .*/file is not a folder"),
        ("link", "exists already"),
        ("link/x", "link/x cannot be made: .*/link is not a folder"),
        ("/", "/ exists already"),
    ):
        with pytest.raises(UserError, match=message), folders.new_folder(tmp_path / place):
            pass
    with folders.new_folder(tmp_path / "x" / "y"):
        pass
    assert (tmp_path / "x" / "y").is_dir()


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    """Whoever is killed in between leaves nothing under the name that was asked for."""
    with folders.new_folder(tmp_path / "new") as unfinished:
        (unfinished / "config.json").write_text("{}")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_told_by_folder_and_leaves_no_part_of_one(tmp_path):
    def write():
        with folders.new_folder(tmp_path / "new") as unfinished:
            (unfinished / "config.json").symlink_to("/dev/full")
            folders.write_json(unfinished / "config.json", {})

    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == str(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_padding_rows_are_suppressed_in_what_is_exported(tmp_path, random_model):
    config = ModelConfig(
        name="padded",
        vocab_size=48,
        num_pieces=43,
        d_model=8,
        num_heads=2,
        head_dim=3,
        d_ff=11,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    _, generation = huggingface_config.write(config, "float32")
    assert generation["suppress_tokens"] == [43, 44, 45, 46, 47]
    huggingface.save(*random_model(config), tmp_path / "out")
    assert zoo.load(tmp_path / "out")[0].config.num_pieces == 43
    path = tmp_path / "out" / "generation_config.json"
    for others in ([3, 44], [46], [], "all"):  # suppressed for other reasons, or not at the end
        path.write_text(json.dumps(generation | {"suppress_tokens": others}))
        assert zoo.load(tmp_path / "out")[0].config.num_pieces == 48


def test_decoder_only_models_have_no_place_there(tmp_path):
    model, params = zoo.load("cpu_draft")
    config = ModelConfig(**vars(model.config) | {"num_encoder_layers": 0})
    with pytest.raises(UserError, match="decoder-only"):
        huggingface.save(zoo.model(config), params, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_published_vocabularies_have_padding_rows():
    assert huggingface_config.num_pieces(32128) == 32100
    assert huggingface_config.num_pieces(250112) == 250100
    assert huggingface_config.num_pieces(384) == 384


def test_the_real_dummy_model(shared_data):
    """A folder of another maker: its tensors arrive, its vocabulary is found."""
    folder = shared_data / "hf_t5_dummy"
    model, params = zoo.load(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 127_712
    tensors = load_file(folder / "model.safetensors")
    assert layout.num_parameters(model.config) == sum(array.size for array in tensors.values())
    name = "decoder.block.3.layer.1.EncDecAttention.k.weight"
    found = params["decoder"]["layers_3"]["cross_attention"]["key_value"][:, 0].reshape(32, 32)
    np.testing.assert_array_equal(found, tensors[name].T)
    described = zoo.describe(folder)
    assert described["vocabulary_size"] == model.config.num_pieces == 1302
    assert len(described["vocabulary_fingerprint"]) == 64
