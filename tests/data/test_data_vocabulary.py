"""Vocabularies: the packaged one, T5's, bytes, tokenizer.json, and telling two apart."""

import base64
import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.data import vocabularies
from distillspec_jax.data.stories import story
from distillspec_jax.data.vocabulary import check_same, fingerprint, load_vocabulary
from distillspec_jax.errors import UserError

# Stored in the packaged models: another value means that they no longer fit their vocabulary.
STORIES_FINGERPRINT = "f46db506f80fe2d9b7c4f93275e1fbfb0d8ef90ee900ce03657a5f8ac2649518"

# Made with `tokenizers` 0.23.3 from hf_t5_dummy/tokenizer.json.
TOKENIZER_GOLDEN = {
    "Davon erzählte uns der Stylist und Designer Mario Kameník .": [
        *(193, 107, 152, 128, 103, 130, 235, 408, 137, 121, 106, 105, 103, 156, 104, 103),
        *(109, 130, 148, 106, 118, 121, 248, 103, 156, 109, 193, 159, 256, 112, 130, 163),
        *(107, 150, 108, 268, 178, 142, 394, 143, 103, 116),
    ],
    "Scottish Unicorns:27(1/3)=9\nFemale:9(2/3)=6 unicorns\n#### 6": [
        *(148, 119, 108, 106, 106, 265, 103, 269, 112, 157, 133, 112, 104, 309, 243, 234),
        *(201, 167, 365, 211, 200, 145, 241, 194, 105, 205, 144, 309, 241, 201, 243, 365),
        *(211, 200, 145, 223, 103, 156, 157, 133, 112, 104, 103, 410, 410, 410, 410, 103),
        *(223,),
    ],
    "Von Modeschauen ganz zu schweigen .": [
        *(103, 284, 128, 163, 108, 109, 159, 151, 107, 115, 142, 103, 122, 140, 235, 103),
        *(235, 115, 103, 104, 151, 125, 105, 256, 142, 103, 116),
    ],
    "日本語 阿 ř": [
        *(103, 564, 1090, 2, 103, 1298, 103, 1299),
    ],
}


@pytest.fixture(scope="module")
def stories():
    return load_vocabulary("arithmetic_stories")


def test_special_ids_are_those_of_t5(stories):
    assert stories.pieces[:3] == ("<pad>", "</s>", "<unk>")
    assert (stories.pad_id, stories.eos_id, stories.unk_id) == (0, 1, 2)


@pytest.mark.parametrize("number", range(151))
def test_each_number_is_one_piece(stories, number):
    (piece,) = stories.encode(str(number))
    assert stories.pieces[piece] == f"▁{number}"
    assert stories.encode(f"has {number}, and")[1] == piece


def test_stories_come_back_exactly(stories):
    for index in range(2_000):
        for text in story("test", index):
            ids = stories.encode(text)
            assert stories.unk_id not in ids
            assert stories.decode([*ids, stories.eos_id, 0, 0]) == text


def test_decoding_stops_at_the_end_and_drops_padding(stories):
    ids = stories.encode("Mia has 5 pens.")
    assert stories.decode([0, *ids[:2], 0, *ids[2:], 1, *ids]) == "Mia has 5 pens."
    assert stories.decode([1, *ids]) == ""
    assert stories.decode([ids[0], stories.size + 7]) == "Mia"  # a padding row of the embedding


def test_packaged_vocabulary_is_what_its_function_makes(stories, tmp_path):
    assert stories.fingerprint == STORIES_FINGERPRINT
    vocabularies.train(tmp_path / "again.model")
    again = load_vocabulary(tmp_path / "again.model")
    assert sorted(again.pieces) == sorted(stories.pieces)
    assert again.encode("Mia has 12 + 5 = 17 pens.") != []


def test_fingerprint_sees_order_and_bounds_of_pieces():
    assert fingerprint(["a", "b"]) == fingerprint(("a", "b"))
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"])
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_bytes_are_laid_out_as_byt5():
    """Ids as transformers' ByT5Tokenizer gives them for the same text."""
    byt5 = load_vocabulary("bytes")
    assert byt5.size == 384
    ids = [107, 198, 172, 111, 111, 114, 35, 259, 35, 122]
    assert byt5.encode("héllo <extra_id_0> w") == ids
    assert byt5.pieces[383] == "<extra_id_124>"
    assert byt5.decode([*ids, 1, 99]) == "héllo  w"
    assert byt5.decode([107, 198]) == "h"  # half of the é


def test_t5_vocabulary(shared_data):
    t5 = load_vocabulary(shared_data / "t5_sentencepiece/spiece.model")
    assert (t5.size, t5.pieces[32_000], t5.pieces[32_099]) == (
        32_100,
        "<extra_id_99>",
        "<extra_id_0>",
    )
    english = "translate English to German: That is good."
    assert t5.encode(english) == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]
    assert t5.decode(t5.encode(english)) == english
    assert t5.encode("The <extra_id_0> walks") == [37, 32_099, 10_681]
    assert t5.decode([37, 32_099, 10_681]) == "The walks"


