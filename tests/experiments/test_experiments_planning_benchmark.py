"""--plan of `benchmark`: its programs are those that are timed, and nothing is allocated."""

import dataclasses

import jax
import numpy as np
import pytest

from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding import speculative
from distillspec_jax.models.presets import preset
from experiments import benchmark, distill, planning, planning_benchmark
from experiments.benchmarks import (
    decode,
    decode_plain,
    decode_products,
    distill_steps,
    distill_teacher,
)
from experiments.benchmarks import distill as distilling
from experiments.models import load

TINY = distilling.Pair(target="cpu_draft", draft="cpu_draft", batch_size=2, target_length=8)
DECODE = decode.Config(
    peers=False,
    batch_sizes=(1, 3),
    shapes=("cpu_t5_draft",),
    input_length=5,
    new_tokens=(7, 4),
    dtype="bfloat16",
    fresh_draft="cpu_t5_target",
    fresh_gamma=2,
    read_megabytes=1,
    product_rows=(5, 1),
    gammas=(2, 3),
    tuning_prompts=9,
    prompts=4,
    max_new_tokens=6,
)
DISTILL = distilling.Config(
    trl_small=TINY,
    chunked=TINY,
    chunk=3,
    utilisation=dataclasses.replace(TINY, batch_size=3),
    compute_dtype="bfloat16",
    parts=("trl_small", "chunked", "utilisation", "teacher"),
    teacher_batch_sizes=(2, 1),
    teacher_length=5,
    teacher_gamma=2,
)


@pytest.fixture(scope="module")
def decoding(live_arrays):
    before = live_arrays()
    outlines = list(planning_benchmark.of_decode(DECODE))
    assert live_arrays() == before
    return dict(zip(("plain", "drafted", "products"), outlines, strict=True))


@pytest.fixture(scope="module")
def taught(models):
    """The config with a small target that teaches."""
    pair = {"teacher": str(models / "target"), "teacher_draft": str(models / "draft")}
    return dataclasses.replace(DISTILL, **pair)


@pytest.fixture(scope="module")
def learning(live_arrays, taught):
    before = live_arrays()
    outlines = list(planning_benchmark.of_distill(taught))
    assert live_arrays() == before
    return dict(zip(DISTILL.parts, outlines, strict=True))


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_fresh_models_are_planned_as_they_decode(decoding, monkeypatch):
    """For the largest batch and the longest text, beside the block of memory that is read."""
    run = decode_plain._Run(DECODE, "cpu_t5_draft", 0, decode_plain.Memory(1), has_peers=False)
    plain, drafted = decoding["plain"].programs
    inputs = run._inputs(3)
    settings = {"sampling": decode_plain.GREEDY, "max_new_tokens": 7}
    called = decode_plain._generate.lower(
        run._model, run._params, inputs, jax.random.key(0), **settings, row_ids=np.arange(3)
    )
    assert plain.lowered.as_text() == called.as_text()

    def record(*arguments):
        assert drafted.lowered.as_text() == real.lower(*arguments).as_text()
        raise KeyboardInterrupt

    real = speculative._compiled
    monkeypatch.setattr(speculative, "_compiled", record)
    with pytest.raises(KeyboardInterrupt):
        run._speculative(inputs, 7)
    assert (
        decoding["plain"].weights == size((run._params, run._draft[1])) + 2 * 2**20
    )  # and its copy
    assert decoding["plain"].dtype == "bfloat16"


def test_trained_models_are_planned_for_all_prompts_at_once(decoding):
    outline, task = decoding["drafted"], load_task(TaskConfig())
    assert outline.weights == sum(
        size(load(name, task).params) for name in (DECODE.target, DECODE.draft)
    )
    [program] = outline.programs
    assert (program.call.rows, program.call.limit) == (9, 6)
    assert "gamma 3" in program.name


def test_products_are_the_weights_of_a_decoder(decoding):
    [program] = decoding["products"].programs
    assert program.call.rows == 5
    weights = decode_products.weights_of(preset("cpu_t5_draft"), jax.random.key(0))
    assert decoding["products"].weights == size(weights)


@pytest.mark.parametrize("part", ["trl_small", "chunked", "utilisation"])
def test_steps_are_planned_as_they_are_timed(learning, part):
    outline, steps = learning[part], distill_steps.steps_of(DISTILL, part, 0)
    assert [program.name for program in outline.programs] == list(steps)
    for program, (name, step) in zip(outline.programs, steps.items(), strict=True):
        assert program.lowered.as_text() == step.lower(name).as_text()
    assert outline.weights == sum(size((s.state, s.target_params)) for s in steps.values())
    assert outline.dtype == ("bfloat16" if part == "utilisation" else "float32")
    for step in steps.values():  # as `distill` holds them
        assert step.target_params["embedding"].dtype == outline.dtype
        assert step.state.params["embedding"].dtype == "float32"


def test_what_a_target_teaches_is_planned_as_it_is_timed(learning, taught):
    task = load_task(TaskConfig())
    target, draft = load(taught.teacher, task), load(taught.teacher_draft, task)
    models = target.model, target.params, draft.model, draft.params
    calls = distill_teacher.taught(taught, *models, distill_teacher.stories(2, 1, 0)[0], 0)
    assert [program.name for program in learning["teacher"].programs] == list(calls)
    for program, call in zip(learning["teacher"].programs, calls.values(), strict=True):
        assert program.lowered.as_text() == call.func.lower(*call.args).as_text()
    state = calls["plain"].args[0]
    assert learning["teacher"].weights == size((target.params, draft.params, state))


def test_one_part_that_does_not_fit_is_enough(capsys):
    config = dataclasses.replace(DECODE, parts=("plain", "products"))
    config = benchmark.BenchmarkConfig(benchmark="decode", decode=config)
    assert planning_benchmark.plan(config, 1.0) is None
    code = planning_benchmark.plan(config, 0.005)
    out = capsys.readouterr().out
    assert code == planning.TOO_LARGE
    assert "does not fit: 0.0" in out
    assert out.splitlines()[-1].startswith("fits: 0.00 of 0.005 GiB")  # the products


def test_the_other_benchmarks(capsys, monkeypatch):
    def planner(prepare, pauses):
        return lambda run, memory: print(prepare, pauses, run.batch_size, memory)

    monkeypatch.setattr(planning, "planner", planner)
    assert planning_benchmark.plan(benchmark.BenchmarkConfig(benchmark="scaling"), 1.0) is None
    assert "allocates nothing" in capsys.readouterr().out
    assert planning_benchmark.plan(benchmark.BenchmarkConfig(benchmark="loop"), 1.0) is None
    assert capsys.readouterr().out == f"{distill.prepare} {planning.trial} 16 1.0\n"
