"""Vocabularies: the packaged one, T5's, bytes, tokenizer.json, and telling two apart."""

import base64
import json
import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.data import vocabularies, vocabulary
from distillspec_jax.data.added_tokens import ForeignVocabulary
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


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return path


CUT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
SPLIT_AND_CUT = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, CUT]}
ONE_SPACE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "BPE"}}, "type BPE"),
        ({"model": "Unigram"}, "type None"),
        ({"normalizer": {"type": "Lowercase"}}, "by Lowercase"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}},
            "by Replace, which T5 does not: .*'String': 'a'",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": ""}},
            "by Replace",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "cuts words"),
        ({"pre_tokenizer": None}, "cuts words.*pre_tokenizer is empty"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "pre_tokenizer is WhitespaceSplit"),
        ({"pre_tokenizer": CUT | {"prepend_scheme": "never"}}, "cuts words.*never"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "WhitespaceSplit"},
                        CUT | {"prepend_scheme": "first"},
                    ],
                }
            },
            "cuts words.*first",
        ),
        ({"normalizer": None}, "keeps runs of spaces"),
    ],
)
def test_other_tokenizers_are_refused(t5_json, change, message):
    with pytest.raises(ForeignVocabulary, match=rf"tokenizer\.json.*{message}"):
        load_vocabulary(change_json(t5_json, **change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {"type": "Unigram"}}', "not a complete"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": ' + "1" * 5_000 + "}", "not valid JSON"),
        ("[]", "not a JSON object but a list"),
    ],
)
def test_broken_tokenizers_are_not_taken_for_foreign_ones(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"tokenizer\.json' is {message}") as refused:
        load_vocabulary(tmp_path)
    assert not isinstance(refused.value, ForeignVocabulary)


def test_a_broken_model_in_a_folder_is_not_taken_for_a_foreign_one(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"spiece\.model' is not a SentencePiece model") as refused:
        load_vocabulary(tmp_path)
    assert not isinstance(refused.value, ForeignVocabulary)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(ForeignVocabulary, match="holds neither"):
        load_vocabulary(tmp_path)


def test_without_a_character_map_whitespace_still_parts_words(t5_json):
    change_json(t5_json, normalizer=None, pre_tokenizer=SPLIT_AND_CUT)
    vocabulary = load_vocabulary(t5_json)
    for space in ("\n", "\t", "\r\n", "\u3000", "\x85"):
        assert vocabulary.encode(f"Hello{space}cat") == [8774, 1712]
    assert vocabulary.encode("ﬁ") == [3, 2]


def test_without_a_character_map_ends_are_stripped_where_the_file_says_so(t5_json):
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    change_json(t5_json, normalizer={"type": "Sequence", "normalizers": [strip, ONE_SPACE]})
    assert load_vocabulary(t5_json).encode("Hello\n") == [8774]
    assert load_vocabulary(t5_json).encode("Hello\ncat") == [8774, 2, 2138]


