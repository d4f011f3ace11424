"""evaluate from the config to the files: its keys, that its figures agree, and bad input."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from distillspec_jax import zoo
from distillspec_jax.data.tasks import TaskConfig, load_task
from distillspec_jax.decoding.block_length import BlockLength, tune
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.evaluation import latency
from distillspec_jax.report import figures, page, runs, tables
from experiments import cell_tables, evaluate, measuring
from experiments.bench import Runner, Setting, open_bench
from experiments.evaluate import DraftConfig, EvaluateConfig

FIXED = (
    *("acceptance_rate", "block_efficiency", "gamma", "temperature", "cost_ratio"),
    *("tokens_per_second_target", "tokens_per_second_speculative", "speedup_wall_clock"),
    *("speedup_predicted", "quality_metric", "quality", "num_prompts", "seed"),
)
SAMPLED = (
    *("acceptance_rate", "block_efficiency", "tokens_per_second_target", "quality"),
    *("tokens_per_second_speculative", "speedup_wall_clock"),
)
NOISE = 0.5


@pytest.fixture(scope="module")
def drafts(models, tmp_path_factory):
    """Three models of one shape, so that all of them share what is compiled; the first one is the
    target as well. The noise is large: fresh models are all but uniform and would agree."""
    folder = tmp_path_factory.mktemp("drafts")
    model, params = zoo.load(models / "draft")
    paths = [models / "draft"]
    for seed in (7, 8):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        changed = tree.unflatten(
            [x + NOISE * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )
        card = zoo.describe(models / "draft")
        card = {"vocabulary_fingerprint": card["vocabulary_fingerprint"]}
        paths.append(folder / str(seed))
        zoo.save_native(model, changed, paths[-1], card, dtype="float32")
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def config(stories, drafts):
    """Two drafts, one of them with two seeds, measured on the validation stories."""
    return EvaluateConfig(
        target=drafts[0],
        drafts=(
            DraftConfig(name="finetuned", path=drafts[1]),
            DraftConfig(name="distilled", path=drafts[0], seed=0),
            DraftConfig(name="distilled", path=drafts[2], seed=1),
        ),
        task=TaskConfig(
            name="jsonl",
            vocabulary="arithmetic_stories",
            train_file=str(stories / "train.jsonl"),
            validation_file=str(stories / "validation.jsonl"),
            input_length=41,
            target_length=57,
            metric="exact_match_number",
        ),
        split="validation",
        tuning_split="train[:7]",
        max_new_tokens=9,
        gammas=(3,),
        gamma_grid=(2,),
        batch_size=4,
        timed_prompts=2,
        timed_repeats=1,
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "evaluation"
    evaluate.main(config, folder)
    return folder


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_every_row_and_the_headline_have_the_fixed_keys(summary):
    rows = summary["drafts"]
    # two temperatures, gamma 3 and the chosen 2, three drafts
    assert len(rows) == 2 * 2 * 3
    assert {row["name"] for row in rows} == {"finetuned", "distilled"}
    for row in [*rows, summary]:
        assert set(FIXED) <= set(row), set(FIXED) - set(row)
        for key in SAMPLED:
            low, high = row[f"{key}_ci95"]
            assert low <= row[key] <= high
    assert {"jax_version", "flax_version", "device_kind", "device_count"} <= set(summary)
    assert (summary["name"], summary["gamma"], summary["temperature"]) == ("distilled", 3, 0)


def test_figures_of_a_row_agree_with_each_other(summary):
    for row in [*summary["drafts"], *summary["pooled"]]:
        gamma, tau = row["gamma"], row["block_efficiency"]
        assert 1 <= tau <= gamma + 1
        c, v = row["cost_ratio"], row["verification_cost"]
        assert row["speedup_predicted"] == pytest.approx(tau / (c * gamma + 1))
        assert row["speedup_predicted_verification"] == pytest.approx(tau / (c * gamma + v))
        # fresh models rarely end a text: the limit alone tells counting from reading the texts
        assert row["acceptance_rate_blocks"] == pytest.approx(row["acceptance_rate"], abs=0.1)
        assert len(row["accepted_histogram"]) == gamma + 1
        assert row["num_prompts"] == 7
        assert row["lossless"] is True


def test_the_target_as_its_own_draft_is_accepted_whole(summary):
    [row] = [
        row
        for row in summary["drafts"]
        if (row["name"], row["seed"], row["temperature"], row["gamma"]) == ("distilled", 0, 1, 3)
    ]
    assert row["acceptance_rate"] == 1
    assert row["acceptance_rate_overlap"] == pytest.approx(1)
    assert row["memory_bound_speedup"] == pytest.approx(row["block_efficiency"] / (3 + 1))


def test_greedy_texts_equal_plain_decoding(summary):
    for row in summary["drafts"]:
        if row["temperature"] == 0:
            assert row["greedy_mismatches"] == 0
        else:
            assert "greedy_mismatches" not in row


def test_a_text_with_one_changed_token_is_a_mismatch():
    plain, output = (SimpleNamespace(tokens=np.arange(15).reshape(3, 5)) for _ in range(2))
    assert measuring._mismatches(output, plain) == 0
    output.tokens[1, 4] = 77
    assert measuring._mismatches(output, plain) == 1
    output.tokens[1, 0] = 77  # texts are counted, not tokens
    assert measuring._mismatches(output, plain) == 1


def test_seeds_are_pooled(summary):
    [pooled] = [
        row
        for row in summary["pooled"]
        if (row["name"], row["temperature"], row["gamma"]) == ("distilled", 1, 3)
    ]
    each = [
        row
        for row in summary["drafts"]
        if (row["name"], row["temperature"], row["gamma"]) == ("distilled", 1, 3)
    ]
    assert pooled["seeds"] == [row["seed"] for row in each] == [0, 1]
    low, high = sorted(row["block_efficiency"] for row in each)
    assert low < pooled["block_efficiency"] < high
    histograms = np.array([row["accepted_histogram"] for row in each])
    assert pooled["accepted_histogram"] == histograms.sum(0).tolist()


def test_the_headline_is_the_last_name_s_first_row():
    rows = [{"name": name, "gamma": gamma} for name, gamma in (("a", 7), ("b", 7), ("a", 4))]
    rows = [row | {"lossless": True} for row in rows]
    summary = measuring.Results(drafts=[], pooled=rows, gains=[], records=[]).summary()
    assert (summary["name"], summary["gamma"]) == ("b", 7)


def test_the_headline_s_gain_is_that_of_its_gamma():
    rows = [
        {"name": name, "gamma": gamma, "lossless": lossless}
        for gamma in (7, 3)
        for lossless in (False, True)  # a grid whose lenience does not begin with 1
        for name in ("a", "b")
    ]
    about = {"figure": "block_efficiency", "over": "a", "temperature": 0.0, "gain_ci95": [1, 3]}
    gains = [{**about, "gamma": gamma, "gain": gamma / 2} for gamma in (7, 3)]
    summary = measuring.Results(drafts=[], pooled=rows, gains=gains, records=[]).summary()
    assert (summary["gamma"], summary["block_efficiency_over_a_t0"]) == (7, 3.5)
    assert (summary["name"], summary["lossless"]) == ("b", True)


def test_gains_are_ratios_of_the_rows(summary):
    gains = [row for row in summary["gains"] if row["figure"] == "block_efficiency"]
    assert [(row["name"], row["over"], row["gamma"]) for row in gains] == [
        ("distilled", "finetuned", 3)
    ] * 2
    for gain in gains:
        taus = {
            row["name"]: row["block_efficiency"]
            for row in summary["pooled"]
            if (row["temperature"], row["gamma"]) == (gain["temperature"], 3)
        }
        assert gain["gain"] == pytest.approx(taus["distilled"] / taus["finetuned"])
        key = f"block_efficiency_over_finetuned_t{gain['temperature']:g}"
        assert summary[key] == gain["gain"]
        assert summary[f"{key}_ci95"] == gain["gain_ci95"]
    assert [row["gamma"] for row in summary["gains"] if row["figure"] == "tokens_per_second"] == [
        2,
        2,
    ]


def test_records_hold_curves_tuning_and_rows(workdir, summary):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds.count("tune") == 2 * 2
    assert kinds.count("curve") == 2 * 2 * 2
    assert kinds.count("draft") == len(summary["drafts"])


def test_started_again_it_keeps_what_it_has(config, workdir, monkeypatch, capsys):
    before = (workdir / "summary.json").read_bytes()
    monkeypatch.setattr(measuring, "measure", lambda bench: pytest.fail("measured again"))
    evaluate.main(config, workdir)
    assert (workdir / "summary.json").read_bytes() == before
    out = capsys.readouterr().out
    assert "kept:" in out
    assert "distilled, T = 0, gamma 3: acceptance_rate" in out


@pytest.mark.parametrize(
    "changed", [{}, {"num_prompts": 3}, {"timed_prompts": 1}, "order", b"[]", b"\xff", b"{" * 10**5]
)
def test_other_weights_or_sizes_are_measured_again(config, workdir, monkeypatch, tmp_path, changed):
    """The path of a draft may be the same while its run went on; the last one is the headline.

    A summary that is damaged tells nothing.
    """
    damaged = changed if isinstance(changed, bytes) else b""
    if damaged:
        changed = {}
    elif changed == "order":
        changed = {"drafts": config.drafts[::-1]}
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    summary = json.loads((workdir / "summary.json").read_text())
    if not changed:
        summary["weights"]["distilled, seed 1"] = "0" * 64
    (tmp_path / "summary.json").write_bytes(damaged or json.dumps(summary).encode())
    config = dataclasses.replace(config, **changed)

    class MeasuredError(Exception):
        pass

    def measure(bench):
        raise MeasuredError

    monkeypatch.setattr(measuring, "measure", measure)
    with pytest.raises(MeasuredError):
        evaluate.main(config, tmp_path)


def test_the_gamma_that_is_timed_is_the_tuner_s_choice(config, monkeypatch, tmp_path):
    """Costs that forbid long blocks make it choose the short one, and the other way round."""
    changed = dataclasses.replace(
        config, temperatures=(1.0,), drafts=config.drafts[:1], timed_prompts=0, gamma_grid=(1, 5)
    )
    for draft_step, expected in ((1e-9, 5), (9.0, 1)):
        costs = latency.StepCosts(draft_step, 1.0, {1: 1.0, 3: 1.0, 5: 1.0})
        monkeypatch.setattr(latency, "step_costs", lambda *_, costs=costs: costs)
        folder = tmp_path / str(expected)
        evaluate.main(changed, folder)
        summary = json.loads((folder / "summary.json").read_text())
        assert [row["gamma"] for row in summary["drafts"]] == [3, expected]
        assert "speedup_wall_clock" not in summary
        records = (folder / "metrics.jsonl").read_text().splitlines()
        curve = {
            row["gamma"]: row["block_efficiency_path"]
            for row in map(json.loads, records)
            if row["kind"] == "tune"
        }
        assert tune(curve, draft_step, {1: 1.0, 5: 1.0}).gamma == expected


def test_gamma_is_never_chosen_on_the_prompts_of_the_claim(config, monkeypatch):
    seen = []

    class TunedError(Exception):
        pass

    class Spy(Runner):
        def plain(self, prompts, *arguments):
            seen.append(prompts)
            return super().plain(prompts, *arguments)

        def along(self, prompts, *arguments):
            seen.append(prompts)
            return super().along(prompts, *arguments)

    def decode(*_):
        raise TunedError

    changed = dataclasses.replace(config, temperatures=(0.0,), drafts=config.drafts[:1])
    bench = open_bench(changed, load_task(changed.task))
    costs = latency.StepCosts(0.1, 1.0, {2: 1.0, 3: 1.0})
    monkeypatch.setattr(latency, "step_costs", lambda *_: costs)
    monkeypatch.setattr(measuring, "Runner", Spy)
    monkeypatch.setattr(measuring, "_decode", decode)
    with pytest.raises(TunedError):
        measuring.measure(bench)
    assert len(seen) == 2
    assert all(prompts is bench.tuning_prompts for prompts in seen)


def test_gains_in_speed_compare_each_draft_at_its_own_gamma():
    chosen = {("base", 0.0): 3, ("best", 0.0): 5}
    rates = {("base", 3): 2.0, ("base", 5): 1.0, ("best", 3): 7.0, ("best", 5): 5.0}
    names = {key: measuring._entrant(Setting(key[0], 0.0, key[1]), 1) for key in rates}
    clock = latency.Clock(
        seconds={name: np.ones(6) for name in names.values()},
        tokens={names[key]: np.full(6, rate) for key, rate in rates.items()},
        spread={},
        compile_seconds={},
        batch_size=8,
    )
    seeds = [SimpleNamespace(config=SimpleNamespace(seed=1))]
    bench = SimpleNamespace(
        names=["base", "best"], lossless_temperatures=[0.0], seeds=lambda name: seeds
    )
    [gain] = measuring._gains_in_speed(bench, chosen, clock)
    assert gain["gain"] == 2.5
    assert (gain["gamma"], gain["gamma_over"]) == (5, 3)
    assert gain["num_prompts"] == 6 * 8  # not the batches


def test_each_batch_size_has_a_gamma_of_its_own(config, monkeypatch, tmp_path):
    """Of a single row blocks are cheap to verify, of two rows they are dear."""
    changed = dataclasses.replace(
        config, temperatures=(1.0,), timed_prompts=4, timed_batch_sizes=(1, 2), gamma_grid=(1, 5)
    )

    def step_costs(target, target_params, draft, draft_params, inputs, gammas):
        dear = {gamma: 1.0 + 9.0 * (len(inputs) > 1) * gamma for gamma in gammas}
        return latency.StepCosts(1e-9, 1.0, dear)

    monkeypatch.setattr(latency, "step_costs", step_costs)
    evaluate.main(changed, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    chosen = {
        (row["name"], row["batch_size"]): row["gamma"] for row in records if row.get("chosen")
    }
    names = "finetuned", "distilled"
    assert chosen == {(name, size): g for name in names for size, g in ((1, 5), (2, 1))}
    assert {row["gamma"] for row in summary["drafts"]} == {1, 3, 5}
    speeds = [gain for gain in summary["gains"] if gain["figure"] == "tokens_per_second"]
    assert [(gain["batch_size"], gain["gamma"], gain["gamma_over"]) for gain in speeds] == [
        (1, 5, 5),
        (2, 1, 1),
    ]
    assert summary["tokens_per_second_over_finetuned_t1"] == speeds[0]["gain"]
    text = tables.gains_table(runs.find_runs(tmp_path)[0]).markdown()
    assert "| 1 | tokens per second, batch 2 |" in text


def test_each_batch_size_has_the_costs_and_the_clock_of_its_own(config, monkeypatch, tmp_path):
    changed = dataclasses.replace(
        config, temperatures=(0.0,), drafts=config.drafts[:1], tune=False, timed_prompts=5
    )
    changed = dataclasses.replace(changed, timed_batch_sizes=(1, 2))

    def step_costs(target, target_params, draft, draft_params, inputs, gammas):
        return latency.StepCosts(0.1 * len(inputs), 1.0, dict.fromkeys(gammas, 1.0))

    monkeypatch.setattr(latency, "step_costs", step_costs)
    evaluate.main(changed, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["drafts"]
    assert [(row["batch_size"], row["timed_prompts"]) for row in rows] == [(1, 5), (2, 4)]
    assert [row["cost_ratio"] for row in rows] == [0.1, 0.2]
    tau = rows[1]["block_efficiency"]
    assert rows[1]["speedup_predicted"] == pytest.approx(tau / (3 * 0.2 + 1))
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # figures draw curves beside the rows of the first size
    assert {row["cost_ratio"] for row in records if row["kind"] == "curve"} == {0.1}


def test_gains_are_of_lossless_rows_alone(config, tmp_path):
    changed = dataclasses.replace(config, lenience=(0.3,), timed_prompts=1)
    evaluate.main(changed, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {row["lossless"] for row in summary["drafts"] if row["temperature"]} == {False}
    assert {gain["figure"] for gain in summary["gains"]} == {
        "block_efficiency",
        "tokens_per_second",
    }
    assert {gain["temperature"] for gain in summary["gains"]} == {0}


def test_lossy_rows_are_marked_and_none_is_greedy(config, tmp_path):
    changed = dataclasses.replace(
        config, lenience=(1.0, 0.3), drafts=config.drafts[:1], timed_prompts=0, tune=False
    )
    changed = dataclasses.replace(changed, lenience_kind="square", relaxed_residual=True)
    evaluate.main(changed, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["drafts"]
    assert [(row["temperature"], row["lenience"]) for row in rows] == [(0, 1), (1, 1), (1, 0.3)]
    assert [row["lossless"] for row in rows] == [True, True, False]
    assert rows[2]["acceptance_rate"] > rows[1]["acceptance_rate"]
    applied = [(row.get("lenience_kind"), row.get("relaxed_residual")) for row in rows]
    assert applied == [(None, None), (None, None), ("square", True)]
    assert "acceptance_rate_overlap" not in rows[2]
    assert "block_efficiency_path_ci95" not in rows[2]


def test_the_decoder_s_lenience_is_that_of_the_config(config):
    changed = dataclasses.replace(
        config, drafts=config.drafts[:1], lenience_kind="linear", relaxed_residual=True
    )
    bench = open_bench(changed, load_task(changed.task))
    lossy = bench.speculation(bench.drafts[0], Setting("finetuned", 1.0, 3, 0.5))
    assert lossy.lenience == Lenience("linear", 0.5, relaxed_residual=True)


def test_a_draft_with_a_sampling_of_its_own(config, workdir, tmp_path):
    """In the decoder as along the texts: all three ways of alpha are of that draft."""
    own = {"draft_temperature": 0.8, "draft_top_k": 60, "draft_top_p": 0.9}
    changed = dataclasses.replace(
        config, drafts=config.drafts[:1], timed_prompts=0, tune=False, max_new_tokens=57, **own
    )
    evaluate.main(changed, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["drafts"]
    usual = json.loads((workdir / "summary.json").read_text())["drafts"]
    for row in rows:
        assert row["draft_sampling"] == {"temperature": 0.8, "top_k": 60, "top_p": 0.9}
        assert row["lossless"] is True
        for key in ("acceptance_rate_overlap", "acceptance_rate_blocks"):
            assert row[key] == pytest.approx(row["acceptance_rate"], abs=0.05)
    assert rows[0]["greedy_mismatches"] == 0
    assert usual[0]["draft_sampling"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


def test_block_verification_is_given_no_figure_of_the_token_rule(config, tmp_path, capsys):
    changed = dataclasses.replace(
        config, drafts=config.drafts[:1], timed_prompts=0, verification="block"
    )
    evaluate.main(changed, tmp_path / "run")
    assert "no gamma is tuned" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["drafts"]
    assert [row["gamma"] for row in rows] == [3, 3]
    for row in rows:
        assert {"acceptance_rate", "speedup_predicted", "memory_bound_speedup"} <= row.keys()
        assert not row.keys() & {*measuring.OF_TARGET_TEXTS}
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"kind": "draft"') == 2


@pytest.mark.parametrize(
    "blocks", [{"block_length": BlockLength(max_entropy=0.5)}, {"num_drafts": 2}]
)
def test_other_blocks_are_measured_and_no_formula_is_given_for_them(
    config, workdir, tmp_path, blocks
):
    changed = dataclasses.replace(config, drafts=config.drafts[:1], timed_prompts=0, **blocks)
    evaluate.main(changed, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["drafts"]
    summary = json.loads((workdir / "summary.json").read_text())
    usual = [row for row in summary["drafts"] if row["name"] == "finetuned" and row["gamma"] == 3]
    assert len(rows) == len(usual) == 2
    assert [row["num_drafts"] for row in rows] == [changed.num_drafts] * 2
    assert rows[0]["greedy_mismatches"] == 0
    assert rows[1]["lossless"]
    for row, whole in zip(rows, usual, strict=True):
        assert {"speedup_predicted", "block_efficiency_iid"} <= whole.keys() - row.keys()
    tau, whole_tau = ([row["block_efficiency"] for row in each] for each in (rows, usual))
    if changed.num_drafts == 1:
        assert tau[0] <= whole_tau[0]  # of blocks that hardly pass their first token
        assert tau[1] < whole_tau[1]
    else:
        assert tau[0] == whole_tau[0]  # at T = 0 all drafts are one
        assert tau[1] != whole_tau[1]


@pytest.fixture
def file_of(tmp_path, config):
    """Writes a config file of `config` with some keys changed; returns its path."""

    def write(**changes):
        values = {**dataclasses.asdict(config), **changes}
        path = tmp_path / "evaluate.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({values!r})\n"
        )
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drafts": ()}, "config.drafts is empty"),
        ({"gammas": (3, 0)}, "config.gammas is 0, must be at least 1"),
        ({"num_prompts": 0}, "config.num_prompts is 0"),
        ({"batchsize": 8}, "did you mean 'config.batch_size'"),
        ({"temperatures": (1.0, -2.0)}, "temperature is -2.0; it must be 0"),
        ({"split": "validatoin"}, "did you mean 'validation'"),
        ({"tuning_split": "tune"}, "unknown split 'tune'"),
        (
            {"timed_batch_sizes": (8,), "timed_prompts": 50},
            "gives 7: too few for a timed batch of 8",
        ),
        ({"verification": "block", "lenience": (0.5,)}, "lenience changes token verification"),
        ({"verification": "blok"}, "did you mean 'block'"),
        ({"lenience_kind": "expontial"}, "did you mean 'exponential'"),
        ({"draft_temperature": -1.0}, "config.draft_temperature is -1.0; it must be 0 (greedy)"),
        ({"draft_top_k": -2}, "config.draft_top_k is -2; it must be 0 (off)"),
        ({"draft_top_p": 0.0}, "config.draft_top_p is 0.0; it must be in (0, 1]"),
        ({"lenience": (0.0,)}, "lenience is 0.0; it must be in (0, 1]"),
        ({"target": "nowhere/target"}, "no model at 'nowhere/target'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(enter, file_of, tmp_path, changes, words):
    folder = tmp_path / "run"
    arguments = f"--config={file_of(**changes)}", f"--workdir={folder}"
    code, _, err = enter(evaluate.main, EvaluateConfig, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not folder.exists()


def test_a_foreign_draft_is_refused(enter, file_of, models, tmp_path):
    drafts = ({"name": "foreign", "path": str(models / "foreign")},)
    arguments = f"--config={file_of(drafts=drafts)}", f"--workdir={tmp_path / 'run'}"
    code, _, err = enter(evaluate.main, EvaluateConfig, *arguments)
    assert code == 2
    assert "have different vocabularies: fingerprint of the pieces" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([("a", 0), ("a", 0)], "names a draft twice with one seed"),
        ([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)], "different numbers of seeds"),
    ],
)
def test_seeds_must_fit(enter, file_of, models, tmp_path, seeds, words):
    path = str(models / "draft")
    drafts = tuple({"name": name, "path": path, "seed": seed} for name, seed in seeds)
    arguments = f"--config={file_of(drafts=drafts)}", f"--workdir={tmp_path / 'run'}"
    code, _, err = enter(evaluate.main, EvaluateConfig, *arguments)
    assert code == 2
    assert words in err


def test_packaged_names_are_models_too():
    """The config of the quickstart names models by what the package calls them."""
    for name in ("stories-target", "stories-draft"):
        assert zoo.find(name).kind == "native"


def test_one_prompt_has_figures_without_intervals():
    row = {"block_efficiency": 3.0, "gain_over_x": 1.25}
    assert cell_tables._tau(row) == "3.00 (n=1)"
    assert cell_tables._gain(row, "gain_over_x") == "+25 % (n=1)"
    assert page._interval(row, "block_efficiency") == "one prompt: no interval"
    assert figures._error(row, "block_efficiency") == [[0.0], [0.0]]
