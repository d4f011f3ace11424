"""T5X checkpoints: one msgpack file, zarr folders, scanned or not, all to the same bits."""

import itertools
import json
import re
import tracemalloc

import jax
import msgpack
import numpy as np
import pytest
import tensorstore
from flax import serialization, traverse_util
from safetensors.numpy import load_file

from distillspec_jax import zoo
from distillspec_jax.errors import UserError
from distillspec_jax.interop import folders, huggingface, msgpack_files
from distillspec_jax.interop.msgpack_files import MsgpackFile

MUTATIONS = 4000
D, N, H, F, V, ENCODER, DECODER = 10, 3, 5, 7, 13, 2, 4
ROLES = {"q": "query", "k": "key", "v": "value", "o": "out"}


def t5x_name(name):
    """Hugging Face's name in T5X, by a rule of its own and not by the project's table."""
    fixed = {
        "shared.weight": "token_embedder/embedding",
        "lm_head.weight": "decoder/logits_dense/kernel",
    }
    if name in fixed:
        return fixed[name]
    if "relative_attention_bias" in name:
        return f"{name.partition('.')[0]}/relpos_bias/rel_embedding"
    if match := re.fullmatch(r"(\w+)\.final_layer_norm\.weight", name):
        return f"{match[1]}/{match[1]}_norm/scale"
    stack, index, sub, rest = re.fullmatch(r"(\w+)\.block\.(\d+)\.layer\.(\d)\.(.+)", name).groups()
    attentions = {"encoder": ["attention"], "decoder": ["self_attention", "cross_attention"]}[stack]
    here = [*attentions, "mlp"][int(sub)]
    if rest == "layer_norm.weight":
        return f"{stack}/layers_{index}/pre_{here}_layer_norm/scale"
    kernel = rest.split(".")[-2]
    here = "encoder_decoder_attention" if here == "cross_attention" else here
    return f"{stack}/layers_{index}/{here}/{ROLES.get(kernel, kernel)}/kernel"