def test_bytes_stand_for_characters_without_a_piece(t5_json):
    model = json.loads(t5_json.read_text("utf-8"))["model"]
    change_json(t5_json, model=model | {"byte_fallback": True})
    with pytest.raises(ForeignVocabulary, match="a piece for each of the 256 bytes"):
        load_vocabulary(t5_json)
    model["vocab"][20_000:20_256] = [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    change_json(t5_json, model=model | {"byte_fallback": True})
    vocabulary = load_vocabulary(t5_json)
    assert vocabulary.encode("x日") == [3, 226, *(20_000 + byte for byte in "日".encode())]
    assert vocabulary.decode(vocabulary.encode("x日")) == "x日"


def added(content, index=None, **flags):
    entry = {"content": content, "special": False, "normalized": True} | flags
    return entry if index is None else entry | {"id": index}


def add_to_json(path, *tokens):
    own = json.loads(path.read_text("utf-8"))["added_tokens"]
    return change_json(path, added_tokens=[*own, *tokens])


def test_added_tokens_are_found_as_tokenizers_does(t5_json):
    """Ids of transformers 5.24 (WhitespaceSplit) and 4.57 (Metaspace alone)."""
    tokens = [added("<q>", 32_100), added("NEW", 32_101), added("<sep>", 32_102, special=True)]
    tokens += [added("{", 32_103, normalized=False), added("cat", 2138, single_word=True)]
    alone = load_vocabulary(add_to_json(t5_json, *tokens))
    assert alone.encode("say <q>NEW now") == [497, 3, 32_100, 32_101, 230]
    assert alone.encode("say {") == [497, 32_103]
    split = load_vocabulary(change_json(t5_json, pre_tokenizer=SPLIT_AND_CUT))
    ids = [497, 32_100, 32_101, 230]
    assert split.encode("say <q>NEW now") == ids
    assert split.decode(ids) == "say<q>NEW now"
    assert split.encode("say NEW.") == [497, 32_101, 3, 5]
    assert split.encode("cats cat") == [10_003, 2138]
    assert split.encode("a<sep>b") == [3, 9, 32_102, 3, 115]
    assert split.decode([3, 9, 32_102, 3, 115]) == "a b"


def test_whitespace_next_to_a_token_may_belong_to_it(t5_json):
    """Seen where the text behind a token is taken as it is."""
    change_json(t5_json, pre_tokenizer=CUT | {"prepend_scheme": "first"})
    add_to_json(t5_json, added("<r>", 32_100, rstrip=True), added("<l>", 32_101, lstrip=True))
    vocabulary = load_vocabulary(t5_json)
    assert vocabulary.encode("Hello <extra_id_0>.") == [8774, 32_099, 5]
    assert vocabulary.encode("<extra_id_0> cat") == [32_099, 1712]
    assert vocabulary.encode("<extra_id_0>cat") == [32_099, 2138]
    assert vocabulary.encode("<r> cat") == [32_100, 2138]
    assert vocabulary.encode("cat <l>") == [1712, 32_101]


def test_an_added_token_that_the_character_map_changes_is_refused(t5_json):
    add_to_json(t5_json, added("\n", 32_100))
    with pytest.raises(ForeignVocabulary, match=r"adds the token '\\n' as `normalized`"):
        load_vocabulary(t5_json)


@pytest.mark.peers
@pytest.mark.parametrize("cut", [CUT, CUT | {"prepend_scheme": "first"}, SPLIT_AND_CUT])
@pytest.mark.parametrize("mapped", [True, False])
def test_texts_are_cut_as_tokenizers_does(t5_json, cut, mapped):
    tokenizers = pytest.importorskip("tokenizers")
    content = json.loads(t5_json.read_text("utf-8"))
    charsmap = content["normalizer"]["normalizers"][0]
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    steps = [charsmap] if mapped else []
    steps += [] if cut is SPLIT_AND_CUT else [strip, ONE_SPACE]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    own = [token | flags | {"normalized": False} for token in content["added_tokens"]]
    own += [
        added("<q>", 32_100) | flags,
        added("{", 32_101, normalized=False) | flags,
        added("<sep>", 32_102, normalized=False, special=True) | flags,
    ]
    change_json(
        t5_json,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=cut,
        added_tokens=own,
    )
    peer, ours = tokenizers.Tokenizer.from_file(str(t5_json)), load_vocabulary(t5_json)
    assert peer.get_vocab_size() == ours.size
    words = [" ", " ", "  ", "\n", "\t", "\u3000", "say", "cat", ".", "ﬁ", "é", "日"]
    words += ["<q>", "{", "<sep>", "<extra_id_0>", "<extra_id_500>"]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(words, k=draw.randint(1, 8)))
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.fixture
def slow(shared_data, tmp_path):
    """(Folder, function that writes the settings) of a slow tokenizer with T5's own pieces."""
    (tmp_path / "spiece.model").symlink_to(shared_data / "t5_sentencepiece/spiece.model")

    def settle(**settings):
        named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | settings))
        return tmp_path

    return tmp_path, settle


def decoder_of(*tokens):
    return {str(token["id"]): token for token in tokens}


def test_added_tokens_of_a_slow_tokenizer(slow):
    """Ids and texts of transformers 5.24."""
    folder, settle = slow
    tokens = [added("<q>", 32_100), added("NEWWORD", 32_101), added("<sep>", 32_102, special=True)]
    tokens += [added("</s>", 1, special=True), added("<extra_id_99>", 32_000, special=True)]
    settle(added_tokens_decoder=decoder_of(*tokens))
    vocabulary = load_vocabulary(folder)
    assert vocabulary.size == 32_103
    assert vocabulary.encode("say <q>NEWWORD now") == [497, 32_100, 32_101, 230]
    assert vocabulary.decode([497, 32_100, 32_101, 230]) == "say<q>NEWWORD now"
    assert vocabulary.encode("a <sep> b") == [3, 9, 32_102, 3, 115]
    assert vocabulary.decode([3, 9, 32_102, 3, 115]) == "a b"
    assert vocabulary.encode("<extra_id_0> x </s>")[:3] == [32_099, 3, 226]
    assert vocabulary.eos_id not in vocabulary.encode("x </s>")
    assert vocabulary.encode("NEW WORD") == load_vocabulary(folder / "spiece.model").encode(
        "NEW WORD"
    )


