"""--plan of what runs on one device: the programs planned are those that run."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import Task, TaskConfig
from distillspec_jax.decoding import autoregressive, slots, speculative
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.errors import UserError
from distillspec_jax.models import transformer
from distillspec_jax.models.fingerprint import fingerprint
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments import (
    bench,
    decode,
    decoder,
    door,
    evaluate,
    generate,
    models,
    planning,
    planning_decoding,
    sweep,
    watching,
)
from experiments.decoder import DecodeConfig
from experiments.evaluate import DraftConfig, EvaluateConfig
from experiments.generate import GenerateConfig
from experiments.sweep import FinetuneStage, SweepConfig

ROOT = Path(__file__).resolve().parents[2]
DRAFT = "stories-draft"  # its caches are not as large as those of the target


def real_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def pair(models):
    return {"target": zoo.load(models / "target"), "draft": zoo.load(DRAFT)}


@pytest.fixture(scope="module")
def one_device(models):
    """Configs by name."""
    task = TaskConfig(input_length=9, target_length=11)
    target, draft = str(models / "target"), DRAFT
    decoder = watching.DecoderConfig(batch_size=3, gamma=2, temperatures=(1.0,))
    return {
        "generate": GenerateConfig(
            target=target, task=task, max_new_tokens=7, batch_size=8, shard_size=5
        ),
        "decode": DecodeConfig(
            target=target,
            draft=draft,
            prompt=("Tom has", "Ann has", "Ben has"),
            input_length=9,
            max_new_tokens=7,
            gamma=2,
            num_drafts=2,
        ),
        "evaluate": EvaluateConfig(
            target=target,
            drafts=(
                DraftConfig(name="a", path=draft),
                DraftConfig(name="b", path=draft, seed=0),
                DraftConfig(name="c", path=target),
            ),
            task=task,
            num_prompts=3,
            num_tuning_prompts=6,
            gammas=(2,),
            gamma_grid=(3, 4),
            timed_batch_sizes=(2,),
        ),
        "sweep": SweepConfig(
            target=target,
            draft=draft,
            task=task,
            divergences=("jsd",),
            sources=("fixed", "draft", "mixed", "teacher"),
            train_splits=("train", "train[:5]"),
            batch_size=4,
            rollout_length=7,
            decoder=decoder,
            finetune=FinetuneStage(steps=2),
        ),
    }


@pytest.fixture(scope="module")
def outlined(one_device, live_arrays):
    """Outlines by name; none reads weights or examples, or makes arrays."""

    def refuse(*arguments, **settings):
        raise AssertionError("a plan reads neither weights nor examples")

    @functools.cache
    def of(name):
        before = live_arrays()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zoo, "load", refuse)
            patch.setattr(Task, "examples", refuse)
            found = getattr(planning_decoding, f"of_{name}")(one_device[name])
        assert live_arrays() == before
        return found

    return of


@pytest.mark.parametrize(
    ("name", "targets", "drafts"),
    [("generate", 1, 0), ("decode", 1, 1), ("evaluate", 2, 2), ("sweep", 1, 3)],
)
def test_weights_are_those_of_the_real_models(outlined, pair, name, targets, drafts):
    target, draft = (real_bytes(params) for _, params in pair.values())
    assert outlined(name).weights == targets * target + drafts * draft


def test_caches_are_those_of_real_decoding(outlined, pair):
    (target, target_params), (draft, draft_params) = pair.values()

    def cache(model, params, rows, limit):
        start = jax.jit(transformer.start, static_argnums=(0, 3))
        return real_bytes(start(model, params, jnp.ones((rows, 9), jnp.int32), limit)[0])

    def both(gamma, rows, limit, num_drafts=1):
        speculation = Speculation(target, draft, gamma, limit, num_drafts=num_drafts)
        prompts = jnp.ones((rows, 9), jnp.int32), jax.random.key(0), jnp.arange(rows)
        state = slots._begin(speculation, target_params, draft_params, *prompts)
        return real_bytes((state.target_cache, state.draft_cache))

    def found(name):
        return [each.caches for each in outlined(name).programs]

    assert found("generate") == [cache(target, target_params, 5, 7)]
    assert found("decode") == [both(2, 3, 7, num_drafts=2)]
    twins = cache(target, target_params, 6, 15) * 2  # the draft "c" is the target
    alone = [cache(target, target_params, rows, 11) for rows in (6, 2)]
    assert found("evaluate")[:5] == [alone[0], both(4, 6, 11), 0, twins, 0]
    assert found("evaluate")[5:] == [alone[1], both(4, 2, 11), twins // 3]
    by_draft, by_target = cache(draft, draft_params, 4, 7), cache(target, target_params, 4, 7)
    learnt = [0, 0, 0]
    assert found("sweep") == [by_draft, by_draft, by_target, *learnt, both(2, 3, 11)]


def test_what_is_planned_is_what_runs(outlined, one_device, pair):
    """The program of the plan is, letter by letter, that of the call which the entrypoint makes."""
    target, target_params = pair["target"]
    draft, draft_params = pair["draft"]
    config = one_device["generate"]
    [program] = outlined("generate").programs
    called = autoregressive._compiled_generate.lower(
        target,
        target_params,
        jnp.zeros((5, 9), jnp.int32),
        jax.random.key(0),
        sampling=config.sampling,
        max_new_tokens=7,
        row_ids=jnp.arange(5),
    )
    assert program.lowered.as_text() == called.as_text()

    *_, program = outlined("sweep").programs
    speculation = Speculation(target, draft, 2, 11, sampling=Sampling(1.0))
    prompts = jnp.zeros((3, 9), jnp.int32), jax.random.key(0), jnp.arange(3)
    called = speculative._compiled.lower(speculation, target_params, draft_params, *prompts)
    assert program.lowered.as_text() == called.as_text()


MAINS = {each.__name__.rpartition(".")[2]: each for each in (decode, evaluate, generate, sweep)}


@pytest.mark.parametrize("name", MAINS)
def test_models_compute_in_the_dtype_of_the_config(one_device, tmp_path, monkeypatch, name):
    """In a plan as in a run; weights that nothing trains are as products read them."""
    config = dataclasses.replace(one_device[name], compute_dtype="bfloat16")
    of = getattr(planning_decoding, f"of_{name}")
    wide, narrow = of(one_device[name]), of(config)
    assert {each.model.config.dtype for each in narrow.models.values()} == {"bfloat16"}

    real, loaded = models.load, []

    def load(*arguments, **settings):
        loaded.append(real(*arguments, **settings))
        if len(loaded) == len(narrow.models):
            raise KeyboardInterrupt
        return loaded[-1]

    for module in (bench, generate, sweep):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(decode, "Decoder", functools.partial(decode.Decoder, load=load))
    with pytest.raises(KeyboardInterrupt):
        MAINS[name].main(config, tmp_path)
    held = real_bytes([each.params for each in loaded])
    assert held == narrow.weights - narrow.copies < wide.weights - wide.copies
    for each, planned in zip(loaded, narrow.models.values(), strict=True):
        is_trained = (name, each.path) == ("sweep", DRAFT)
        assert each.params["embedding"].dtype == (jnp.float32 if is_trained else jnp.bfloat16)
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), m.params) for m in (each, planned)]
        assert kinds[0] == kinds[1]
        model, params = zoo.load(each.path)
        assert each.model.config.dtype == "bfloat16"
        assert each.fingerprint == fingerprint(model, params)


@pytest.mark.parametrize("name", MAINS)
def test_a_dtype_that_no_model_computes_in_is_refused(one_device, name):
    with pytest.raises(UserError, match=r"unknown dtype 'bf16' in config.compute_dtype; did"):
        dataclasses.replace(one_device[name], compute_dtype="bf16")


def test_the_caches_of_bfloat16_are_half_as_large(outlined, one_device):
    config = dataclasses.replace(one_device["generate"], compute_dtype="bfloat16")
    [narrow], [wide] = planning_decoding.of_generate(config).programs, outlined("generate").programs
    masks_and_lengths = 4 * 5 * (9 + 1)  # of 5 rows with 9 tokens of source
    assert 2 * narrow.caches == wide.caches + masks_and_lengths


def test_a_plan_says_what_it_computes_in(one_device, capsys):
    """The CPU's compiler shows no gain, so the plan says that an accelerator has it."""
    config = one_device["generate"]
    plan = planning_decoding.planner(planning_decoding.of_generate)
    weights_alone, too_little = 1e-9, 4e-5  # GiB
    for gib, dtype in itertools.product((weights_alone, too_little), ("float32", "bfloat16")):
        assert plan(dataclasses.replace(config, compute_dtype=dtype), gib) == planning.TOO_LARGE
        out = capsys.readouterr().out
        assert f"parameters, computes in {dtype}\n" in out
        assert ("the weights alone take" in out) == (gib == weights_alone)
        assert out.count("config.compute_dtype 'bfloat16'") == (dtype == "float32")
        assert out.count("an accelerator holds less than this") == (dtype == "bfloat16")