def parameters(gated=True, tied=False, seed=0):
    """A random T5 as T5X names and shapes it."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embedder/embedding": (V, D)}
    if not tied:
        shapes["decoder/logits_dense/kernel"] = (D, V)
    for stack, depth in (("encoder", ENCODER), ("decoder", DECODER)):
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (N, 8)
        shapes[f"{stack}/{stack}_norm/scale"] = (D,)
        for i in range(depth):
            here = f"{stack}/layers_{i}"
            names = ["self_attention", "encoder_decoder_attention"]
            names = ["attention"] if stack == "encoder" else names
            norms = ["pre_self_attention", "pre_cross_attention"]
            norms = ["pre_attention"] if stack == "encoder" else norms
            for norm in [*norms, "pre_mlp"]:
                shapes[f"{here}/{norm}_layer_norm/scale"] = (D,)
            for name in names:
                for role in ("query", "key", "value"):
                    shapes[f"{here}/{name}/{role}/kernel"] = (D, N * H)
                shapes[f"{here}/{name}/out/kernel"] = (N * H, D)
            for kernel in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{here}/mlp/{kernel}/kernel"] = (D, F)
            shapes[f"{here}/mlp/wo/kernel"] = (F, D)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def scanned(flat, heads_apart=False):
    """Layers stacked along axis 1; kernels of attention as (D, L, N, H) where asked for."""
    found, depth = {}, {"encoder": ENCODER, "decoder": DECODER}
    for name, array in flat.items():
        stack, _, rest = name.partition("/")
        if rest == "relpos_bias/rel_embedding":
            found[f"{stack}/{stack}/{rest}"] = np.stack([array] * depth[stack], axis=1)
        elif not rest.startswith("layers_"):
            found[name] = array
        elif rest.startswith("layers_0/"):
            rest = rest.removeprefix("layers_0/")
            layers = [flat[f"{stack}/layers_{i}/{rest}"] for i in range(depth[stack])]
            if heads_apart and "attention/" in rest:
                split = (N, H, D) if "/out/" in rest else (D, N, H)
                layers = [layer.reshape(split) for layer in layers]
            found[f"{stack}/{stack}/{rest}"] = np.stack(layers, axis=1)
    return found


def nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


def write_msgpack(path, flat):
    state = {"step": np.int32(3), "param_states": {"x": np.zeros((2, 3), np.float32)}}
    tree = {"version": 3, "optimizer": {"target": nested(flat), "state": state}}
    path.write_bytes(serialization.msgpack_serialize(tree))


def write_zarr(folder, flat, style="spec", dtype="float32"):
    """A folder as T5X writes it: arrays of rank 2 and up beside the file, the rest within."""
    folder.mkdir(parents=True)
    tree = {}
    for name, array in flat.items():
        if array.ndim < 2:
            tree[name] = array
            continue
        sub = f"target.{name.replace('/', '.')}"
        chunks = [-(-size // 2) for size in array.shape]
        spec = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": f"{folder}/{sub}"},
            "metadata": {
                "compressor": {"id": "gzip"},
                "shape": list(array.shape),
                "chunks": chunks,
            },
        }
        store = tensorstore.open(tensorstore.Spec(spec), create=True, open=True).result()
        store.write(array.astype(store.dtype.numpy_dtype)).result()
        if style == "spec":
            spec["kvstore"]["path"] = sub
            tree[name] = spec
        elif style == "old":  # TensorStore before 0.1.14, written on a cloud
            spec["kvstore"] = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
            tree[name] = spec | {"path": sub}
        else:
            tree[name] = f"PLACEHOLDER://{sub}"
    flat = {tuple(name.split("/")): value for name, value in tree.items()}
    tree = {"version": 3, "optimizer": {"target": traverse_util.unflatten_dict(flat)}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def assert_exported(params_of, flat, folder):
    """Loads, exports to Hugging Face, and compares every bit with what T5X held."""
    model, params = zoo.load(params_of)
    huggingface.save(model, params, folder)
    found = load_file(folder / "model.safetensors")
    wanted = {t5x_name(name): name for name in found}
    assert wanted.keys() == flat.keys()
    for name, array in flat.items():
        stored = found[wanted[name]]
        stored = stored if name == "token_embedder/embedding" else stored.T
        np.testing.assert_array_equal(stored.view(np.uint32), array.view(np.uint32), name)
    return model.config


@pytest.mark.parametrize(("gated", "tied"), [(True, False), (False, True)])
def test_msgpack_to_hugging_face_is_bit_exact(tmp_path, gated, tied):
    flat = parameters(gated, tied)
    write_msgpack(tmp_path / "checkpoint_3", flat)
    config = assert_exported(tmp_path / "checkpoint_3", flat, tmp_path / "hf")
    assert (config.num_encoder_layers, config.num_decoder_layers) == (ENCODER, DECODER)
    assert (config.num_heads, config.head_dim, config.d_ff) == (N, H, F)
    assert config.tie_embeddings is config.scale_logits is tied
    assert (config.gated, config.activation) == ((True, "gelu_new") if gated else (False, "relu"))
    assert config.relative_buckets == 8


@pytest.mark.parametrize("style", ["spec", "old", "placeholder"])
def test_zarr_folders_are_bit_exact(tmp_path, style):
    flat = parameters()
    write_zarr(tmp_path / "checkpoint_7", flat, style)
    assert_exported(tmp_path / "checkpoint_7", flat, tmp_path / "hf")


@pytest.mark.parametrize("heads_apart", [False, True])
@pytest.mark.parametrize("storage", [write_msgpack, write_zarr])
def test_scanned_layers_are_bit_exact(tmp_path, storage, heads_apart):
    flat = parameters(seed=1)
    storage(tmp_path / "checkpoint_7", scanned(flat, heads_apart))
    assert_exported(tmp_path / "checkpoint_7", flat, tmp_path / "hf")


def test_bfloat16_arrays(tmp_path):
    flat = parameters()
    write_zarr(tmp_path / "c", flat, dtype="bfloat16")
    found = zoo.load(tmp_path / "c")[1]["embedding"]
    wanted = flat["token_embedder/embedding"].astype("bfloat16").astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_the_real_checkpoint(shared_data, tmp_path):
    path = shared_data / "t5x_testdata" / "test_t5_tiny.checkpoint_0"
    tree = serialization.msgpack_restore(path.read_bytes())["optimizer"]["target"]
    flat = traverse_util.flatten_dict(tree, sep="/")
    config = assert_exported(path, flat, tmp_path / "hf")
    assert (config.num_pieces, config.vocab_size) == (32100, 32128)
    assert sum(array.size for array in flat.values()) == 518_240


def test_a_model_dir_means_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        write_zarr(tmp_path / f"checkpoint_{step}", parameters(seed=step))
    (tmp_path / "checkpoint_11").mkdir()  # what a killed job left behind
    found = zoo.load(tmp_path)[1]["embedding"]
    np.testing.assert_array_equal(found, parameters(seed=10)["token_embedder/embedding"])


def test_a_step_may_be_written_with_leading_zeros(tmp_path):
    for name in ("checkpoint_0100", "checkpoint_99"):
        write_zarr(tmp_path / name, parameters(seed=int(name[-2:])))
    found = zoo.load(tmp_path)[1]["embedding"]
    np.testing.assert_array_equal(found, parameters(seed=0)["token_embedder/embedding"])


def test_gin_tells_the_activation_and_must_agree(tmp_path):
    write_zarr(tmp_path / "checkpoint_1", parameters())
    gin = tmp_path / "config.gin"
    text = "network.T5Config.{}\nnetwork.T5Config.dropout_rate = %DROPOUT\n"
    gin.write_text(text.format("mlp_activations = ('silu', 'linear')"))
    assert zoo.load(tmp_path)[0].config.activation == "silu"
    gin.write_text(text.format("dropout_rate = 0.5") + "DROPOUT = 0.25\n")
    assert zoo.load(tmp_path)[0].config.dropout_rate == 0.25  # the last one counts
    for line, message in (
        ("mlp_activations = ('tanh', 'linear')", "mlp_activations .*not supported"),
        ("mlp_activations = ('relu',)", "mlp_activations .*not supported"),
        ("num_heads = 5", "num_heads = 5, its tensors say 3"),
        ("logits_via_embedding = True", "logits_via_embedding = True, its tensors say False"),
        ("emb_dim = 7\nDROPOUT = 7.0", "emb_dim = 7, its tensors say 10"),
        ("num_heads = 3\nDROPOUT = 7.0", "/checkpoint_1: dropout_rate .* is 7.0, must be"),
    ):
        gin.write_text(text.format(line))
        refused(tmp_path, message)
    gin.write_text("network.T5Config.emb_dim = %SIZE")  # what shapes tell need not be read
    assert zoo.load(tmp_path)[0].config.d_model == D


MLP = "network.T5Config.mlp_activations"


@pytest.mark.parametrize(
    "text",
    [
        f"{MLP} = ('silu', 'linear')  # not ('gelu', 'linear')\n",
        f"{MLP} = ('silu',  # gated\n    'linear')\n",
        f"{MLP} = [\n    'silu',\n\n    'linear',\n]\nx.y = 3\n",
        f"{MLP} = \\\n    ('silu', \\\n    'linear')\n",
        f"{MLP} = %ACT\nACT = %OTHER\nOTHER = \\\n  ('silu', 'linear')\n",
        f"decoder/{MLP} = ('silu', 'linear')\n",
        f"a/b/{MLP} = ('silu', 'linear')\n{MLP} = ('silu', 'linear')\n",
        f"{MLP} = ('gelu', 'linear')\n{MLP}=('silu', 'linear')",
        "T5Config:\n  # of the MLP\n  emb_dim = 10\n\n  mlp_activations = (\n'silu',\n'linear')\n",
        f"x.y = '#(['\n{MLP} = ('silu', 'linear')\n",
        f"x.y = 'it\\'s ('\n{MLP} = ('silu', 'linear')\n",
        f"it's no gin\n{MLP} = ('silu', 'linear')\n",
        f"x.T5Config:\n  emb_dim = 10\nother.mlp_activations = 3\n{MLP} = ('silu', 'linear')\n",
    ],
)
def test_gin_tells_the_activation_in_whatever_form(tmp_path, text):
    write_msgpack(tmp_path / "checkpoint", parameters())
    (tmp_path / "config.gin").write_text(text)
    assert zoo.load(tmp_path)[0].config.activation == "silu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{MLP} = __import__('os').system('false')", r"__import__\('os'\).*, which only gin can"),
        (f"{MLP} = @activations()", r"@activations\(\), which only gin can read"),
        (f"{MLP} = %ACT", "%ACT, which only gin can read"),
        (f"{MLP} = %A\nA = %B\nB = %A", "which only gin can read"),
        (f"{MLP} = (%ACT,\n 'linear')\nACT = 'silu'", "which only gin can read"),
        (f"{MLP} = ('silu', 'linear'", "which only gin can read"),
        ("T5Config:\n  mlp_activations = ('silu', 'linear'", "which only gin can read"),
        (f"x.y = (\n{MLP} = ('silu', 'linear')", "which only gin can read"),
        (f"a/{MLP} = ('silu', 'linear')\n{MLP} = ('gelu', 'linear')", "and in another scope"),
    ],
)
def test_an_activation_that_gin_alone_could_read_is_not_guessed(tmp_path, text, message):
    write_msgpack(tmp_path / "checkpoint", parameters())
    (tmp_path / "config.gin").write_text(text)
    refused(tmp_path, f"gin says mlp_activations = .*{message}")


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        zoo.load(path)
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    def check(change, message):
        flat = parameters()
        change(flat)
        path = tmp_path / "x"
        write_msgpack(path, flat)
        refused(path, message)

    check(lambda f: f.pop("decoder/layers_2/mlp/wo/kernel"), "lacks .*decoder/layers_2/mlp/wo")
    check(lambda f: f.update({"encoder/x": np.zeros(2, "f")}), "holds .*encoder/x.* too many")
    check(
        lambda f: f.update({"encoder/encoder_norm/scale": np.zeros(3, "f")}),
        r"shape \(3,\), its config asks for \(10,\)",
    )
    check(lambda f: f.pop("token_embedder/embedding"), "does not hold 'token_embedder/embedding'")
    check(
        lambda f: f.update({"encoder/encoder_norm/scale": np.zeros(D, np.int32)}),
        "dtype int32, not a float",
    )
    check(
        lambda f: f.update({"decoder/relpos_bias/rel_embedding": np.zeros((4, 8), "f")}),
        "4 heads for queries of width 15",
    )
    for name in ("token_embedder/embedding", "decoder/layers_0/self_attention/query/kernel"):
        flat = {name: np.zeros(3, "f")}
        check(lambda f, flat=flat: f.update(flat), rf"'{name}' .* shape \(3,\), not two axes")
    check(
        lambda f: f.update({"decoder/relpos_bias/rel_embedding": np.zeros((3, 2), "f")}),
        "relative_buckets .* is 2, must be at least 4",
    )
    many = f"decoder/layers_{'9' * 5000}/mlp/wo/kernel"
    check(lambda f: f.update({many: np.zeros((F, D), "f")}), "too many")
    check(
        lambda f: f.update({"encoder/encoder_norm/scale": np.zeros(D, bool)}),
        "'encoder/encoder_norm/scale' .* dtype 'bool', not a float",
    )


def test_a_dtype_that_no_parameter_has_may_lie_elsewhere(tmp_path):
    tree = {"target": nested(parameters()), "state": {"skipped": np.zeros(3, bool)}}
    data = serialization.msgpack_serialize({"flag": np.bool_(True), "optimizer": tree})
    (tmp_path / "x").write_bytes(data)
    found = zoo.load(tmp_path / "x")[1]["embedding"]
    np.testing.assert_array_equal(found, tree["target"]["token_embedder"]["embedding"])


def test_biases_per_layer_are_refused(tmp_path):
    flat = scanned(parameters())
    flat["encoder/encoder/relpos_bias/rel_embedding"][0, 1, 0] += 1
    write_msgpack(tmp_path / "x", flat)
    refused(tmp_path / "x", "encoder have relative position biases of their own")


def test_a_folder_that_lies_is_refused(tmp_path):
    name = "target.decoder.layers_0.mlp.wo.kernel"
    numbers = itertools.count()

    def check(change, message):
        folder = tmp_path / str(next(numbers))
        write_zarr(folder, parameters())
        change(folder / name)
        refused(folder, message)

    def metadata(**fields):
        def change(array):
            path = array / ".zarray"
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))

        return change

    def link(array):
        array.rename(array.parent.parent / "elsewhere")
        array.symlink_to(array.parent.parent / "elsewhere")

    def link_chunk(array):
        (array / "0.0").rename(array.parent.parent / "chunk")
        (array / "0.0").symlink_to(array.parent.parent / "chunk")

    check(lambda a: (a / "1.0").unlink(), r"lacks 1 of its 4 chunks \(1.0")
    check(link_chunk, r"lacks 1 of its 4 chunks \(0.0")
    check(lambda a: (a / "0.1").write_bytes(b"nope"), "cannot be read")
    check(link, "which is not there as a folder")
    check(lambda a: (a / ".zarray").write_text("{"), "is not a JSON object")
    check(metadata(shape=[2**40, 2**40]), "chunks, which is absurd")
    check(metadata(chunks=[2**40, 2**40]), "which is absurd")
    check(metadata(chunks=[0, 3]), r"chunks of \[0, 3\]")
    check(metadata(shape=[0, 2**26]), r"shape \[0, 67108864\], which holds nothing")
    check(metadata(dtype="|O"), "dtype '|O', supported are")
    check(metadata(shape="x"), "no sound shape and chunks")
    check(metadata(dimension_separator="/"), "separates chunks by")


def test_a_json_file_that_is_absurdly_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_JSON_BYTES", 100)  # the files of TensorStore have more
    write_zarr(tmp_path / "c", parameters())
    refused(tmp_path / "c", r"\.zarray is larger than 100 bytes, no \.zarray is")


def test_a_spec_cannot_name_a_place_outside(tmp_path):
    flat = parameters()
    write_zarr(tmp_path / "c", flat)
    for path, message in (
        ("../../etc", "not a plain folder in it"),
        ("/etc", "not a plain folder in it"),
        ("a/b", "not a plain folder in it"),
        ("..", "not a plain folder in it"),
        ("x" * 300, "not there as a folder"),
        ("a\0b", "not there as a folder"),
    ):
        tree = serialization.msgpack_restore((tmp_path / "c" / "checkpoint").read_bytes())
        target = tree["optimizer"]["target"]
        target["token_embedder"]["embedding"]["kvstore"]["path"] = path
        (tmp_path / "c" / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
        refused(tmp_path / "c", message)


def test_files_that_are_no_checkpoint(tmp_path):
    for data, message in (
        (b"", "ends too early"),
        (b"hello", "something follows its end"),
        (b"\x2a", "holds no mapping"),
        (b"\x81\xa1a\x01", "holds no T5X parameters"),
        (b"\x81\xa9optimizer\x03", "holds no T5X parameters"),
        (b"\xc1", "0xc1 means nothing"),
        (b"\x91" * 100 + b"\x01", "nested too deeply"),
        (b"\xdf\xff\xff\xff\xff", "claims more than it has"),
        (b"\xdb\xff\xff\xff\xffabc", "claims more than it has"),
        (b"\xc6\xff\xff\xff\xffabc", "claims more than it has"),
        (b"\xc9\xff\xff\xff\xff\x01", "claims more than it has"),
        (b"\x82\xa1a\x01\xa1a\x02", "repeated"),
        (b"\x81\xa1\xff\x01", "not a Flax msgpack checkpoint"),
    ):
        (tmp_path / "x").write_bytes(data)
        refused(tmp_path / "x", message)


def test_entries_are_counted_over_all_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack_files, "MAX_ITEMS", 100)
    (tmp_path / "x").write_bytes(msgpack.packb([list(range(60)), list(range(60))]))
    refused(tmp_path / "x", "has too many entries")


@pytest.mark.parametrize("place", ["shape", "dtype"])
def test_arrays_in_what_describes_an_array_are_refused(tmp_path, place):
    """Ten thousand of them, each in the shape or in the dtype of the one around it."""
    start = b"\x93" if place == "shape" else b"\x93\x90"
    (tmp_path / "x").write_bytes((b"\xd4\x01" + start) * 10_000)
    refused(tmp_path / "x", "nested too deeply")


def test_an_array_that_lies_about_itself_is_refused(tmp_path):
    for shape, dtype, size, message in (
        ([3], "float32", 8, "needs 12 bytes, has 8"),
        ([2**40, 2**40], "float32", 8, "needs"),
        ([-1], "float32", 8, "has shape"),
        ([2], "object", 8, "dtype 'object'"),
        ("x", "float32", 8, "has shape"),
        ([2**62] * 3000, "float32", 8, r"has shape \[4611686018427387904, .{,80}$"),
        ([2**62] * 8, "float32", 8, r"shape \[4611686018427387904, .{,60} needs \d+ bytes, has 8"),
    ):
        inner = msgpack.packb((shape, dtype, b"\0" * size))
        data = msgpack.packb({"optimizer": {"target": {"a": msgpack.ExtType(1, inner)}}})
        (tmp_path / "x").write_bytes(data)
        refused(tmp_path / "x", message)


def test_everything_flax_writes_is_understood(tmp_path):
    tree = {
        "none": None,
        "numbers": [1, -1, 200, -200, 70_000, -70_000, 2**33, -(2**33), 0.5, True, False],
        "text": "x" * 300,
        "bytes": b"y" * 300,
        "complex": 1j,
        "list": list(range(40)),
        "map": {str(i): i for i in range(40)},
        "scalar": np.float32(3),
        "array": np.arange(6, dtype=np.int8).reshape(2, 3),
    }
    (tmp_path / "x").write_bytes(serialization.msgpack_serialize(tree))
    file = MsgpackFile(tmp_path / "x")
    for key in ("none", "numbers", "text", "bytes", "list", "map"):
        assert file.tree[key] == tree[key]
    np.testing.assert_array_equal(file.read(file.tree["array"]), tree["array"])
    np.testing.assert_array_equal(file.read(file.tree["scalar"]), 3)


def test_thousands_of_mutations_crash_nothing_and_cost_no_memory(tmp_path):
    rng, path = np.random.default_rng(2), tmp_path / "x"
    write_msgpack(path, {name: array for name, array in parameters().items() if "wo" in name})
    good, opened = path.read_bytes(), 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            kind = rng.integers(3)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                data[at : at + 5] = bytes([rng.integers(0xC0, 0xE0)]) + rng.bytes(4)
            else:
                del data[at : at + int(rng.integers(1, 30))]
        path.write_bytes(data)
        try:
            file = MsgpackFile(path)
        except UserError:
            continue
        opened += 1
        leaves = [leaf for leaf in jax.tree.leaves(file.tree) if hasattr(leaf, "nbytes")]
        assert sum(file.read(leaf).nbytes for leaf in leaves) <= len(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < opened < MUTATIONS
    assert peak < 3 * 2**20
