"""The settings of a training config reach the run: what `main` hands on, before any step.

Each entrypoint is started once, with no setting at its default; what would train, evaluate or
compile is a stand-in that notes its arguments.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data import pipeline
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.distill.recipes import Recipe
from distillspec_jax.models.transformer import in_compute_dtype
from distillspec_jax.sharding.mesh import MeshConfig
from distillspec_jax.training import optimizers
from distillspec_jax.training.loop import LoopConfig, Memory, Result
from distillspec_jax.training.optimizers import OptimizerConfig, make_schedule
from experiments import distill, finetune, parts, watching
from experiments.distill import DistillConfig, RecipeConfig
from experiments.finetune import FinetuneConfig
from experiments.models import Loaded, outline
from experiments.usage import default_of
from experiments.watching import DecoderConfig

LENGTHS = {"input_length": 41, "target_length": 57}
OPTIMIZER = OptimizerConfig(
    learning_rate=0.03,
    schedule="linear",
    warmup_steps=5,
    decay_start=11,
    floor=0.2,
    clip_norm=0.7,
    weight_decay=0.1,
    b1=0.8,
    b2=0.95,
    epsilon=1e-3,
)
LOOP = {
    "log_every": 7,
    "evaluate_every": 13,
    "save_every": 17,
    "keep_last": 5,
    "best_mode": "min",
    "patience": 3,
    "max_skipped": 11,
}
RECIPE = {
    "name": "adaspec",  # the one that reads a reference
    "loss": "jsd",
    "beta": 0.25,
    "lambda1": 0.75,
    "lambda2": 0.125,
    "rollout_temperature": 0.7,
    "target_temperature": 1.25,
    "draft_temperature": 1.5,
    "interleave_top_k": 5,
    "teacher_gamma": 2,
    "keep_fraction": 0.3,
    "reduction": "sequence",
}


@pytest.fixture(scope="module")
def common(stories):
    """Settings that both entrypoints have; of the stories, neither all nor the first split."""
    return {
        "task": TaskConfig(
            name="jsonl",
            vocabulary="arithmetic_stories",
            train_file=str(stories / "train.jsonl"),
            validation_file=str(stories / "validation.jsonl"),
            metric="exact_match_number",
            **LENGTHS,
        ),
        "steps": 37,
        "batch_size": 4,
        "seed": 3,
        "train_split": "train[1:]",
        "validation_split": "validation[1:]",
        "loss_chunk": 5,
        "length_bucket": 3,
        "micro_batches": 2,
        "average_decay": 0.75,
        "compute_dtype": "bfloat16",
        "mesh": MeshConfig(data=1, fsdp=2),
        "optimizer": OPTIMIZER,
    }


@pytest.fixture(scope="module")
def finetune_config(common, models):
    return FinetuneConfig(
        **common,
        model=str(models / "draft"),
        dropout=True,
        reduction="sequence",
        model_layout="replicated",
        validation_examples=5,
        decode_prompts=3,
        loop=LoopConfig(**LOOP, best_metric="token_accuracy"),
    )


@pytest.fixture(scope="module")
def distill_config(common, models, tmp_path_factory):
    reference = tmp_path_factory.mktemp("reference") / "reference"
    shutil.copytree(models / "draft", reference)
    return DistillConfig(
        **common,
        target=str(models / "target"),
        draft=str(models / "draft"),
        reference=str(reference),
        recipe=RecipeConfig(**RECIPE),
        rollout_length=19,
        target_layout="replicated",
        draft_layout="sharded",
        time_phases=True,
        decoder=DecoderConfig(num_prompts=5, batch_size=3, gamma=2, temperatures=(0.5,)),
        loop=LoopConfig(**LOOP, best_metric="acceptance_rate_t0.5"),
    )


def spy(patch, module, name, instead=None):
    """Notes every call of a function: its arguments by name, and what it `returned`."""
    real, calls = getattr(module, name), []

    def called(*arguments, **keywords):
        bound = inspect.signature(real).bind(*arguments, **keywords)
        bound.apply_defaults()
        result = (instead or real)(*arguments, **keywords)
        calls.append({**bound.arguments, "returned": result})
        return result

    patch.setattr(module, name, called)
    return calls


def no_steps(step_fn, state, *_, **__):
    return Result(state, "finished", Memory())


def starting(module, config, folder, **stand_ins):
    """Starts a run that takes no step: what was called with what, and what came of it."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        real = {"make_optimizer": module, "load": zoo, "Checkpoints": parts}
        calls = {name: spy(patch, place, name) for name, place in real.items()}
        for name, instead in {**stand_ins, "train": no_steps}.items():
            calls[name] = spy(patch, module, name, instead)
        assert module.main(config, folder) is None
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}
    return SimpleNamespace(
        config=config,
        calls=calls,
        layout=parts.open_layout(config),
        told=told.getvalue(),
        summary=json.loads((folder / "summary.json").read_text()),
        **once,
    )