def test_slots_hold_what_a_batch_holds(outlined, one_device, pair):
    [program] = outlined("decode").programs
    planned = planning_decoding.need_of(program, 0)
    params = tuple(params for _, params in pair.values())
    speculation = decoder.Decoder(one_device["decode"], models.outline).speculation
    prompts = jnp.zeros((3, 9), jnp.int32), jax.random.key(0), jnp.arange(3)
    state = slots._begin(speculation, *params, *prompts)
    programs = (
        slots._begin.lower(speculation, *params, *prompts),
        slots._run.lower(speculation, *params, state, 1),
    )
    held = [sum(planning.memory_of(planning.compile_quickly(each))) for each in programs]
    held[1] += real_bytes((state.target_cache, state.draft_cache))
    assert max(held) == pytest.approx(planned.running, rel=0.1)


def test_training_is_held_beside_the_models(outlined, one_device, pair):
    draft = pair["draft"][1]
    state = TrainState.create(draft, make_optimizer(OptimizerConfig(), 2))
    programs = {each.name: each for each in outlined("sweep").programs}
    assert programs["update by jsd"].optimizer == "config.optimizer.name"
    assert programs["fine-tuning"].optimizer == "config.finetune.optimizer.name"
    trained = {name: each.trained for name, each in programs.items()}
    assert trained["update by jsd"] == trained["fine-tuning"] == real_bytes(state)
    assert trained[f"drafted by {one_device['sweep'].draft}, gamma 2"] == real_bytes(draft)