def test_small_foreign_model_has_no_sentinels(shared_data):
    path = shared_data / "t5_sentencepiece/seqio_test_vocab/sentencepiece.model"
    vocabulary = load_vocabulary(path)
    listed = [line.split("\t")[0] for line in path.with_suffix(".vocab").read_text().splitlines()]
    assert list(vocabulary.pieces) == listed


@pytest.mark.parametrize("text", TOKENIZER_GOLDEN)
def test_tokenizer_json_encodes_as_tokenizers_does(shared_data, text):
    vocabulary = load_vocabulary(shared_data / "hf_t5_dummy/tokenizer.json")
    assert vocabulary.size == 1_302
    assert vocabulary.encode(text) == TOKENIZER_GOLDEN[text]


def test_tokenizer_json_keeps_special_pieces_out_of_texts(shared_data):
    vocabulary = load_vocabulary(shared_data / "hf_t5_dummy")
    assert vocabulary.encode("<extra_id_0>") == [102]
    assert 1 not in vocabulary.encode("a </s> b")


@pytest.fixture
def t5_json(shared_data, tmp_path):
    """T5's own vocabulary in the layout of a tokenizer.json of today."""
    messages = sentencepiece_model_pb2
    content = (shared_data / "t5_sentencepiece/spiece.model").read_bytes()
    model = messages.ModelProto.FromString(content)
    pieces = [[piece.piece, piece.score] for piece in model.pieces]
    pieces += [[f"<extra_id_{n}>", 0.0] for n in reversed(range(100))]
    special = [0, 1, 2, *range(32_000, 32_100)]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    tokenizer = {
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces},
        "added_tokens": [{"id": n, "content": pieces[n][0], "special": True} for n in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer), "utf-8")
    return path


def test_both_files_of_t5_are_one_vocabulary(shared_data, t5_json):
    from_json = load_vocabulary(t5_json)
    from_model = load_vocabulary(shared_data / "t5_sentencepiece/spiece.model")
    assert from_json.fingerprint == from_model.fingerprint
    lines = (shared_data / "wmt14_ende/tgt-val.txt").read_text("utf-8").splitlines()[:200]
    for line in [*lines, "  two  spaces\tand a tab ", "ﬁ ½ é", "日本"]:
        assert from_json.encode(line) == from_model.encode(line)


def test_added_pieces_follow_the_model(t5_json):
    tokenizer = json.loads(t5_json.read_text("utf-8"))
    tokenizer["added_tokens"].append({"id": 32_100, "content": "<sum>", "special": False})
    t5_json.write_text(json.dumps(tokenizer), "utf-8")
    vocabulary = load_vocabulary(t5_json)
    assert vocabulary.size == 32_101
    assert 32_100 in vocabulary.encode("The <sum> is")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "BPE"}}, "type BPE"),
        ({"model": {"type": "Unigram"}}, "not a complete"),
        ({"normalizer": {"type": "Lowercase"}}, "by Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "cuts words"),
    ],
)
def test_other_tokenizers_are_refused(t5_json, change, message):
    tokenizer = json.loads(t5_json.read_text("utf-8")) | change
    t5_json.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(UserError, match=message):
        load_vocabulary(t5_json)


def test_a_folder_of_byt5_speaks_bytes_without_a_vocabulary_file(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_vocabulary(tmp_path).fingerprint == load_vocabulary("bytes").fingerprint
    settings.write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match="holds neither"):
        load_vocabulary(tmp_path)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'gone.model' is neither a file nor one of"):
        load_vocabulary("gone.model")
    with pytest.raises(UserError, match=r"holds neither tokenizer.json nor spiece.model"):
        load_vocabulary(tmp_path)
    for name in ("broken.model", "empty.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"{nothing")
        with pytest.raises(UserError, match="not"):
            load_vocabulary(tmp_path / name)


def test_models_with_other_special_ids_are_refused(stories, tmp_path):
    content = vocabularies.ARITHMETIC_STORIES.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    proto.pieces[0].piece, proto.pieces[1].piece = "</s>", "<pad>"
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"at the ids \(1, 0, 2\)"):
        load_vocabulary(tmp_path / "other.model")


def test_same_vocabularies_pass(stories):
    description = stories.describe()
    check_same(description, dict(description))
    check_same(description, {"eos_id": 1})  # a foreign checkpoint that knows no fingerprint


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocabulary_fingerprint", "0" * 64, "fingerprint of the pieces f46db506f80f... and 0000"),
        ("vocabulary_size", 424, "number of pieces 423 and 424"),
        ("pad_id", 3, "id of padding 0 and 3"),
        ("eos_id", 2, "id of the end of sequence 1 and 2"),
        ("decoder_start_id", 5, "id that starts decoding 0 and 5"),
    ],
)
def test_different_vocabularies_are_refused(stories, key, value, message):
    description = stories.describe() | {"decoder_start_id": 0}
    with pytest.raises(UserError, match=message):
        check_same(description, description | {key: value})