def figures_of(name):
    """Instead of a `make_...` of evaluation: its figure is the weights that it was given."""
    return lambda *_, **__: lambda params: {name: params}


def step_of(*_, **__):
    """Instead of a `make_..._step`: a step that returns its arguments."""
    return lambda *arguments: arguments


@pytest.fixture(scope="module")
def finetuned(finetune_config, tmp_path_factory):
    return starting(
        finetune,
        finetune_config,
        tmp_path_factory.mktemp("finetune") / "run",
        make_finetune_step=step_of,
        make_likelihood=figures_of("likelihood"),
        make_quality=figures_of("quality"),
    )


@pytest.fixture(scope="module")
def distilled(distill_config, tmp_path_factory):
    return starting(
        distill,
        distill_config,
        tmp_path_factory.mktemp("distill") / "run",
        PhasedStep=step_of,
        make_decoding=figures_of("decoding"),
    )


@pytest.fixture(scope="module", params=["finetune", "distill"])
def started(request):
    return request.getfixturevalue({"finetune": "finetuned", "distill": "distilled"}[request.param])


def places(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def rows(batches):
    return [jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), batch) for batch in batches]


def held_out(stories, count, batch_size):
    """The first rows of "validation[1:]"."""
    examples = JsonlExamples(stories / "validation.jsonl")[1:][:count]
    vocabulary = load_vocabulary("arithmetic_stories")
    return rows(pipeline.eval_batches(examples, vocabulary, batch_size=batch_size, **LENGTHS))


def test_no_setting_is_at_its_default(started):
    """Else what is below would prove nothing of it; a new setting is to be added above."""
    config = started.config
    sections = [config, config.optimizer, config.loop, getattr(config, "decoder", None)]
    kept = {"name", "scale_by_parameter"}  # of the optimizer: adamw, which has no such setting
    for section in filter(None, sections):
        for field in dataclasses.fields(section):
            is_default = getattr(section, field.name) == default_of(field)
            assert not is_default or field.name in kept, field.name


def test_the_state_has_seed_average_and_mesh(started):
    state, mesh = started.train["state"], started.layout.mesh
    assert int(state.seed) == 3
    assert state.average_decay == 0.75
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert state.step.sharding.mesh == mesh


def test_the_order_of_the_data_is_of_seed_step_and_bucket(started, stories):
    def expected(step):
        return pipeline.batches(
            JsonlExamples(stories / "train.jsonl")[1:],
            load_vocabulary("arithmetic_stories"),
            batch_size=4,
            seed=3,
            start_step=step,
            bucket=3,
            **LENGTHS,
        )

    for step in (0, 5):
        found = started.train["batches"](step)
        assert rows(itertools.islice(found, 7)) == rows(itertools.islice(expected(step), 7))


def test_the_order_of_length_buckets_is_of_the_seed(stories):
    """Of the seed itself: also where the examples of a group are the same, in the same order."""
    vocabulary = load_vocabulary("arithmetic_stories")

    def group(seed):
        found = pipeline.batches(
            JsonlExamples(stories / "train.jsonl"),
            vocabulary,
            batch_size=4,
            seed=seed,
            bucket=3,
            shuffle=False,
            **LENGTHS,
        )
        return [batch.example_ids.tolist() for batch in itertools.islice(found, pipeline.GROUP)]

    assert group(1) != group(2)
    assert sorted(group(1)) == sorted(group(2))


