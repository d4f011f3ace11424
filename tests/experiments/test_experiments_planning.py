"""--plan: the bytes it says are those that a run holds, and nothing is allocated for it."""

import dataclasses
import functools
import gc
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import Task, TaskConfig, load_task
from distillspec_jax.decoding import autoregressive, slots, speculative
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.errors import UserError
from distillspec_jax.models import transformer
from distillspec_jax.sharding.layout import device_bytes
from distillspec_jax.sharding.mesh import MeshConfig
from distillspec_jax.training import validation
from distillspec_jax.training.optimizers import OptimizerConfig, make_optimizer
from distillspec_jax.training.state import TrainState
from experiments import (
    bench,
    convert,
    decode,
    decoder,
    distill,
    door,
    evaluate,
    finetune,
    generate,
    parts,
    planning,
    planning_decoding,
    report,
    sweep,
    watching,
)
from experiments.decoder import DecodeConfig
from experiments.evaluate import DraftConfig, EvaluateConfig
from experiments.generate import GenerateConfig
from experiments.planning import Plan
from experiments.report import ReportConfig
from experiments.sweep import FinetuneStage, SweepConfig

ROOT = Path(__file__).resolve().parents[2]
DRAFT = "stories-draft"  # its caches are not as large as those of the target


def live_arrays():
    """How many arrays there are, without those that nobody holds any more."""
    gc.collect()
    return len(jax.live_arrays())


@pytest.fixture
def config(models):
    return distill.DistillConfig(
        task=TaskConfig(input_length=9, target_length=11),
        steps=3,
        batch_size=8,
        target=str(models / "target"),
        draft=str(models / "draft"),
        rollout_length=7,
        draft_layout="sharded",
        mesh=MeshConfig(2, 2, 1),
        decoder=watching.DecoderConfig(batch_size=3, gamma=2, temperatures=(1.0, 0.0)),
    )


def test_a_plan_says_what_a_run_would_hold(config, capsys):
    plan = planning.planner(distill.prepare, planning.trial)
    before = live_arrays()
    assert plan(config, 1.0) is None
    assert live_arrays() == before
    out = capsys.readouterr().out
    assert "mesh: 4 devices, data 2 x fsdp 2 x tensor 1" in out
    assert "a step: 8 rows of up to 9 + 11 tokens, 160 in all" in out
    assert "fits: 0.00 of 1 GiB" in out


def test_shapes_are_those_of_the_arrays(config):
    layout, task = parts.open_layout(config), load_task(config.task)
    outline = distill.prepare(config, task, layout, bench.outline)
    real = distill.prepare(config, task, layout)
    for mine, theirs in ((outline.state, real.state), (outline.frozen, real.frozen)):
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        assert device_bytes(mine) == device_bytes(theirs)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    [shard, *_] = real.state.params["embedding"].addressable_shards
    assert shard.data.shape[1] * 2 == real.state.params["embedding"].shape[1]


GIB = 2**30
SMALL = Plan(1, 1, 1, 1, 1, 1, 1, 1, planning.Pause("while", None, "config.decoder.batch_size"))


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        ({"temporary": GIB}, {}, "set config.loss_chunk"),
        ({"temporary": GIB}, {"loss_chunk": 4}, "raise config.micro_batches"),
        ({"temporary": GIB}, {}, "config.compute_dtype 'bfloat16'"),
        ({"temporary": GIB}, {"loss_chunk": 4}, "config.compute_dtype 'bfloat16'"),
        ({"pausing": GIB}, {}, "lower config.decoder.batch_size"),
        ({"frozen": GIB}, {}, "a larger config.mesh.fsdp or config.mesh.tensor"),
        ({"frozen": GIB}, {"target_layout": "replicated"}, "set config.target_layout"),
        ({"optimizer": GIB}, {}, "take config.optimizer.name 'adafactor'"),
        ({"parameters": GIB}, {}, "take a larger config.mesh.fsdp"),
        ({"parameters": GIB}, {"draft_layout": "replicated"}, "set config.draft_layout"),
    ],
)
def test_advice_is_about_the_largest_part(config, plan, changes, words):
    plan, config = dataclasses.replace(SMALL, **plan), dataclasses.replace(config, **changes)
    assert words in planning.advice(plan, config)


@pytest.mark.parametrize(("changes", "total"), [({}, 6), ({"pausing": 7}, 11), ({"output": 7}, 12)])
def test_a_device_holds_the_step_or_the_decoder(changes, total):
    """Beside parameters, optimiser, frozen models and batch: one byte each."""
    assert dataclasses.replace(SMALL, **changes).total == total


