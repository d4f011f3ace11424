"""Configs for a T5 of one's own and for starts of drafts: stages read what those before wrote."""

import importlib.util
from pathlib import Path

import pytest

from experiments import door
from experiments.distill import DistillConfig
from experiments.evaluate import EvaluateConfig
from experiments.finetune import FinetuneConfig

CONFIGS = Path(__file__).resolve().parents[2] / "experiments" / "configs"
CLASSES = {"finetune": FinetuneConfig, "draft": FinetuneConfig, "evaluate": EvaluateConfig}


def config_of(file, options):
    """The dataclass that an entrypoint would get."""
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stage = options.split(",")[-1 if file == "own_t5" else 0]
    return door.to_dataclass(
        CLASSES.get(stage, DistillConfig), module.get_config(options), "config"
    )


@pytest.mark.parametrize("size", ["", "tiny,"])
def test_stages_of_ones_own_t5(size):
    draft, distil, control, evaluate = (
        config_of("own_t5", size + stage) for stage in ("draft", "distill", "control", "evaluate")
    )
    assert draft.model == "runs/own/draft0"
    assert distil.draft == control.draft == evaluate.drafts[0].path == "runs/own/draft"
    assert evaluate.drafts[-1].path == "runs/own/distilled"
    assert distil.target == evaluate.target == distil.task.vocabulary == "my-t5"
    assert (distil.recipe.name, control.recipe.name) == ("distillspec", "sft")
    assert (draft.steps < 1000) is bool(size)


def test_all_starts_get_the_same_steps():
    starts = ("cut", "fresh", "wide_cut", "wide_fresh")
    paths = [draft.path for draft in config_of("draft_starts", "evaluate").drafts]
    assert paths[:2] == ["stories-draft", "runs/starts/sibling-distilled"]
    tuned = {start: config_of("draft_starts", f"finetune,{start}") for start in starts}
    distilled = {start: config_of("draft_starts", f"distill,{start}") for start in starts}
    for start in starts:
        assert tuned[start].model == f"runs/starts/{start}-start"
        assert distilled[start].draft == f"runs/starts/{start}-tuned" in paths
        assert f"runs/starts/{start}-distilled" in paths
        assert (tuned[start].steps, distilled[start].steps) == (600, 400)
    assert tuned["wide_cut"].optimizer == tuned["wide_fresh"].optimizer
    assert tuned["cut"].optimizer == tuned["fresh"].optimizer
    assert config_of("draft_starts", "distill,sibling").draft == "stories-draft"


@pytest.mark.parametrize(
    ("file", "options"),
    [("own_t5", "distil"), ("own_t5", "large,draft"), ("draft_starts", "x,cut")],
)
def test_unknown_stages_are_named(file, options):
    with pytest.raises(ValueError, match="unknown"):
        config_of(file, options)