def test_the_optimizer_is_that_of_the_config(started):
    made = started.make_optimizer
    assert (made["config"], made["steps"]) == (OPTIMIZER, 37)
    rate, expected = started.train["hooks"].learning_rate, make_schedule(OPTIMIZER, 37)
    for step in (0, 9, 20, 36):
        assert float(rate(step)) == float(expected(step))


def test_adamw_has_the_numbers_of_its_config(monkeypatch):
    made = spy(monkeypatch, optimizers.optax, "adamw")
    clipped = spy(monkeypatch, optimizers.optax, "clip_by_global_norm")
    optimizers.make_optimizer(OPTIMIZER, 37)
    [adamw], [clip] = made, clipped
    assert [adamw[name] for name in ("b1", "b2", "eps", "weight_decay")] == [0.8, 0.95, 1e-3, 0.1]
    assert clip["max_norm"] == 0.7


def test_loop_and_checkpoints_are_as_asked_for(started):
    config, train, checkpoints = started.config, started.train, started.Checkpoints
    assert (train["config"], train["steps"]) == (config.loop, 37)
    assert train["checkpoints"] is checkpoints["returned"]
    assert checkpoints["keep_last"] == 5
    assert checkpoints["description"]["seed"] == 3
    assert checkpoints["description"]["optimizer"] == dataclasses.asdict(OPTIMIZER)
    assert started.summary["seed"] == 3
    assert ": 37 steps, seed 3\n" in started.told
    assert "jsonl, 12 training examples, batch 4, up to 41 + 57 tokens" in started.told


def test_a_run_is_judged_by_the_figure_of_its_kind(common, models):
    path = str(models / "draft")
    of_finetune = FinetuneConfig(**common, model=path).loop
    assert of_finetune == LoopConfig(best_metric="loss", best_mode="min")
    common = common | {"length_bucket": 0}
    of_distill = DistillConfig(**common, target=path, draft=path).loop
    assert of_distill == LoopConfig(best_metric="block_efficiency_mean")


def test_finetune_loads_and_steps_as_asked_for(finetuned):
    load, step, state = finetuned.load, finetuned.make_finetune_step, finetuned.train["state"]
    assert (load["name_or_path"], load["seed"]) == (finetuned.config.model, 3)
    assert step["model"].config.dtype == "bfloat16"
    assert step["optimizer"] is finetuned.make_optimizer["returned"]
    settings = [step[name] for name in ("dropout", "reduction", "chunk", "micro_batches")]
    assert settings == [True, "sequence", 5, 2]
    assert step["state_shardings"] == places(state)
    replicated, sharded = (
        finetuned.layout.params(table)(step["model"].config) for table in ("replicated", "sharded")
    )
    assert places(state.params) == replicated != sharded
    assert finetuned.train["step_fn"]("state", "batch") == ("state", "batch")


def test_finetune_evaluates_what_it_hands_out_on_as_many_examples(finetuned, stories):
    likelihood, quality = finetuned.make_likelihood, finetuned.make_quality
    model = finetuned.make_finetune_step["model"]
    assert likelihood["model"] is quality["model"] is model
    assert likelihood["chunk"] == 5
    assert rows(likelihood["batches"]) == held_out(stories, 5, 4)
    assert rows(quality["batches"]) == held_out(stories, 3, 4)
    state = finetuned.train["state"].replace(params="trained", average="average", step=1)
    figures = finetuned.train["hooks"].evaluate(state)
    assert figures == {"likelihood": "average", "quality": "average"}


