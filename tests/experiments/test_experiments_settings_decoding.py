"""The settings of evaluate, decode and generate reach the samplers.

The texts of tiny models hardly show whether a setting was lost on its way. So what a sampler is
told is compared whole, with no setting at its default. None of them runs: nothing to compile.
"""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding.block_length import BlockLength
from distillspec_jax.decoding.keys import purpose_key
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.acceptance import Counts
from distillspec_jax.evaluation.latency import StepCosts
from experiments import bench, decoder, generate, measuring
from experiments.bench import Runner, Setting, open_bench
from experiments.decoder import DecodeConfig, Decoder, Lines, given_prompts
from experiments.draft_sampling import DraftSampling
from experiments.evaluate import DraftConfig, EvaluateConfig
from experiments.generate import GenerateConfig
from experiments.models import load, outline

SEED, LIMIT, GAMMA, BATCH_SIZE = 5, 9, 3, 2
NAME, PROMPTS = "small", ("Tom has 3 apples .", "Anna has 7 pens and buys 2 more .")
CUT = {"top_k": 11, "top_p": 0.8}  # of the target
OWN = {"draft_temperature": 0.9, "draft_top_k": 7, "draft_top_p": 0.6}
OF_DRAFT = Sampling(0.9, 7, 0.6)
BLOCKS = BlockLength(min_confidence=0.1, max_entropy=0.6, schedule_start=2)

# Some exclude each other, so it takes three. Lenience goes with no rule but "token", the default,
# and "greedy", which needs temperature 0.
SETTINGS = {  # temperature, lenience, and what configs call as `Speculation` does
    "blocks": (0.7, None, {"verification": "block", "block_length": BLOCKS}),
    "lenience": (0.0, Lenience("square", 0.3, True), {"verification": "greedy"}),
    "drafts": (0.7, None, {"num_drafts": 3, "block_length": BLOCKS}),
}
each_setting = pytest.mark.parametrize(
    ("temperature", "lenience", "options"), SETTINGS.values(), ids=SETTINGS
)


class ReachedError(Exception):
    """Leaves from where a sampler is called, with its arguments by name."""


@pytest.fixture
def told(monkeypatch):
    """The arguments, defaults included, with which `module` calls its sampler during `call()`."""

    def told(module, sampler, call):
        signature = inspect.signature(getattr(module, sampler))

        def reached(*arguments, **named):
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            raise ReachedError(bound.arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, sampler, reached)
            with pytest.raises(ReachedError) as found:
                call()
        return found.value.args[0]

    return told


@pytest.fixture
def task(stories):
    return TaskConfig(
        name="jsonl",
        vocabulary="arithmetic_stories",
        train_file=str(stories / "train.jsonl"),
        validation_file=str(stories / "validation.jsonl"),
        input_length=41,
        target_length=57,
        metric="exact_match_number",
    )


@pytest.fixture
def open_with(models, task):
    """The bench of `evaluate` with some keys changed; its draft is smaller than its target."""

    def open_with(**changes):
        fields = {
            "target": str(models / "target"),
            "drafts": (DraftConfig(name=NAME, path=str(models / "draft")),),
            "task": task,
            "split": "validation",
            "num_prompts": len(PROMPTS),
            "max_new_tokens": LIMIT,
            "batch_size": BATCH_SIZE,
            "tune": False,
            "seed": SEED,
            **changes,
        }
        return open_bench(EvaluateConfig(**fields), load_task(task))

    return open_with


@pytest.fixture
def decoder_with(models):
    """The decoder of `decode` with some keys changed."""

    def decoder_with(load=load, **changes):
        fields = {
            "target": str(models / "target"),
            "draft": str(models / "draft"),
            "gamma": GAMMA,
            "max_new_tokens": LIMIT,
            "batch_size": BATCH_SIZE,
            "seed": SEED,
            **changes,
        }
        return Decoder(DecodeConfig(**fields), load)

    return decoder_with


@pytest.fixture
def expected(models):
    """What all of this should make of one of `SETTINGS`."""

    def expected(temperature, lenience, options):
        target, draft = (_in_bfloat16(models / name) for name in ("target", "draft"))
        return Speculation(
            target=target,
            draft=draft,
            gamma=GAMMA,
            max_new_tokens=LIMIT,
            sampling=Sampling(temperature, 11, 0.8),
            draft_sampling=OF_DRAFT,
            lenience=lenience,
            **options,
        )

    return expected


def _in_bfloat16(path):
    return zoo.model(dataclasses.replace(zoo.load(path)[0].config, dtype="bfloat16"))


def test_the_settings_leave_no_field_at_its_default(expected):
    """A field that is added later has to be set, and so told, as well."""
    fields = [field for field in dataclasses.fields(Speculation) if field.name != "keeps_hidden"]
    found = [expected(*setting) for setting in SETTINGS.values()]
    for field in fields:
        assert any(getattr(each, field.name) != field.default for each in found), field.name


# --- evaluate ------------------------------------------------------------------------------------