def prepared(config):
    """What a plan is made of: a mesh, a task, and models and state without arrays."""
    layout, task = parts.open_layout(config), load_task(config.task)
    with jax.set_mesh(layout.mesh):
        return distill.prepare(config, task, layout, bench.outline), config, task, layout


@pytest.mark.parametrize(
    ("recipe", "limits"),
    [
        ({"name": "distillspec"}, {"draft": 7}),
        ({"name": "imitkd"}, {"draft": 7}),
        ({"name": "seqkd"}, {"target": 7}),
        ({"name": "seqkd", "teacher_gamma": 2}, {"target": 9, "draft": 9}),
        ({"name": "skd"}, {"target": 7, "draft": 7}),
        ({"name": "f_distill"}, {"target": 7}),
        ({"name": "f_distill", "interleave_top_k": 3}, {"target": 7, "draft": 7}),
        ({"name": "sft"}, {}),
    ],
)
def test_caches_of_a_rollout_are_those_of_who_writes(config, recipe, limits):
    """Caches of the target are far larger, and do not always exist."""
    recipe = distill.RecipeConfig(**recipe)
    pair = {"target": "stories-target", "draft": DRAFT}
    found = prepared(dataclasses.replace(config, **pair, recipe=recipe))
    models, rows = found[0].models, 2  # of 8 on 4 devices
    sizes = {role: planning.cache_bytes(models[role], rows, 9, limits[role]) for role in limits}
    assert planning._caches(*found) == sum(sizes.values())


def test_caches_are_a_part_of_what_the_step_adds(config):
    """Those of a target that neither writes nor scores would be larger than all of it."""
    pair = {"target": "stories-target", "draft": DRAFT}
    settings = {"recipe": distill.RecipeConfig(loss="nll"), "loss_chunk": 1, "rollout_length": 200}
    found = prepared(dataclasses.replace(config, **pair, **settings))
    with jax.set_mesh(found[-1].mesh):
        plan = planning.make_plan(*found, planning.compile_step(*found), planning.trial(*found))
    assert 0 < plan.caches <= plan.temporary


@pytest.fixture
def short(config, stories):
    """The config with stories that fit its lengths."""
    data = {"name": "jsonl", "vocabulary": "arithmetic_stories", "truncate": True}
    files = {f"{split}_file": str(stories / f"{split}.jsonl") for split in ("train", "validation")}
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **data, **files))


def test_the_decoder_is_planned_as_it_runs(short, monkeypatch):
    """Its rows are those that the mesh divides, and lie where a run puts them."""
    models, config, task, layout = prepared(short)
    called = []

    def record(*arguments):
        called.append(real.lower(*arguments).as_text())
        raise KeyboardInterrupt

    real = speculative._compiled
    monkeypatch.setattr(speculative, "_compiled", record)
    with jax.set_mesh(layout.mesh):
        run = distill.prepare(config, task, layout)
        pair = run.models["target"], run.models["draft"]
        evaluate = distill._make_evaluate(config, task, *pair, layout)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run.state)
        planned = planning.lower_trial(models, config.decoder, task, layout)
    assert [planned.as_text()] == called


def test_a_decoder_that_needs_more_than_the_step_decides(config, capsys):
    decoder = dataclasses.replace(config.decoder, batch_size=512)
    config = dataclasses.replace(config, decoder=decoder)
    assert planning.planner(distill.prepare, planning.trial)(config, 1e-6) == planning.TOO_LARGE
    out = capsys.readouterr().out
    lines = "while the step runs", "while the draft is tried out", "all at once, at most"
    step, decoding, everything = (
        float(re.search(rf"{line} +([\d.]+) GiB", out)[1]) for line in lines
    )
    assert step < decoding <= everything
    assert "of 1e-06 GiB; lower config.decoder.batch_size" in out


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_an_axis_without_a_number_is_said(config, capsys, axis):
    mesh = dataclasses.replace(config.mesh, **{axis: -1})
    planning._introduce(*prepared(dataclasses.replace(config, mesh=mesh)))
    out = capsys.readouterr().out
    assert f"mesh.{axis} is -1: planned for 8 devices; give a number\n" in out
    assert out.count("give a number") == 1


