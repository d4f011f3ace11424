"""finetune and distill from the door to the files, stopped and resumed."""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data import pipeline
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.distill.recipes import RECIPES, Recipe
from distillspec_jax.errors import UserError
from distillspec_jax.run_folders import FOLDER, saved_steps
from distillspec_jax.training.loop import LoopConfig
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments import distill, parts, watching
from experiments.distill import RecipeConfig
from experiments.finetune import FinetuneConfig
from experiments.models import Loaded
from experiments.phases import PhasedStep
from experiments.watching import DecoderConfig, make_decoding

CONFIGS = Path(__file__).resolve().parents[2] / "experiments" / "configs"
CLOCKS = ("wall_time", "seconds", "compile_seconds", "tokens_per_second", "train_seconds")


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The same programs are compiled for several runs here; the second time from a file."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("xla")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def records(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in found]


def summary(workdir):
    found = json.loads((workdir / "summary.json").read_text())
    return {key: value for key, value in found.items() if key not in CLOCKS}


def assert_same_weights(left, right):
    """Of the last step: the best, which is what a workdir loads as, may be the first."""
    left, right = (
        zoo.load(folder / FOLDER / str(saved_steps(folder / FOLDER)[-1]))[1]
        for folder in (left, right)
    )
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stop_after(batches, monkeypatch):
    """SIGTERM reaches the run while it draws the batch after so many."""
    real = parts.train_batches

    def train_batches(*arguments):
        from_step = real(*arguments)

        def stopping(step):
            for number, batch in enumerate(from_step(step)):
                if number == batches:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return stopping

    monkeypatch.setattr(parts, "train_batches", train_batches)


def test_finetune_learns_and_leaves_what_it_promises(run, tmp_path):
    code, out, err = run("finetune", "--config.decode_prompts=3", "--config.loop.log_every=3")
    assert code is None
    workdir = tmp_path / "run"
    found = summary(workdir)
    assert found["loss"] < found["loss_before"]
    assert (found["steps"], found["ended"], found["seed"]) == (6, "finished", 3)
    assert 0 <= found["quality"] <= 100
    assert [r["step"] for r in records(workdir) if r["kind"] == "eval"] == [0, 3, 6]
    assert [r["step"] for r in records(workdir) if r["kind"] == "train"] == [3, 6]
    assert "6 steps, seed 3" in out
    assert "parameters" in out
    assert "MiB" in out
    assert str(workdir) in out.splitlines()[-1]
    assert "step 6: loss" in err
    card = zoo.describe(workdir)
    assert card["vocabulary_fingerprint"] == load_vocabulary("arithmetic_stories").fingerprint
    assert card["model"]["name"] == "draft"


def test_a_finished_run_that_goes_on_is_finished_no_more(run, tmp_path, monkeypatch):
    assert run("finetune", "--config.steps=2")[0] is None
    assert summary(tmp_path / "run")["steps"] == 2
    stop_after(2, monkeypatch)
    assert run("finetune", "--config.steps=2")[0] is None  # nothing left to do, said again
    assert summary(tmp_path / "run")["ended"] == "finished"
    assert run("finetune", "--config.steps=50")[0] == 143
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("finetune", ["--config.average_decay=0.5"]),
        ("distill", ["--config.recipe.name=adaspec", "--config.reference={models}/draft"]),
    ],
)
def test_computing_in_bfloat16_saves_float32_weights(run, models, tmp_path, kind, overrides):
    overrides = [each.format(models=models) for each in overrides]
    narrow = "--config.compute_dtype=bfloat16"
    code, out, err = run(kind, narrow, *overrides, "--config.steps=4")
    assert code is None, err
    assert "parameters, bfloat16" in out
    assert run(kind, narrow, *overrides)[0] is None  # goes on
    model, params = zoo.load(tmp_path / "run")
    assert model.config.dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    start = zoo.load(models / "draft")[1]["embedding"]
    assert np.any(params["embedding"] != start)
    assert np.any(params["embedding"] != params["embedding"].astype("bfloat16"))
    code, _, err = run(kind, *overrides)
    assert code == 2
    assert 'its compute_dtype is "bfloat16", yours is "float32"' in err


