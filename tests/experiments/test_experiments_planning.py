"""--plan: the bytes it says are those that a run holds, and nothing is allocated for it."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding import autoregressive, speculative
from distillspec_jax.errors import UserError
from distillspec_jax.sharding.layout import device_bytes
from distillspec_jax.sharding.mesh import MeshConfig
from distillspec_jax.training import validation
from experiments import (
    distill,
    finetune,
    parts,
    planning,
    watching,
)
from experiments.models import outline
from experiments.planning import Plan

ROOT = Path(__file__).resolve().parents[2]
DRAFT = "stories-draft"  # its caches are not as large as those of the target


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


def test_a_plan_says_what_a_run_would_hold(live_arrays, config, capsys):
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
    outlined = distill.prepare(config, task, layout, outline)
    real = distill.prepare(config, task, layout)
    for mine, theirs in ((outlined.state, real.state), (outlined.frozen, real.frozen)):
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


def test_a_dtype_that_no_model_computes_in_is_refused(config):
    with pytest.raises(UserError, match=r"unknown dtype 'bf16' in config.compute_dtype; did"):
        dataclasses.replace(config, compute_dtype="bf16")


def prepared(config):
    """What a plan is made of: a mesh, a task, and models and state without arrays."""
    layout, task = parts.open_layout(config), load_task(config.task)
    with jax.set_mesh(layout.mesh):
        return distill.prepare(config, task, layout, outline), config, task, layout


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


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4000, 1, 1), "batch_size 8 in 1 micro-batches gives 8 rows, which 4000 devices"),
        ((2, 8, 1), "which 16 devices .* do not divide; data x fsdp = 8 would, or a batch of 16"),
        ((-1, -1, 4000), "data -1 x fsdp -1 x tensor 4000: sizes must be positive, -1 at most"),
        ((-2, -2000, 1), "sizes must be positive"),
    ],
)
def test_a_mesh_is_refused_before_its_devices_are_made(config, monkeypatch, sizes, words):
    """Thousands of them take seconds and gigabytes."""
    monkeypatch.setattr(planning, "make_virtual_devices", lambda mesh: pytest.fail("made"))
    config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
    with pytest.raises(UserError, match=words):
        planning.planner(distill.prepare, planning.trial)(config, None)


def test_a_mesh_that_does_not_divide_the_heads_is_refused(config):
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 4))
    with pytest.raises(UserError, match=r"'tensor' = 4 does not divide num_heads = 2"):
        planning.planner(distill.prepare, planning.trial)(config, None)


def test_finetuning_can_be_planned(config, models, capsys):
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(parts.TrainingConfig)}
    del fields["loop"]  # whose best metric is of distillation
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
    del fields["loop"]  # whose best metric is of distillation
    fields |= {"batch_size": 6, "loss_chunk": 4, "mesh": MeshConfig(2, 1, 1)}
    fields["task"] = dataclasses.replace(short.task, metric="rouge2")
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
        outlined = finetune.prepare(config, task, layout, outline)
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