@each_setting
def test_evaluate_s_sampler_is_that_of_its_config(
    open_with, expected, temperature, lenience, options
):
    lossy = lenience or Lenience("square")  # of which nothing is left: it is exact
    opened = open_with(
        temperatures=(temperature,),
        lenience=(lossy.epsilon,),
        lenience_kind=lossy.kind,
        relaxed_residual=lossy.relaxed_residual,
        compute_dtype="bfloat16",
        **CUT,
        **OWN,
        **options,
    )
    setting = Setting(NAME, temperature, GAMMA, lossy.epsilon)
    found = opened.speculation(opened.drafts[0], setting)
    assert found == expected(temperature, lenience, options)


def test_evaluate_decodes_with_a_draft_as_its_config_says(open_with, told):
    """For acceptance in slots, for the clock in a batch: both by the seed, with one sampler."""
    opened = open_with(verification="block", **CUT, **OWN)
    [draft], setting = opened.drafts, Setting(NAME, 0.7, GAMMA)
    inputs, row_ids = opened.prompts.inputs, opened.prompts.row_ids
    runner = Runner(opened, progress=None)  # no row is ever done
    slots = told(bench, "slot_sample", lambda: runner.speculative(opened.prompts, draft, setting))
    batch = told(
        bench,
        "speculate_checked",
        lambda: opened.speculative(draft, setting, row_ids, inputs),
    )
    assert slots["slots"] == BATCH_SIZE
    for found in (slots, batch):
        assert found["rng"] == jax.random.key(SEED)
        assert found["speculation"] == opened.speculation(draft, setting)
        assert found["target_params"] is opened.target.params
        assert found["draft_params"] is draft.loaded.params
        assert found["inputs"] is inputs
        assert found["row_ids"] is row_ids


def test_evaluate_decodes_the_target_alone_as_its_config_says(open_with, told):
    opened = open_with(**CUT, **OWN)
    inputs, row_ids = opened.prompts.inputs, opened.prompts.row_ids
    runner = Runner(opened, progress=None)
    for call in (
        lambda: runner.plain(opened.prompts, 0.7),
        lambda: opened.plain(0.7, row_ids, inputs),
    ):
        found = told(bench, "autoregressive_sample", call)
        assert found["rng"] == jax.random.key(SEED)
        assert found["sampling"] == Sampling(0.7, 11, 0.8)
        assert found["max_new_tokens"] == LIMIT
        assert found["model"] == opened.target.model
        assert found["params"] is opened.target.params
        np.testing.assert_array_equal(found["inputs"], inputs)
        np.testing.assert_array_equal(found["row_ids"], row_ids)


def test_evaluate_scores_texts_as_its_config_says(open_with, told):
    opened = open_with(**CUT, **OWN)
    texts = opened.prompts.inputs, opened.prompts.inputs, opened.prompts.row_ids
    found = told(bench, "along_texts", lambda: opened.along(opened.drafts[0], 0.7, *texts))
    assert found["sampling"] == Sampling(0.7, 11, 0.8)
    assert found["draft_sampling"] == OF_DRAFT


def test_evaluate_without_a_limit_takes_the_task_s(open_with):
    opened = open_with(max_new_tokens=0)
    found = opened.speculation(opened.drafts[0], Setting(NAME, 1.0, GAMMA))
    assert found.max_new_tokens == 57


def test_a_draft_s_option_that_is_zero_is_its_own():
    """None alone is the target's."""
    target = Sampling(0.7, 11, 0.8)
    assert DraftSampling().draft_sampling(target) == target
    own = DraftSampling(draft_temperature=0.0, draft_top_k=0)
    assert own.draft_sampling(target) == Sampling(0.0, 0, 0.8)


def test_the_memory_bound_speedup_is_of_a_smaller_draft(open_with, models):
    """The fewer parameters a draft has, the higher it is."""
    opened = open_with()
    column = np.array([2.0, 2.0])
    columns = {field.name: column for field in dataclasses.fields(Counts)}
    counts = Counts(**{**columns, "emitted": np.array([5.0, 7.0]), "histogram": np.ones((2, 4))})
    cell = measuring.Measured(counts, ["", ""], None)
    costs = {1: {NAME: StepCosts(0.1, 1.0, {GAMMA: 1.0})}}
    [row] = measuring._rows(opened, Setting(NAME, 1.0, GAMMA), {0: cell}, costs, {})
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(zoo.load(models / name)[1]))
        for name in ("draft", "target")
    ]
    ratio = sizes[0] / sizes[1]
    assert ratio < 0.6
    assert row["block_efficiency"] == 3
    assert row["memory_bound_speedup"] == pytest.approx(3 / (GAMMA * ratio + 1))


# --- decode --------------------------------------------------------------------------------------


@each_setting
def test_decode_s_sampler_is_that_of_its_config(
    decoder_with, expected, temperature, lenience, options
):
    found = decoder_with(
        temperature=temperature,
        lenience=lenience or Lenience("square"),
        compute_dtype="bfloat16",
        **CUT,
        **OWN,
        **options,
    )
    assert found.speculation == expected(temperature, lenience, options)


