"""The whole way, tiny: fine-tune, distil, train the control, evaluate, decode, report."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.stories import story
from distillspec_jax.data.tasks import TaskConfig
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.training.loop import LoopConfig
from distillspec_jax.training.optimizers import OptimizerConfig
from experiments import decode, distill, evaluate, finetune, report
from experiments.decoder import DecodeConfig
from experiments.distill import DistillConfig, RecipeConfig
from experiments.evaluate import DraftConfig, EvaluateConfig
from experiments.finetune import FinetuneConfig
from experiments.report import ReportConfig
from experiments.watching import DecoderConfig

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = "arithmetic_stories"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    for split, count in (("train", 13), ("validation", 5), ("test", 6)):
        pairs = [story(split, index) for index in range(count)]
        lines = [json.dumps({"input": question, "target": answer}) for question, answer in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return TaskConfig(
        name="jsonl",
        vocabulary=VOCABULARY,
        train_file=str(folder / "train.jsonl"),
        validation_file=str(folder / "validation.jsonl"),
        test_file=str(folder / "test.jsonl"),
        input_length=41,
        target_length=57,
        metric="exact_match_number",
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A tiny model: target and draft begin as it, so that they share what is compiled."""
    vocabulary = load_vocabulary(VOCABULARY)
    sizes = dict(d_model=8, num_heads=2, head_dim=4, d_ff=11)
    layers = dict(num_encoder_layers=1, num_decoder_layers=1)
    config = ModelConfig("tiny", vocabulary.size, **sizes, **layers, tie_embeddings=True)
    model = Transformer(config)
    params = init_params(model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("fresh") / "tiny"
    card = {"vocabulary_fingerprint": vocabulary.fingerprint}
    zoo.save_native(model, params, folder, card, dtype="float32")
    return str(folder)


@pytest.fixture(scope="module")
def runs(task, fresh, tmp_path_factory):
    """The folder after all entrypoints have run."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    common = dict(
        task=task,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),
        loop=LoopConfig(log_every=2, evaluate_every=0, save_every=0),
    )
    for name, seed, steps in (("target", 0, 6), ("draft", 1, 2)):
        config = FinetuneConfig(
            model=fresh, steps=steps, seed=seed, validation_examples=5, **common
        )
        assert finetune.main(config, folder / name) is None
    for name, recipe in (("control", "sft"), ("distilled", "distillspec")):
        config = DistillConfig(
            target=str(folder / "target"),
            draft=str(folder / "draft"),
            recipe=RecipeConfig(name=recipe),
            steps=4,
            rollout_length=9,
            decoder=DecoderConfig(num_prompts=5, batch_size=5, gamma=3, temperatures=(0.0,)),
            **common,
        )
        assert distill.main(config, folder / name) is None
    paths = {"finetuned": "draft", "control": "control", "distilled": "distilled"}
    config = EvaluateConfig(
        target=str(folder / "target"),
        drafts=tuple(
            DraftConfig(name=name, path=str(folder / path)) for name, path in paths.items()
        ),
        task=task,
        temperatures=(0.0,),
        gammas=(3,),
        gamma_grid=(3,),
        tuning_split="validation",
        batch_size=6,
        timed_prompts=2,
        timed_repeats=1,
    )
    evaluate.main(config, folder)
    config = DecodeConfig(
        target=str(folder / "target"),
        draft=str(folder / "distilled"),
        prompts=task.test_file,
        input_length=41,
        max_new_tokens=57,
        gamma=3,
        batch_size=6,
    )
    decode.main(config, folder / "decoded")
    return folder


def summary(path):
    return json.loads((path / "summary.json").read_text())


def test_every_run_wrote_its_files(runs):
    for name in ("target", "draft", "control", "distilled", ".", "decoded"):
        for file in ("config.json", "metrics.jsonl", "summary.json"):
            assert (runs / name / file).is_file(), (name, file)
        found = summary(runs / name)
        assert {"jax_version", "flax_version", "distillspec_jax_version", "seed"} <= set(found)
        for line in (runs / name / "metrics.jsonl").read_text().splitlines():
            assert "kind" in json.loads(line)


def test_the_drafts_that_are_compared_are_the_ones_that_were_trained(runs):
    weights = summary(runs)["weights"]
    assert len(weights) == 4
    assert len({tuple(moments) for moments in weights.values()}) == 4  # nobody stood still


def test_evaluation_and_decoding_agree(runs):
    """The same prompts, greedy, by two entrypoints."""
    [row] = [row for row in summary(runs)["drafts"] if row["name"] == "distilled"]
    decoded = summary(runs / "decoded")
    assert decoded["num_prompts"] == row["num_prompts"] == 6
    assert decoded["block_efficiency"] == pytest.approx(row["block_efficiency"])
    assert decoded["acceptance_rate"] == pytest.approx(row["acceptance_rate"])
    assert row["greedy_mismatches"] == 0


def test_the_distillation_watched_what_the_evaluation_measures(runs):
    found = summary(runs / "distilled")
    assert 1 <= found["block_efficiency_t0"] <= 4
    assert found["recipe"] == "distillspec"
    assert found["steps"] == 4


def test_report_of_the_whole_folder(runs, capsys):
    report.main(ReportConfig(title="A tiny chain"), runs)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("block efficiency of 'distilled', gamma 3: greedy ")
    assert "over finetuned" in lines[0]
    assert "over control" in lines[0]
    assert lines[2].startswith("lossless: 18 of 18 greedy texts")
    assert lines[3] == f"look: {runs / 'report.html'} (tables.md, figures/)"
    page = (runs / "report.html").read_text()
    assert "<h1>A tiny chain</h1>" in page
    for name in ("target", "draft", "control", "distilled", "decoded"):
        assert f"<td>{name}</td>" in page
    figures = {path.name for path in (runs / "figures").iterdir()}
    assert {"block_efficiency.svg", "block_efficiency.png", "training.svg"} <= figures
    assert "| distilled | control | 0 | 3 | block efficiency |" in (runs / "tables.md").read_text()


def test_report_can_be_made_again(runs):
    """Its own files are no runs and disturb nobody."""
    command = [sys.executable, "-m", "experiments.report", f"--workdir={runs}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 4
    assert "Report: chain" in (runs / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "--workdir=nowhere"], "nowhere is no folder"),
        (["report"], "--workdir=FOLDER is missing"),
        (["decode", "--workdir=nowhere"], "--config=FILE.py is missing"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_two(tmp_path, arguments, words):
    command = [sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "nowhere").exists()