def test_the_largest_seed_is_taken(run, tmp_path):
    largest = ("--config.seed=4294967295", "--config.steps=1")
    assert run("finetune", *largest, "--config.model=cpu_draft")[0] is None
    assert summary(tmp_path / "run")["seed"] == 2**32 - 1


def test_distill_stopped_and_resumed_is_uninterrupted(run, tmp_path, monkeypatch):
    """On-policy: what the draft writes, the order of the data and the records, to the bit."""
    code, _, told = run("distill", workdir="whole")
    assert code is None
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        code, out, _ = run("distill", workdir="parts")
    assert code == 143
    assert "stopped at step 4, all saved" in out
    assert not (tmp_path / "parts" / "summary.json").exists()
    code, _, err = run("distill", workdir="parts")
    assert code is None
    assert "goes on from the checkpoint of step 4" in err
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert summary(tmp_path / "parts") == summary(tmp_path / "whole")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    # once more: it is finished, and nothing is trained again
    assert run("distill", workdir="parts")[0] is None
    assert records(tmp_path / "parts") == records(tmp_path / "whole")

    figures = summary(tmp_path / "whole")
    low, high = figures["block_efficiency_t1_ci95"]
    assert low <= figures["block_efficiency_t1"] <= high
    assert figures["block_efficiency_mean"] == figures["block_efficiency_t1"]
    assert 1 <= figures["block_efficiency_t1_before"] <= 4
    assert (figures["gamma"], figures["recipe"]) == (3, "distillspec")
    train = [r for r in records(tmp_path / "whole") if r["kind"] == "train"]
    assert all(r["source_draft"] == 1 and r["source_fixed"] == 0 for r in train)
    rates = [r["eos_rate"] for r in train]  # the draft hardly ever ends an answer
    assert len(rates) == 3
    assert max(rates) < 0.5
    assert told.count("warning: only") == 1
    assert f"warning: only {rates[0]:.0%} of the samples ended by themselves; raise" in told


def test_control_is_the_same_run_by_likelihood(run, tmp_path):
    assert run("distill", "--config.recipe.name=sft")[0] is None
    train = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert all(r["source_fixed"] == 1 and "acceptance_rate" not in r for r in train)
    assert summary(tmp_path / "run")["recipe"] == "sft"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"] == dataclasses.asdict(RECIPES["sft"])  # nothing is left to be looked up
    assert run("distill", "--config.recipe.name=sft", "--config.recipe.loss=nll")[0] is None
    assert "block_efficiency_t1" in summary(tmp_path / "run")


def test_phases_chunks_and_parts_are_those_asked_for_and_change_no_figure(
    run, tmp_path, monkeypatch
):
    asked = []

    def make_step(*arguments, **settings):
        asked.append((settings["chunk"], settings["micro_batches"]))
        return PhasedStep(*arguments, **settings)

    monkeypatch.setattr(distill, "PhasedStep", make_step)
    short = ("--config.steps=2", "--config.loop.log_every=1")
    split = ("--config.time_phases=True", "--config.loss_chunk=3", "--config.micro_batches=2")
    assert run("distill", *short, workdir="whole")[0] is None
    assert asked == []
    assert run("distill", *short, *split, workdir="split")[0] is None
    assert asked == [(3, 2)]
    whole, phased = records(tmp_path / "whole"), records(tmp_path / "split")
    train = [record for record in phased if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2]
    for phase in ("rollout", "score", "update"):
        assert all(record[f"{phase}_seconds"] > 0 for record in train)
        assert not any(f"{phase}_seconds" in record for record in whole)
    for one, other in zip(whole, phased, strict=True):
        for key in (key for key in one if not key.endswith("_seconds")):
            expected = one[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=1e-4)
            assert other[key] == expected, (one["kind"], one["step"], key)