def test_decode_with_a_draft_does_as_its_config_says(decoder_with, told):
    found = decoder_with(temperature=0.7, verification="block", **CUT, **OWN)
    prompts = Lines(PROMPTS, "--prompt")
    inputs = found.encode(prompts)
    arguments = told(decoder, "slot_sample", lambda: found(prompts, inputs, first_id=4))
    assert arguments["rng"] == jax.random.key(SEED)
    assert arguments["slots"] == BATCH_SIZE
    assert arguments["speculation"] is found.speculation
    assert arguments["target_params"] is found.target.params
    assert arguments["draft_params"] is found.draft.params
    assert arguments["inputs"] is inputs
    assert arguments["row_ids"].tolist() == [4, 5]


def test_decode_without_a_draft_does_as_its_config_says(decoder_with, told):
    found = decoder_with(draft="", temperature=0.7, batch_size=1, **CUT)
    prompts = Lines(PROMPTS, "--prompt")
    inputs = found.encode(prompts)
    arguments = told(decoder, "autoregressive_sample", lambda: found(prompts, inputs, first_id=4))
    assert arguments["rng"] == jax.random.key(SEED)
    assert arguments["sampling"] == Sampling(0.7, 11, 0.8)
    assert arguments["max_new_tokens"] == LIMIT
    assert arguments["params"] is found.target.params
    assert arguments["inputs"].tolist() == inputs[:1].tolist()  # of batches of one
    assert arguments["row_ids"].tolist() == [4]


@pytest.mark.parametrize(
    ("vocabulary", "input_eos", "ends"),
    [
        ("arithmetic_stories", None, False),
        ("arithmetic_stories", False, False),
        ("arithmetic_stories", True, True),
        ("bytes", None, True),
        ("bytes", False, False),
    ],
)
def test_decode_ends_a_prompt_as_its_config_says(decoder_with, vocabulary, input_eos, ends):
    target = {"bytes": {"target": "cpu_t5_draft"}}.get(vocabulary, {})  # a preset of enough pieces
    found = decoder_with(outline, draft="", vocabulary=vocabulary, input_eos=input_eos, **target)
    [row] = found.encode(Lines(PROMPTS[:1], "--prompt")).tolist()
    pieces = found.vocabulary.encode(PROMPTS[0])
    expected = pieces + [found.vocabulary.eos_id] * ends
    assert row == expected + [0] * (len(row) - len(expected))


def test_decode_takes_as_much_of_a_prompt_as_its_config_says(decoder_with):
    prompts = Lines(PROMPTS[1:], "--prompt")
    short = {"input_length": 5, "truncate": True}
    found = decoder_with(outline, draft="", **short)
    pieces = found.vocabulary.encode(PROMPTS[1])
    assert len(pieces) > 5
    assert found.encode(prompts).tolist() == [pieces[:5]]
    ending = decoder_with(outline, draft="", input_eos=True, **short)
    assert ending.encode(prompts).tolist() == [[*pieces[:4], found.vocabulary.eos_id]]
    with pytest.raises(UserError, match="input pieces, where input_length is 5; raise"):
        decoder_with(outline, draft="", input_length=5).encode(prompts)
    long = Lines(["and " * 60], "--prompt")  # of more pieces than the default takes
    [row] = decoder_with(outline, draft="", input_length=61).encode(long)
    assert np.count_nonzero(row) == 60


def test_decode_reads_the_field_and_writes_the_prefix_of_its_config(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question": PROMPTS[0], "input": PROMPTS[1]}) + "\n")
    config = DecodeConfig(target="t", prompts=str(path), input_field="question", prefix="solve: ")
    expected = ["solve: " + PROMPTS[0]]
    assert [prompt.input for prompt in given_prompts(config)] == expected
    flags = DecodeConfig(target="t", prompt=PROMPTS[:1], prefix="solve: ")
    assert [prompt.input for prompt in given_prompts(flags)] == expected
    text = tmp_path / "prompts.txt"
    text.write_text(PROMPTS[0])
    lines = DecodeConfig(target="t", prompts=str(text), prefix="solve: ")
    assert [prompt.input for prompt in given_prompts(lines)] == expected


# --- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "limit"), [(LIMIT, LIMIT), (0, 57)])
def test_generate_decodes_as_its_config_says(models, task, told, tmp_path, given, limit):
    config = GenerateConfig(
        target=str(models / "target"),
        task=task,
        split="validation",
        temperature=0.7,
        max_new_tokens=given,
        batch_size=BATCH_SIZE,
        compute_dtype="bfloat16",
        seed=SEED,
        **CUT,
    )
    found = told(
        generate, "autoregressive_sample", lambda: generate.main(config, tmp_path / "texts")
    )
    assert found["model"] == _in_bfloat16(models / "target")
    assert found["sampling"] == Sampling(0.7, 11, 0.8)
    assert found["max_new_tokens"] == limit
    assert found["rng"] == purpose_key(SEED, "generate")
    assert found["row_ids"].tolist() == [0, 1]
