"""Configs for a T5 of one's own and for starts of drafts: stages read what those before wrote."""

import importlib.util
import re
from pathlib import Path

import pytest

from experiments import schema
from experiments.configs import own_t5
from experiments.distill import DistillConfig
from experiments.evaluate import EvaluateConfig
from experiments.finetune import FinetuneConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
CLASSES = {"finetune": FinetuneConfig, "draft": FinetuneConfig, "evaluate": EvaluateConfig}


def config_of(file, options):
    """The dataclass that an entrypoint would get."""
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stage = options.split(",")[-1 if file == "own_t5" else 0]
    return schema.to_dataclass(
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
    held_out = evaluate.num_tuning_prompts
    assert evaluate.tuning_split == f"validation[:{held_out}]"
    assert evaluate.split == f"validation[{held_out}:]"


def test_all_starts_get_the_same_steps():
    drafts = config_of("draft_starts", "evaluate").drafts
    paths = [draft.path for draft in drafts]
    assert paths[:2] == ["stories-draft", "runs/starts/sibling-distilled-0"]
    assert len(drafts) == 10
    for seed in (0, 1):
        tuned, distilled = (
            {
                start: config_of("draft_starts", f"{stage},{start},{seed}")
                for start in ("cut", "fresh")
            }
            for stage in ("finetune", "distill")
        )
        for start in tuned:
            assert tuned[start].model == f"runs/starts/{start}-start-{seed}"
            assert distilled[start].draft == f"runs/starts/{start}-tuned-{seed}"
            wanted = {f"runs/starts/{start}-{done}-{seed}" for done in ("tuned", "distilled")}
            assert wanted == {d.path for d in drafts if d.seed == seed and start in d.name}
            assert (tuned[start].seed, distilled[start].seed) == (seed, seed)
        same = {"model": "", "draft": ""}
        for pair in (tuned, distilled):
            cut, fresh = (vars(each) | same for each in pair.values())
            assert cut == fresh
    assert config_of("draft_starts", "distill,sibling").draft == "stories-draft"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("own_t5", "distil"),
        ("own_t5", "large,draft"),
        ("draft_starts", "x,cut"),
        ("draft_starts", "distill,cut,x"),
        ("draft_starts", "evaluate,cut"),
    ],
)
def test_unknown_stages_are_named(file, options):
    with pytest.raises(ValueError, match=rf"unknown (stage|option in) '{options}'; "):
        config_of(file, options)


def test_one_s_own_t5_has_no_stage_of_its_own_accord():
    with pytest.raises(ValueError, match=r"a stage is missing, .*; known: draft, distill, control"):
        own_t5.get_config()


def test_every_config_that_a_command_names_is_there():
    texts = [
        ROOT / "README.md",
        *(ROOT / "launch").iterdir(),
        *(ROOT / "experiments").rglob("*.py"),
    ]
    commands = re.compile(r"experiments/configs/[a-z]\w*(?:/\w+)*\.py")
    named = {name for path in texts for name in commands.findall(path.read_text("utf-8"))}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