def test_the_length_bucket_reaches_the_batches(stories):
    """Of like lengths, and cut to the next multiple of it."""
    jsonl = TaskConfig(
        name="jsonl",
        vocabulary="arithmetic_stories",
        train_file=str(stories / "train.jsonl"),
        input_length=41,
        target_length=57,
    )
    layout = SimpleNamespace(share=lambda batch_size: (0, 1))

    def widths(bucket):
        """(Width, length of the longest target) of some batches."""
        config = FinetuneConfig(model="x", task=jsonl, steps=1, batch_size=4, length_bucket=bucket)
        batches = parts.train_batches(load_task(jsonl), config, layout)(0)
        targets = [batch.targets for batch in itertools.islice(batches, 8)]
        return [(each.shape[1], int((each != 0).sum(axis=1).max())) for each in targets]

    assert {width for width, _ in widths(0)} == {57}
    assert all(width == -(-longest // 5) * 5 for width, longest in widths(5))


def test_configs_of_control_and_distilled_differ_in_the_recipe_alone():
    spec = importlib.util.spec_from_file_location("stories", CONFIGS / "distill_stories.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    control, distilled = module.get_config("sft").to_dict(), module.get_config().to_dict()
    assert control.pop("recipe") == {"name": "sft"}
    assert distilled.pop("recipe") == {"name": "distillspec"}
    assert control == distilled


def test_every_field_of_a_recipe_can_be_set():
    assert [f.name for f in dataclasses.fields(RecipeConfig)] == [
        f.name for f in dataclasses.fields(Recipe)
    ]
    assert RecipeConfig(name="gkd").resolve() == RECIPES["gkd"]
    changed = RecipeConfig(name="gkd", loss="jsd", beta=0.25, lambda1=0.5).resolve()
    assert changed == dataclasses.replace(RECIPES["gkd"], loss="jsd", beta=0.25, lambda1=0.5)


def test_few_ends_are_warned_of():
    assert "only 20% of the samples" in distill._notice({"eos_rate": 0.2})
    assert distill._notice({"eos_rate": 0.5}) is None
    assert distill._notice({"eos_rate": float("nan")}) is None  # nothing was sampled
    assert distill._notice({}) is None


def test_a_run_that_is_all_warm_up_is_warned_of(run):
    code, out, err = run("finetune", optimizer__warmup_steps=9, steps=2)
    assert code is None, err
    assert "warning: config.optimizer.warmup_steps is 9: the run of 2 steps ends before" in out
    out = run("finetune", workdir="other", optimizer__warmup_steps=1, steps=2)[1]
    assert "warning" not in out


def test_updates_that_were_left_out_are_said(run, tmp_path):
    steps = {"steps": 3, "optimizer__learning_rate": 1e38}
    code, out, err = run("finetune", **steps)
    assert code is None, err
    left_out = summary(tmp_path / "run")["skipped_updates"]
    assert left_out == 2
    assert "warning: 2 updates were left out, for their gradients were not finite" in out


def test_what_a_run_read_is_told_by_digests(tmp_path, models, stories):
    """Names may stay while weights and data behind them change; a fresh draft is its seed."""
    splits = ("train", "validation")
    for split in splits:
        (tmp_path / f"{split}.jsonl").write_text((stories / f"{split}.jsonl").read_text())

    def sources(**roles):
        files = {f"{split}_file": str(tmp_path / f"{split}.jsonl") for split in splits}
        config = FinetuneConfig(
            model="x",
            steps=1,
            batch_size=1,
            task=TaskConfig(name="jsonl", vocabulary="bytes", **files),
        )
        loaded = {role: load_model(models / name) for role, name in roles.items()}
        first = next(iter(loaded.values()))
        state = SimpleNamespace(params=first.params)
        prepared = parts.Prepared("", loaded, state, None)
        return parts._sources(config, load_task(config.task), prepared)

    before = sources(draft="draft", target="target")
    assert set(before) == {"draft", "target", *(f"data of '{split}'" for split in splits)}
    assert sources(draft="draft", target="target") == before
    for changed in (
        {"draft": "foreign", "target": "target"},
        {"draft": "draft", "target": "draft"},
    ):
        after = sources(**changed)
        [role] = [role for role in before if after[role] != before[role]]
        assert changed[role] != role
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    after = sources(draft="draft", target="target")
    assert [name for name in before if after[name] != before[name]] == ["data of 'validation'"]


def test_more_steps_go_on_only_if_the_rates_stay(tmp_path, models, stories):
    files = {f"{split}_file": str(stories / f"{split}.jsonl") for split in ("train", "validation")}
    jsonl = TaskConfig(name="jsonl", vocabulary="bytes", **files)
    task = load_task(jsonl)
    loaded = load_model(models / "draft")
    state = SimpleNamespace(params=loaded.params)
    prepared = parts.Prepared("", {"model": loaded}, state, None)

    def open_run(steps, schedule, log_every=50):
        config = FinetuneConfig(
            model="x",
            task=jsonl,
            steps=steps,
            batch_size=4,
            optimizer=OptimizerConfig(schedule=schedule),
            loop=LoopConfig(log_every=log_every),
        )
        with parts.open_run(tmp_path / schedule, "finetune", config, task, prepared) as run:
            (run.workdir.path / "metrics.jsonl").write_text("")

    open_run(2, "constant")
    open_run(4, "constant", log_every=1)
    open_run(2, "cosine")
    with pytest.raises(UserError, match="its steps is 2, yours is 4"):
        open_run(4, "cosine")
    (tmp_path / "constant" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has reached steps 4, yours is 3; choose another"):
        open_run(3, "constant")
    assert json.loads((tmp_path / "constant" / "config.json").read_text())["steps"] == 4


def load_model(path):
    model, params = zoo.load(path)
    return Loaded(str(path), model, params)


def test_what_the_decoder_finds_does_not_depend_on_batches(models, stories):
    """The last batch is filled up with rows that must count nothing."""
    target, draft = load_model(models / "target"), load_model(models / "draft")
    vocabulary = load_vocabulary("arithmetic_stories")
    examples = JsonlExamples(stories / "validation.jsonl")[:5]

    def watched(batch_size, model=draft.model):
        batches = pipeline.eval_batches(
            examples, vocabulary, batch_size=batch_size, input_length=41, target_length=57
        )
        config = DecoderConfig(gamma=3, temperatures=(1.0,), batch_size=batch_size)
        return make_decoding(target, model, list(batches), config, max_new_tokens=7, seed=3)

    watch = watched(5)
    first = watch(draft.params)
    assert watched(3)(draft.params) == first
    assert watch(jax.tree.map(jnp.negative, draft.params)) != first
    assert watch(draft.params) == first, "the same random numbers in every call"
    alike = watched(5, target.model)(target.params)
    assert alike["acceptance_rate_t1"] == 1.0
    assert alike["block_efficiency_t1"] == alike["block_efficiency_mean"] > 3


def test_quality_of_answers_is_of_real_rows_alone(models, stories, monkeypatch):
    """An oracle that answers with the references has them all right."""
    vocabulary = load_vocabulary("arithmetic_stories")
    examples = JsonlExamples(stories / "validation.jsonl")[:5]
    batches = list(
        pipeline.eval_batches(examples, vocabulary, batch_size=3, input_length=41, target_length=57)
    )
    answers = iter([batch.targets for batch in batches])
    monkeypatch.setattr(
        watching, "autoregressive_sample", lambda *_, **__: SimpleNamespace(tokens=next(answers))
    )
    task = SimpleNamespace(vocabulary=vocabulary, metric="exact_match_number", target_length=57)
    watch = watching.make_quality(load_model(models / "draft").model, task, batches)
    assert watch(None) == {"quality": 100.0}


def test_references_that_the_metric_cannot_read_are_refused_before_a_step(stories):
    vocabulary = load_vocabulary("arithmetic_stories")
    examples = JsonlExamples(stories / "validation.jsonl")[:3]
    [batch] = pipeline.eval_batches(
        examples, vocabulary, batch_size=3, input_length=41, target_length=57
    )
    batch.targets[1] = vocabulary.pad_id
    task = SimpleNamespace(vocabulary=vocabulary, metric="exact_match_number", target_length=57)
    with pytest.raises(UserError, match="1 of 3 references are empty, the first is reference 1"):
        watching.make_quality(None, task, [batch])
