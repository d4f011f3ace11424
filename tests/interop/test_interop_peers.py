"""Live against transformers: what it loads, computes, tokenizes and generates with our exports."""

import contextlib
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.stories import story
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.errors import UserError
from distillspec_jax.interop import huggingface, huggingface_config
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.layers import relative_buckets
from distillspec_jax.models.transformer import init_params, score
from experiments import tokenizers

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of torch and transformers themselves
]
TOLERANCE = 2e-5  # of the largest logit; theirs are float64
GAMMA = 5


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


@contextlib.contextmanager
def messages_of(transformers):
    """Everything transformers says while a block runs, at warning and above."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging_ = transformers.utils.logging
    logger, level = logging_.get_logger("transformers"), logging_.get_verbosity()
    logger.addHandler(handler)
    logging_.set_verbosity_warning()  # whatever ran before in this process may have asked for less
    try:
        yield said
    finally:
        logging_.set_verbosity(level)
        logger.removeHandler(handler)


def loaded(transformers, folder):
    with messages_of(transformers) as said:
        model, info = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), said


def random_inputs(config):
    rng = np.random.default_rng(3)
    sources = rng.integers(2, config.num_pieces, (3, 19)).astype(np.int32)
    sources[1, 11:] = sources[2, 1:] = config.pad_id
    return sources, rng.integers(2, config.num_pieces, (3, 13)).astype(np.int32)


def logits_of(torch, model, config, sources, targets):
    decoded = np.concatenate(
        [np.full((len(targets), 1), config.decoder_start_id), targets[:, :-1]], 1
    )
    with torch.no_grad():  # in float64: their rounding is not ours to answer for
        return model.double()(
            input_ids=torch.tensor(sources).long(),
            attention_mask=torch.tensor(sources != config.pad_id).long(),
            decoder_input_ids=torch.tensor(decoded).long(),
        ).logits.numpy()


def assert_agree(torch, model, ours, sources, targets):
    theirs = logits_of(torch, model, ours[0].config, sources, targets)
    found = np.asarray(jax.jit(functools.partial(score, ours[0]))(ours[1], sources, targets))
    kept = ours[0].config.num_pieces
    error = np.abs(found - theirs)[..., :kept].max() / np.abs(theirs[..., :kept]).max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("index", range(14))
def test_exports_load_and_agree(torch, transformers, make_folder, tmp_path, index):
    make_folder(tmp_path / "in", index)
    ours = zoo.load(tmp_path / "in")
    config = ours[0].config
    huggingface.save(*ours, tmp_path / "out")
    model, said = loaded(transformers, tmp_path / "out")
    # transformers 5 forces the flag to true, then warns of every T5 that has its own matrix
    assert len(said) == (0 if config.tie_embeddings else 1)
    assert all("we will NOT tie them" in line for line in said)
    assert_agree(torch, model, ours, *random_inputs(config))


CHANGED = {  # another value for every field that T5Config has, but those that change no number
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 7,
    "d_ff": 23,
    "num_layers": 3,
    "num_decoder_layers": 4,
    "num_heads": 5,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 64,
    "dropout_rate": 0.2,
    "layer_norm_epsilon": 1e-3,
    "feed_forward_proj": "gated-silu",
    "is_encoder_decoder": False,
    "pad_token_id": 3,
    "eos_token_id": 4,
    "is_decoder": True,
    "scale_decoder_outputs": False,
    "tie_word_embeddings": False,
    "dense_act_fn": "gelu",
    "is_gated_act": True,
    "decoder_start_token_id": 5,
    "hidden_size": 16,
    "num_attention_heads": 5,
    "num_hidden_layers": 3,
    "head_dim": 7,
}
NO_NUMBER = ("initializer_factor", "use_cache", "classifier_dropout")
DERIVED = ("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "tie_word_embeddings")


def test_no_field_of_t5config_is_ignored(transformers):
    """A changed field changes our config, or is refused by its name."""
    own = set(transformers.T5Config.__annotations__) | set(transformers.T5Config.attribute_map)
    fields = {name for name in own if not name.startswith(("_", "model_type", "keys_to", "attr"))}
    assert fields | {*DERIVED, "decoder_start_token_id"} == {*CHANGED, *NO_NUMBER}

    unsaid = {*DERIVED, "decoder_start_token_id", *transformers.T5Config.attribute_map}
    base = {name: getattr(transformers.T5Config(), name) for name in CHANGED if name not in unsaid}
    base |= {"model_type": "t5", "num_decoder_layers": None, "decoder_start_token_id": 0}

    def read(config):
        tied = huggingface_config.is_tied_by_flag(config)
        try:
            return huggingface_config.read(
                config, {}, name="t5", where="config.json", tie_embeddings=tied
            )
        except UserError as error:
            return str(error)

    assert not isinstance(read(base), str)
    for field, value in CHANGED.items():
        found = read(base | {field: value})
        assert found != read(base), field
        assert not isinstance(found, str) or field in found


@pytest.mark.parametrize("untied", [False, True])
def test_what_transformers_saves_is_read(torch, transformers, tmp_path, untied):
    config = transformers.T5Config(
        vocab_size=59,
        d_model=14,
        d_kv=5,
        d_ff=22,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=not untied,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(59, 14))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.6)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = zoo.load(tmp_path / "theirs")
    assert ours[0].config.tie_embeddings is not untied
    assert ours[0].config.scale_logits is not untied
    assert_agree(torch, model, ours, *random_inputs(ours[0].config))


def test_buckets_of_relative_positions_are_the_same(torch, transformers):
    """All distances, where rounding at the edges of buckets could part the two."""
    attention = transformers.models.t5.modeling_t5.T5Attention
    distances = np.arange(-3000, 3000)
    for buckets in (4, 6, 8, 10, 16, 32, 64, 128):
        for furthest in (buckets // 2 + 1, 20, 37, 128, 256, 1000):
            if furthest <= buckets // 2:
                continue
            for both in (True, False):
                theirs = attention._relative_position_bucket(
                    torch.tensor(distances), both, buckets, furthest
                )
                ours = relative_buckets(
                    distances, num_buckets=buckets, max_distance=furthest, bidirectional=both
                )
                np.testing.assert_array_equal(ours, theirs.numpy(), f"{buckets} {furthest} {both}")


@pytest.fixture(scope="module")
def exported(transformers, tmp_path_factory):
    """The packaged target and draft as transformers loads them, and as we do."""
    folder, pairs = tmp_path_factory.mktemp("exported"), {}
    for role in ("target", "draft"):
        name = f"stories-{role}"
        model, params = zoo.load(name)
        files = tokenizers.files_for(None, zoo.describe(name))
        huggingface.save(model, params, folder / role, extra_files=files)
        theirs, said = loaded(transformers, folder / role)
        assert said == []
        pairs[role] = (theirs, model, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "target")
    return pairs, tokenizer


def test_the_exported_tokenizer_gives_the_same_ids(exported):
    tokenizer, vocabulary = exported[1], load_vocabulary("arithmetic_stories")
    assert len(tokenizer) == vocabulary.size
    for index in range(100):
        for text in story("validation", index):
            ids = vocabulary.encode(text)
            assert tokenizer(text).input_ids == [*ids, vocabulary.eos_id]
            assert tokenizer.decode(ids) == vocabulary.decode(ids)


def test_padding_rows_are_never_drawn_there_either(torch, transformers, tmp_path):
    """Rows past the vocabulary that would win every argmax."""
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
    params = init_params(zoo.model(config), jax.random.key(0))
    params["head"] = params["head"].at[:, 43:].multiply(50.0)
    huggingface.save(zoo.model(config), params, tmp_path / "x")
    model, _ = loaded(transformers, tmp_path / "x")
    sources = np.arange(2, 12, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = model.generate(torch.tensor(sources).long(), max_new_tokens=20, do_sample=False)
    ours = generate(
        zoo.model(config),
        params,
        jnp.asarray(sources),
        jax.random.key(0),
        sampling=Sampling(temperature=0.0),
        max_new_tokens=20,
    )
    assert max(theirs[0].tolist()) < 43
    text = theirs[0, 1:].tolist()
    assert np.asarray(ours.tokens)[0, : len(text)].tolist() == text


@pytest.fixture
def assisted(torch, exported, monkeypatch):
    """ids -> (text without a draft, text with it, calls of the target with it)."""
    pairs, _ = exported
    target, draft = pairs["target"][0], pairs["draft"][0]
    for key, value in {
        "num_assistant_tokens": GAMMA,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }.items():
        monkeypatch.setattr(draft.generation_config, key, value)

    def run(ids):
        ids, calls = torch.tensor([ids]), []
        plain = target.generate(ids, max_new_tokens=96, do_sample=False)
        forward = target.forward

        @functools.wraps(forward)
        def counted(*args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        monkeypatch.setattr(target, "forward", counted)
        helped = target.generate(ids, max_new_tokens=96, do_sample=False, assistant_model=draft)
        monkeypatch.setattr(target, "forward", forward)
        return plain[0, 1:].tolist(), helped[0, 1:].tolist(), len(calls)

    return run


def ours_assisted(exported, ids):
    (_, target, target_params), (_, draft, draft_params) = exported[0].values()
    inputs = np.zeros((1, 64), np.int32)
    inputs[0, : len(ids)] = ids
    out = speculative_sample(
        target,
        target_params,
        draft,
        draft_params,
        jnp.asarray(inputs),
        jax.random.key(0),
        gamma=GAMMA,
        sampling=Sampling(temperature=0.0),
        max_new_tokens=96,
    )
    text = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
    return text, int(out.statistics.target_calls[0]), int(out.statistics.accepted[0])


def test_assisted_generation_gives_the_same_text(exported, assisted):
    tokenizer = exported[1]
    for index in range(4):
        plain, helped, calls = assisted(tokenizer(story("validation", index)[0]).input_ids)
        assert plain == helped
        assert calls < len(plain)


def test_as_many_draft_tokens_are_accepted_as_here(transformers, exported, assisted, monkeypatch):
    """transformers (5.24, too) feeds an encoder-decoder draft its whole text again on its cache.

    That is lossless, but spoils the drafts after the first block. Without the cache it is right.
    """
    generator = transformers.generation.candidate_generator.AssistedCandidateGenerator
    get_candidates = generator.get_candidates

    def without_cache(self, *args, **kwargs):
        for name in ("cache", "past_key_values"):  # since 5.24, and before
            self.assistant_kwargs.pop(name, None)
        return get_candidates(self, *args, **kwargs)

    monkeypatch.setattr(generator, "get_candidates", without_cache)
    vocabulary = load_vocabulary("arithmetic_stories")
    for index in range(8):
        ids = [*vocabulary.encode(story("validation", index)[0]), vocabulary.eos_id]
        plain, helped, calls = assisted(ids)
        text, our_calls, accepted = ours_assisted(exported, ids)
        assert plain == helped == text
        assert calls == our_calls
        # each of their calls also emits a token of the target's; ours draws none after an
        # accepted end of sequence, which they count as the target's
        by_target = len(text) - accepted
        assert by_target in (calls, calls - 1)


def test_a_draft_cut_from_its_target_is_exported(torch, transformers, tmp_path, exported):
    """Layers and width chosen, through the file and back: the same logits."""
    from distillspec_jax.interop.slim import slim

    _, target, params = exported[0]["target"]
    small = slim(
        target,
        params,
        name="small",
        encoder_layers=[1],
        decoder_layers=[0, 4],
        d_ff=96,
        num_heads=3,
    )
    huggingface.save(*small, tmp_path / "small")
    model, said = loaded(transformers, tmp_path / "small")
    assert said == []
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_heads"] == 3
    assert_agree(torch, model, small, *random_inputs(small[0].config))