@pytest.mark.parametrize(("sizes", "count"), [((-1, 1, 1), None), ((2, 2, 1), 4)])
def test_a_plan_takes_no_accelerator(monkeypatch, sizes, count):
    """Whatever the mesh: an accelerator that --plan opened would be taken from a run."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    planning.make_virtual_devices(MeshConfig(*sizes))
    devices = {"jax_num_cpu_devices": count} if count else {}
    assert settings == {"jax_platforms": "cpu", **devices}


def test_a_mesh_that_does_not_divide_the_heads_is_refused(config):
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 4))
    with pytest.raises(UserError, match=r"'tensor' = 4 does not divide num_heads = 2"):
        planning.planner(distill.prepare, planning.trial)(config, None)


def test_finetuning_can_be_planned(config, models, capsys):
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(parts.TrainingConfig)}
    config = finetune.FinetuneConfig(**fields, model=str(models / "draft"))
    plan = planning.planner(finetune.prepare, planning.validation)
    assert plan(config, 1.0) is None
    out = capsys.readouterr().out
    assert "caches" not in out
    assert "while it is validated" in out
    assert plan(dataclasses.replace(config, batch_size=4, decode_prompts=3), 1.0) is None
    assert "while it answers" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
def test_validation_is_planned_as_it_runs(short, models, monkeypatch, place):
    """Its parts, the chunks of logits included, and the answers."""
    fields = {f.name: getattr(short, f.name) for f in dataclasses.fields(parts.TrainingConfig)}
    fields |= {"batch_size": 6, "loss_chunk": 4, "mesh": MeshConfig(2, 1, 1)}
    config = finetune.FinetuneConfig(**fields, model=str(models / "draft"), decode_prompts=3)
    layout, task = parts.open_layout(config), load_task(config.task)
    called = []

    def record(*arguments, **settings):
        called.append(real.lower(*arguments, **settings).as_text())
        raise KeyboardInterrupt

    module, name = [(validation, "sums"), (autoregressive, "_compiled_generate")][place]
    real = getattr(module, name)
    monkeypatch.setattr(module, name, record)
    with jax.set_mesh(layout.mesh):
        run = finetune.prepare(config, task, layout)
        evaluate = finetune._make_evaluate(config, run.models["model"].model, task, layout)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run.state)
        outlined = finetune.prepare(config, task, layout, bench.outline)
        planned = planning.validation(outlined, config, task, layout)
    assert [planned[place].lowered.as_text()] == called


XXL = """from ml_collections import ConfigDict
def get_config():
    return ConfigDict(dict(
        target="t5_1_1_xxl", draft="t5_1_1_small", batch_size=64, steps=10, loss_chunk=32,
        task=dict(name="arithmetic_stories", input_length=128, target_length=64),
        optimizer=dict(name="adafactor"), mesh=dict(data=4, fsdp=4, tensor=4)))
"""


@pytest.mark.slow
def test_xxl_on_64_devices_is_planned_on_a_laptop(tmp_path):
    (tmp_path / "xxl.py").write_text(XXL)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = [f"--config={tmp_path / 'xxl.py'}", "--plan", "--device_memory_gib=16"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.distill", *flags],
        cwd=ROOT,
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(done.stdout, f"{seconds:.0f} s of CPU time")
    assert done.returncode in (0, planning.TOO_LARGE), done.stderr[-2000:]
    assert "mesh: 64 devices" in done.stdout
    frozen = float(re.search(r"frozen models +([\d.]+) GiB", done.stdout)[1])
    assert seconds < 60
    assert 2.592 < frozen < 2.60  # 11.1 billion float32 in fsdp 4 x tensor 4 parts, norms in 4


# --- decoding on one device -----------------------------------------------------------------------


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
def outlined(one_device):
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
    """In a plan, whose weights stay as large, as in a run."""
    config = dataclasses.replace(one_device[name], compute_dtype="bfloat16")
    of = getattr(planning_decoding, f"of_{name}")
    wide, narrow = of(one_device[name]), of(config)
    assert {each.model.config.dtype for each in narrow.models.values()} == {"bfloat16"}
    assert narrow.weights == wide.weights

    real, loaded = bench.load, []

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
    assert {each.model.config.dtype for each in loaded} == {"bfloat16"}
    assert {x.dtype.name for each in loaded for x in jax.tree.leaves(each.params)} == {"float32"}


@pytest.mark.parametrize("name", MAINS)
def test_a_dtype_that_no_model_computes_in_is_refused(one_device, config, name):
    for each in (one_device[name], config):
        with pytest.raises(UserError, match=r"unknown dtype 'bf16' in config.compute_dtype; did"):
            dataclasses.replace(each, compute_dtype="bf16")


def test_the_caches_of_bfloat16_are_half_as_large(outlined, one_device):
    config = dataclasses.replace(one_device["generate"], compute_dtype="bfloat16")
    [narrow], [wide] = planning_decoding.of_generate(config).programs, outlined("generate").programs
    masks_and_lengths = 4 * 5 * (9 + 1)  # of 5 rows with 9 tokens of source
    assert 2 * narrow.caches == wide.caches + masks_and_lengths


def test_a_plan_says_what_it_computes_in(one_device, capsys):
    """The CPU's compiler shows no gain, so the plan says that an accelerator has it."""
    config = one_device["generate"]
    plan = planning_decoding.planner(planning_decoding.of_generate)
    for dtype, advised, noted in (("float32", 1, 0), ("bfloat16", 0, 1)):
        assert plan(dataclasses.replace(config, compute_dtype=dtype), 6e-5) == planning.TOO_LARGE
        out = capsys.readouterr().out
        assert f"parameters, computes in {dtype}\n" in out
        assert out.count("config.compute_dtype 'bfloat16'") == advised
        assert out.count("an accelerator holds less than this") == noted