def test_distill_loads_and_steps_as_asked_for(distilled):
    config, step, state = distilled.config, distilled.PhasedStep, distilled.train["state"]
    loads = {call["name_or_path"]: call for call in distilled.calls["load"]}
    assert list(loads) == [config.target, config.draft, config.reference]
    assert loads[config.draft]["seed"] == 3
    assert step["draft"].config.d_model == 8
    assert step["target"].config.d_model == 16
    assert step["draft"].config.dtype == step["target"].config.dtype == "bfloat16"
    assert step["recipe"] == Recipe(**RECIPE)
    assert step["optimizer"] is distilled.make_optimizer["returned"]
    settings = [step[name] for name in ("rollout_length", "chunk", "micro_batches")]
    assert settings == [19, 5, 2]
    assert step["state_shardings"] == places(state)

    called = distilled.train["step_fn"]("state", "batch")
    assert called[::2] == ("state", "batch")
    _, target, _, reference = called
    for held, path in (target, config.target), (reference, config.reference):
        expected = in_compute_dtype(step["target"], zoo.load(path)[1])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(held), expected)
    layout = distilled.layout
    assert places(target) == layout.params("replicated")(step["target"].config)
    sharded = layout.params("sharded")(step["draft"].config)
    assert places(state.params) == places(reference) == sharded
    assert sharded != layout.params("replicated")(step["draft"].config)


def test_distill_tries_out_what_it_hands_out_as_asked_for(distilled, stories):
    call, step = distilled.make_decoding, distilled.PhasedStep
    assert call["config"] == distilled.config.decoder
    assert (call["seed"], call["max_new_tokens"]) == (3, 57)
    assert (call["target"].model, call["draft"]) == (step["target"], step["draft"])
    assert rows(call["batches"]) == held_out(stories, 5, 4)  # two devices: in fours, not threes
    state = distilled.train["state"].replace(params="trained", average="average")
    assert distilled.train["hooks"].evaluate(state) == {"decoding": "average"}
    figures = {name: distilled.summary[name] for name in ("gamma", "recipe", "num_prompts")}
    assert figures == {"gamma": 2, "recipe": "adaspec", "num_prompts": 5}


def test_no_more_prompts_are_told_of_than_are_held_out(distill_config, tmp_path):
    few = dataclasses.replace(distill_config, validation_split="validation[3:]")
    stand_ins = {"PhasedStep": step_of, "make_decoding": figures_of("decoding")}
    assert starting(distill, few, tmp_path / "run", **stand_ins).summary["num_prompts"] == 4


def test_zero_is_the_length_of_the_task_and_no_chunks(distill_config, monkeypatch):
    plain = dataclasses.replace(
        distill_config,
        recipe=RecipeConfig(name="imitkd"),
        reference="",
        rollout_length=0,
        loss_chunk=0,
        time_phases=False,
    )
    timed = spy(monkeypatch, distill, "PhasedStep", step_of)
    made = spy(monkeypatch, distill, "make_distill_step", step_of)
    layout = parts.open_layout(plain)
    with jax.set_mesh(layout.mesh):
        prepared = distill.prepare(plain, load_task(plain.task), layout, outline)
    [step] = made
    assert timed == []
    assert (step["rollout_length"], step["chunk"]) == (57, None)
    assert len(prepared.frozen) == 1


def test_the_decoder_has_its_gamma_temperatures_and_seed(monkeypatch):
    def sample(*arguments, **settings):
        counts = np.ones(2, np.int32)
        found = dict.fromkeys(("emitted", "target_calls", "accepted", "tested"), counts)
        return SimpleNamespace(statistics=SimpleNamespace(**found))

    calls = spy(monkeypatch, watching, "speculative_sample", sample)
    batch = pipeline.Batch(*np.ones((2, 2, 3), np.int32), np.arange(2))
    config = DecoderConfig(gamma=2, temperatures=(0.5, 0.25))

    def keys(seed):
        calls.clear()
        watch = watching.make_decoding(
            Loaded("target", "target model", "target params"),
            "draft model",
            [batch],
            config,
            max_new_tokens=57,
            seed=seed,
        )
        assert watch("draft params").keys() >= {"block_efficiency_t0.5", "acceptance_rate_t0.25"}
        return [jax.random.key_data(call["rng"]).tolist() for call in calls]

    first, second = keys(3)
    assert [call["sampling"] for call in calls] == [Sampling(0.5), Sampling(0.25)]
    for call in calls:
        assert (call["gamma"], call["max_new_tokens"]) == (2, 57)
        models = [call[name] for name in ("target", "target_params", "draft", "draft_params")]
        assert models == ["target model", "target params", "draft model", "draft params"]
    assert first == second  # drafts and temperatures on equal terms
    assert keys(4) != [first, second]