@pytest.mark.parametrize(
    ("name", "some", "call", "option"),
    [
        ("generate", slice(1), "5 x up to 9 + 7 tokens, 80 in all", "batch_size"),
        ("decode", slice(1), "3 x up to 9 + 7 tokens, 48 in all", "batch_size"),
        ("evaluate", slice(2), "6 x up to 9 + 11 tokens, 120 in all", "batch_size"),
        ("sweep", slice(-1, None), "3 x up to 9 + 11 tokens, 60 in all", "decoder.batch_size"),
    ],
)
def test_a_plan_allocates_nothing_and_names_what_would_help(
    live_arrays, outlined, name, some, call, option, capsys
):
    found = outlined(name)
    found = dataclasses.replace(found, programs=found.programs[some])
    before = live_arrays()
    plan = planning_decoding.planner(lambda config: found)
    assert plan(None, (found.weights + 1) / planning.GIB) == planning.TOO_LARGE
    assert live_arrays() == before
    out = capsys.readouterr().out
    assert f"plan of {name} on one device" in out
    assert f"a call of {call}" in out
    assert f"lower config.{option}" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "lower config.batch_size, config.max_new_tokens or config.input_length"),
        ({"rows": 1}, "lower config.max_new_tokens or config.input_length"),
        ({"trained": 9 * planning.GIB, "optimizer": "config.it"}, "take config.it 'adafactor'"),
        ({"trained": 9 * planning.GIB}, "lower config.batch_size"),
        ({"weights": 7 * planning.GIB}, "the weights alone take 7.00 GiB"),
    ],
)
def test_advice_for_one_device(changes, words):
    options = "config.batch_size", "config.max_new_tokens", "config.input_length"
    call = planning_decoding.Call(changes.get("rows", 4), 9, 7, options)
    about = {"trained": changes.get("trained", 0), "optimizer": changes.get("optimizer", "")}
    program = planning_decoding.Program("", None, call, **about)
    need = planning_decoding.Need(program, changes.get("weights", planning.GIB), 8 * planning.GIB)
    assert words in planning_decoding.advice(need, 6.0, "float32")


def test_decode_is_planned_for_its_prompts_and_writes_nothing(leave, models, tmp_path):
    path = tmp_path / "decode.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({{'target': {str(models / 'target')!r}}})\n"
    )
    plan = planning_decoding.planner(decode.outline_with_flags)
    flags = (
        f"--config={path}",
        f"--workdir={tmp_path / 'run'}",
        "--plan",
        "--prompt=a",
        "--prompt=b",
    )
    code, out, err = leave(
        lambda: door.run(decode.main_with_flags, DecodeConfig, plan=plan),
        *flags,
        "--device_memory_gib=1",
    )
    assert (code, err) == (None, "")
    assert "a call of 2 x up to 32 + 56 tokens, 176 in all" in out
    assert out.splitlines()[-1] == "fits: 0.00 of 1 GiB"
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == {"decode.py"}