def test_slots_hold_what_a_batch_holds(outlined, one_device, pair):
    [program] = outlined("decode").programs
    planned = planning_decoding.need_of(program, 0)
    params = tuple(params for _, params in pair.values())
    speculation = decoder.Decoder(one_device["decode"], bench.outline).speculation
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
    outlined, name, some, call, option, capsys
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
        ({"trained": 9 * GIB, "optimizer": "config.it"}, "take config.it 'adafactor'"),
        ({"trained": 9 * GIB}, "lower config.batch_size"),
        ({"weights": 7 * GIB}, "the weights alone take 7.00 GiB"),
    ],
)
def test_advice_for_one_device(changes, words):
    options = "config.batch_size", "config.max_new_tokens", "config.input_length"
    call = planning_decoding.Call(changes.get("rows", 4), 9, 7, options)
    about = {"trained": changes.get("trained", 0), "optimizer": changes.get("optimizer", "")}
    program = planning_decoding.Program("", None, call, **about)
    need = planning_decoding.Need(program, changes.get("weights", GIB), 8 * GIB)
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


@pytest.mark.parametrize("name", ["generate", "evaluate", "sweep"])
def test_entrypoints_take_the_flag(leave, tmp_path, monkeypatch, name):
    def planner(outline_of):
        return lambda config, memory: print(outline_of.__name__, type(config).__name__, memory)

    monkeypatch.setattr(planning_decoding, "planner", planner)
    values = {"target": "t", "draft": "d", "drafts": ({"name": "a", "path": "d"},)}
    keys = {"generate": ("target",), "evaluate": ("target", "drafts"), "sweep": ("target", "draft")}
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({ {key: values[key] for key in keys[name]} })\n"
    )
    code, out, err = leave(
        lambda: runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__"),
        f"--config={path}",
        "--plan",
        "--device_memory_gib=2",
    )
    assert (code, err) == (None, "")
    assert out == f"of_{name} {name.capitalize()}Config 2.0\n"


@pytest.mark.parametrize("name", ["report", "benchmark"])
def test_what_has_nothing_to_plan_says_so(leave, tmp_path, name):
    path = tmp_path / "config.py"
    values = {"benchmark": "loop"} if name == "benchmark" else {}
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({values!r})\n"
    )
    code, out, err = leave(
        lambda: runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__"),
        f"--config={path}",
        f"--workdir={tmp_path / 'run'}",
        "--plan",
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: this entrypoint has nothing to plan: leave --plan out;")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--plan", "this entrypoint has nothing to plan: leave --plan out;"),
        ("--config=x.py", "this entrypoint takes no --config;"),
        ("--config.steps=3", "this entrypoint takes no --config;"),
        ("--device_memory_gib=16", "this entrypoint takes no --device_memory_gib;"),
        ("--workdir=x", "this entrypoint takes no --workdir;"),
    ],
)
def test_flags_that_convert_does_not_read_are_refused(leave, tmp_path, flag, words):
    folder = tmp_path / "out"
    arguments = "--from=stories-draft", f"--to={folder}", "--format=native", flag
    code, out, err = leave(lambda: door.run_flags(convert.main), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("flag", ["--plan", "--config=x.py", "--device_memory_gib=16"])
def test_faults_reads_a_workdir_and_no_other_flag_of_the_door(leave, tmp_path, flag):
    def call(*flags):
        workdir = f"--workdir={tmp_path / 'run'}"
        main = lambda: print("runs")  # noqa: E731
        return leave(lambda: door.run_flags(main, has_workdir=True), workdir, *flags)

    assert call()[:2] == (None, "runs\n")
    assert call(flag)[:2] == (2, "")


def test_memory_of_a_device_without_a_plan_is_refused(leave, tmp_path):
    def call(*flags):
        return leave(lambda: door.run(report.main, ReportConfig), *flags)

    assert call(f"--workdir={tmp_path}", "--device_memory_gib=16")[::2] == (
        2,
        "error: --device_memory_gib belongs to --plan; give both, or neither\n",
    )