def test_added_tokens_in_a_file_of_their_own(slow):
    folder, settle = slow
    tokens = {"<q>": 32_100, "<sep>": 32_101, "<pad>": 0, "\n": 32_102}
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    assert load_vocabulary(folder).size == 32_103  # without settings, too
    vocabulary = load_vocabulary(settle(additional_special_tokens=["<sep>", "<extra_id_0>"]))
    assert vocabulary.encode("say <q><sep>\n") == [497, 32_100, 32_101, 32_102]
    assert vocabulary.decode([497, 32_100, 32_101]) == "say<q>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": {"32105": added("<q>")}}, "no piece with id 32100"),
        ({"added_tokens_decoder": {"32000": added("<q>")}}, "two pieces with id 32000"),
        ({"added_tokens_decoder": {"32100": added("cat")}}, "'cat' with id 2138 and as an added"),
        ({"additional_special_tokens": ["<sep>"]}, "special tokens that have no id: <sep>"),
    ],
)
def test_added_tokens_without_a_place_are_refused(slow, settings, message):
    with pytest.raises(ForeignVocabulary, match=message):
        load_vocabulary(slow[1](**settings))


@pytest.mark.parametrize(
    "broken", [[], {"x": added("<q>")}, {"32100": "<q>"}, {"32100": added("")}, {"-1": added("q")}]
)
def test_broken_added_tokens_are_told(slow, broken):
    with pytest.raises(UserError, match=r"tokenizer_config\.json' has broken added tokens"):
        load_vocabulary(slow[1](added_tokens_decoder=broken))


@pytest.mark.parametrize("beside", [{}, {"added_tokens_decoder": {}}])
def test_broken_names_of_special_tokens_are_told(slow, beside):
    with pytest.raises(UserError, match=r"tokenizer_config\.json' has broken added tokens"):
        load_vocabulary(slow[1](additional_special_tokens=5, **beside))


@pytest.mark.parametrize(("settings", "count"), [({}, 100), ({"extra_ids": 96}, 96)])
def test_sentinels_are_those_of_the_settings(slow, settings, count):
    vocabulary = load_vocabulary(slow[1](**settings))
    assert vocabulary.size == 32_000 + count
    assert vocabulary.encode("<extra_id_0>") == [32_000 + count - 1]


def test_a_tokenizer_without_sentinels(slow):
    vocabulary = load_vocabulary(slow[1](extra_ids=0))
    assert vocabulary.size == 32_000
    # The text is one word, as transformers 5.24 cuts it.
    assert vocabulary.encode("<extra_id_0>") == [3, 2, 25666, 834, 23, 26, 834, 632, 3155]


def test_sentinels_of_a_vocabulary_of_another_size(slow):
    folder, settle = slow
    (folder / "spiece.model").unlink()
    (folder / "spiece.model").write_bytes(vocabulary.ARITHMETIC_STORIES.read_bytes())
    assert load_vocabulary(folder).size == 423
    assert load_vocabulary(settle()).size == 523  # transformers' own number
    assert load_vocabulary(settle(extra_ids=96)).encode("<extra_id_0>") == [518]


@pytest.mark.parametrize("extra_ids", [-1, 1.5, "96", True, 10**12, None])
def test_impossible_numbers_of_sentinels_are_refused(slow, extra_ids):
    with pytest.raises(UserError, match=r"tokenizer_config\.json' has extra_ids .* whole number"):
        load_vocabulary(slow[1](extra_ids=extra_ids))


def test_a_folder_of_byt5_speaks_bytes_without_a_vocabulary_file(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_vocabulary(tmp_path).fingerprint == load_vocabulary("bytes").fingerprint
    settings.write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match="holds neither"):
        load_vocabulary(tmp_path)


def test_added_tokens_of_byt5(slow):
    """Ids of transformers 5.24."""
    byt5 = load_vocabulary(
        slow[1](
            tokenizer_class="ByT5Tokenizer",
            added_tokens_decoder=decoder_of(
                added("<pad>", 0, special=True), added("<q>", 384), added("<s>", 385, special=True)
            ),
        )
    )
    assert byt5.size == 386
    assert byt5.encode("a<q>é<s>") == [100, 384, 198, 172, 385]
    assert byt5.decode([100, 384, 198, 172, 385]) == "a<q>é"


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
    content = vocabulary.ARITHMETIC_STORIES.read_bytes()
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
