"""The decoding benchmark with tiny models: its figures, its peers, its refusals."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.latency import DRAFT_STEP, TARGET_STEP, Clock, Timing, verify
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, init_params
from experiments import benchmark
from experiments.benchmarks import decode, decode_drafted, decode_plain, decode_products
from experiments.benchmarks.decode import Config

PLAIN = Config(
    parts=("plain",),
    peers=False,
    batch_sizes=(1, 3),
    shapes=("cpu_draft", "cpu_t5_draft"),
    input_length=5,
    new_tokens=(4, 7),
    rounds=2,
    read_megabytes=1,
)
DRAFTED = dataclasses.replace(
    PLAIN,
    parts=("drafted",),
    batch_sizes=(1, 2),
    gammas=(2, 3),
    max_new_tokens=6,
    tuning_prompts=2,
    prompts=4,
    repeats=1,
    cost_steps=2,
)
FIGURES = (
    *("plain_over_weight_read_batch1", "plain_over_weight_read_batch3_draft"),
    *("milliseconds_per_token_length4_batch1", "milliseconds_per_token_length7_batch3_draft"),
    *("longest_over_shortest_per_token_batch1", "longest_over_shortest_per_token_batch3_draft"),
)
DRAWN = (
    *("speculative_over_plain", "speculative_over_prediction", "block_efficiency"),
    "block_verification_gain",
)
RATIOS = ("plain_over_huggingface_batch1", "plain_over_huggingface_batch3_draft")


@pytest.fixture
def small(models):
    """The drafted part on the tiny models of the suite."""
    return dataclasses.replace(DRAFTED, target=str(models / "target"), draft=str(models / "draft"))


def check_spread(summary, key):
    low, high = summary[f"{key}_spread"]
    assert low <= summary[key] <= high


def test_every_shape_is_compiled_once_and_has_its_figures():
    summary, records = decode.measure(PLAIN, seed=3)
    for key in FIGURES:
        check_spread(summary, key)
    assert not set(RATIOS) & set(summary)  # nobody to compare with
    assert len(records) == 2 * 2 * 2
    assert [row["compilations"] for row in records] == [1] * 8
    assert summary["compilations_per_shape"] == 1
    for row in records:
        tokens = row["batch_size"] * row["new_tokens"]
        assert row["plain_tokens_per_second"] == pytest.approx(tokens / row["plain_seconds"])


def test_fresh_models_in_bfloat16_with_a_draft(capsys):
    drafted = {"fresh_draft": "cpu_t5_draft", "fresh_gamma": 2, "dtype": "bfloat16", "peers": True}
    config = dataclasses.replace(PLAIN, shapes=("cpu_t5_draft",), new_tokens=(4,), **drafted)
    summary, records = decode.measure(config, seed=3)
    assert (
        "Hugging Face: left out, it computes in float32 here and not in bf"
        in capsys.readouterr().out
    )
    for batch_size in (1, 3):
        check_spread(summary, f"fraction_of_bandwidth_with_draft_batch{batch_size}")
    assert summary["compilations_per_shape"] == 1
    for row in records:
        assert (row["draft"], row["gamma"]) == ("cpu_t5_draft", 2)
        assert 4 / 3 <= row["blocks"] <= 4
        assert 1 <= row["block_efficiency"] <= 3


def test_what_a_block_reads():
    """The target once; the draft for every token it writes."""
    config = dataclasses.replace(PLAIN, fresh_draft="cpu_t5_draft", fresh_gamma=3)
    run = decode_plain._Run(config, "cpu_t5_target", 0, decode_plain.Memory(1), has_peers=False)
    statistics = SimpleNamespace(
        emitted=np.array([4, 4]), target_calls=np.array([2, 4]), block_efficiency=None
    )
    run._speculative = lambda *_: SimpleNamespace(statistics=statistics)
    seconds = {"speculative": [12.0, 20.0], "encode": [3.0, 3.0], "encode_draft": [1.0, 1.0]}
    seconds["read"] = [0.25, 0.5]
    timings = {name: Timing(np.array(each), 11.0) for name, each in seconds.items()}
    found = run._reading_of_blocks(timings, run._inputs(2), 4)
    assert (found["blocks"], found["block_efficiency"]) == (4, 8 / 6)
    target = decode_plain.decoder_bytes(run._model, run._params)
    draft = 3 * decode_plain.decoder_bytes(*run._draft)
    read = (target + draft) / 2**20  # blocks of memory
    low, high = read * 0.25 / 2, read * 0.5 / 4  # a block takes 2 and 4 seconds
    assert low == high
    assert found["fraction_of_bandwidth_with_draft"] == pytest.approx(low)


def test_products_are_timed_for_every_shape_and_number_of_rows():
    pytest.importorskip("llvmlite")
    config = dataclasses.replace(PLAIN, parts=("products",), product_rows=(1, 5))
    summary, records = decode.measure(config, seed=3)
    for suffix in ("rows1", "rows5", "rows1_draft", "rows5_draft"):
        check_spread(summary, f"xla_over_kernel_{suffix}")
    assert len(records) == 2 * 2
    c = preset("cpu_draft")  # the weights of a layer without those that read the source
    inner = c.num_heads * c.head_dim
    assert records[0]["megabytes"] * 1e6 == 4 * c.d_model * (6 * inner + 3 * c.d_ff)
    for row in records:
        rate = row["kernel_gigabytes_per_second"] * row["kernel_seconds"]
        assert rate == pytest.approx(row["megabytes"] / 1e3)


def test_the_kernel_s_ratio_is_the_time_of_xla_over_its_own(monkeypatch):
    timings = {"xla": Timing(np.array([6.0, 8.0]), 9.0), "kernel": Timing(np.full(2, 2.0), 9.0)}
    monkeypatch.setattr(decode_products, "side_by_side", lambda *_, **__: timings)
    row = decode_products._timed(PLAIN, 3, [np.ones((4, 3), np.float32)], 2)
    assert row[decode_products.RATIO] == 3.5
    assert row[f"{decode_products.RATIO}_spread"] == [3, 4]


def test_the_weights_of_a_step():
    """Counted from the shape: three stacks of kernels a layer, the norms, the bias, the head."""
    c = dataclasses.replace(preset("cpu_target"), num_decoder_layers=3)
    model = Transformer(c)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    inner = c.num_heads * c.head_dim
    layer = c.d_model * (3 * inner + inner + 2 * inner + 3 * c.d_ff) + 3 * c.d_model
    rest = c.d_model + c.num_heads * c.relative_buckets + c.vocab_size * c.d_model
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    assert decode_plain.decoder_bytes(model, params) == 4 * (3 * layer + rest)


def test_the_time_of_a_token_is_without_the_source():
    run = object.__new__(decode_plain._Run)
    run._memory = decode_plain.Memory(1)
    run._model = Transformer(preset("cpu_draft"))
    run._params = jax.tree.map(np.asarray, init_params(run._model, jax.random.key(0)))
    seconds = {"plain": [5.0, 9.0, 7.0], "encode": [1.0, 1.0, 1.0], "read": [0.5, 0.25, 0.5]}
    seconds["huggingface"] = [10.0, 9.0, 28.0]
    timings = {name: Timing(np.array(each), 11.0) for name, each in seconds.items()}
    found = run._figures(timings, batch_size=3, new_tokens=2)
    assert found["milliseconds_per_token"] == 3000
    assert found["milliseconds_per_token_spread"] == [2000, 4000]
    assert found["plain_over_huggingface"] == 2  # of each round, then the median
    assert found["plain_over_huggingface_spread"] == [1, 4]
    assert found["compile_seconds"] == 4
    weights = decode_plain.decoder_bytes(run._model, run._params) / 2**20  # in blocks read
    assert found["plain_over_weight_read"] == pytest.approx(3 / (weights * 0.5), rel=1e-6)


def test_memory_is_read_where_the_weights_are(monkeypatch):
    on_cpu = decode_plain.Memory(2)
    assert on_cpu.calls["read"]() == np.ones(2, np.float32).view(np.int64)[0]
    assert on_cpu.bandwidth({"read": np.array([0.5, 2.0])}).tolist() == [2**22, 2**20]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_device = decode_plain.Memory(2)
    assert on_device.calls["read"]() == 1
    assert np.all(on_device.calls["copy"]() == -1)
    for call, moved in (("read", 2**21), ("copy", 2**22)):
        compiled = on_device.calls[call].func.lower(*on_device.calls[call].args).compile()
        assert compiled.cost_analysis()["bytes accessed"] >= moved  # all of it
    # the faster of the two, in every round
    seconds = {"read": np.array([0.5, 2.0]), "copy": np.array([2.0, 1.0])}
    assert on_device.bandwidth(seconds).tolist() == [2**22, 2**22]


def test_the_growth_with_the_length_is_of_each_round(monkeypatch):
    run = object.__new__(decode_plain._Run)
    run._config = dataclasses.replace(PLAIN, new_tokens=(8, 4, 6))
    run._model, run._seed = Transformer(preset("cpu_draft")), 0
    seconds = {"plain 4": [5.0, 9.0, 5.0], "plain 8": [17.0, 17.0, 25.0], "encode": [1.0] * 3}
    timings = {name: Timing(np.array(each), 11.0) for name, each in seconds.items()}
    monkeypatch.setattr(
        decode_plain, "side_by_side", lambda calls, **_: {n: timings[n] for n in calls}
    )
    found = run.growth(batch_size=2)
    assert found["longest_over_shortest_per_token"] == 2
    assert found["longest_over_shortest_per_token_spread"] == [1, 3]


def test_the_prediction_is_tau_over_what_a_block_costs():
    prompts = np.array([1.0, 2.0, 4.0])  # every prompt's figures are these times the same
    seconds = {"plain": 8, "speculative": 5, DRAFT_STEP: 1, TARGET_STEP: 4, verify(3): 6}
    seconds |= {decode_drafted.READ_TARGET: 2, decode_drafted.READ_DRAFT: 1}
    clock = Clock(
        seconds={name: value * prompts for name, value in seconds.items()},
        tokens={"plain": 20 * prompts, "speculative": 24 * prompts},
        spread={},
        compile_seconds={},
    )
    found = decode_drafted._over_prediction(clock, 24 * prompts, 10 * prompts, gamma=3)
    speedup, block_efficiency, c, v = (24 / 5) / (20 / 8), 2.4, 1 / 4, 6 / 4
    expected = speedup / (block_efficiency / (3 * c + v))
    without_source = expected * (5 / 8) / ((5 - 2 - 1) / (8 - 2))
    assert found == {
        "cost_ratio": c,
        "verification_cost": v,
        "speculative_over_prediction": pytest.approx(expected),
        "speculative_over_prediction_ci95": [pytest.approx(expected)] * 2,
        "speculative_over_prediction_decoding": pytest.approx(without_source),
        "speculative_over_prediction_decoding_ci95": [pytest.approx(without_source)] * 2,
    }


def test_a_text_with_one_changed_token_is_not_equal():
    batches = np.arange(30).reshape(2, 3, 5)
    decoders = {
        "plain": lambda batch: (batch, None),
        "speculative": lambda batch: (np.where(batch == 19, 77, batch), None),
    }
    found = decode_drafted._equal(decoders, batches)
    assert found == {"speculative_equal_texts": 5, "compared_texts": 6}


def test_a_draft_is_timed_beside_none(small):
    summary, records = decode.measure(small, seed=3)
    for key in DRAWN:
        low, high = summary[f"{key}_ci95"]
        assert low <= summary[key] <= high
    assert {"speculative_over_plain_batch2", "speculative_over_plain_batch2_ci95"} <= set(summary)
    assert {summary["gamma"], summary["gamma_batch2"]} <= set(small.gammas)
    for row in records:
        cost = {gamma: row[f"predicted_gamma{gamma}"] for gamma in small.gammas}
        assert row["gamma"] == max(cost, key=cost.get)
    one = next(row for row in records if row.get("batch_size") == 1)
    assert one["speculative_equal_texts"] == one["compared_texts"] == 4
    cost = summary["cost_ratio"] * summary["gamma"] + summary["verification_cost"]
    predicted = summary["block_efficiency"] / cost
    found = summary["speculative_over_plain"] / predicted
    assert summary["speculative_over_prediction"] == pytest.approx(found)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_hugging_face_writes_the_same_texts(small):
    config = dataclasses.replace(
        small, parts=decode.PARTS, peers=True, shapes=("cpu_draft",), new_tokens=(9,)
    )
    summary, records = decode.measure(config, seed=3)
    check_spread(summary, RATIOS[0])
    assert summary["equal_tokens"] == summary["compared_tokens"] == (1 + 2) * 9
    one = next(row for row in records if row.get("batch_size") == 1 and "gamma" in row)
    assert one["huggingface_equal_texts"] == one["huggingface_assisted_equal_texts"] == 4
    assert "speculative_over_huggingface_assisted_ci95" in summary


def test_without_peers_their_rows_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    config = dataclasses.replace(
        PLAIN, peers=True, batch_sizes=(1,), shapes=("cpu_draft",), new_tokens=(3,)
    )
    summary, _ = decode.measure(config, seed=0)
    assert "plain_over_weight_read_batch1" in summary
    assert RATIOS[0] not in summary
    assert "left out, torch and transformers not installed" in capsys.readouterr().out


def test_the_entrypoint_writes_its_files_and_keeps_them(enter, tmp_path, monkeypatch):
    monkeypatch.setattr(
        decode, "measure", lambda config, seed: ({"x": 2.0, "x_spread": [1, 3]}, [])
    )
    arguments = ["--config=experiments/configs/benchmark/decode.py:fast", f"--workdir={tmp_path}/w"]
    code, out, _ = enter(benchmark.main, benchmark.BenchmarkConfig, *arguments)
    assert code in (0, None)
    assert "x: 2 [1, 3]" in out
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["x"] == 2
    assert "device_kind" in summary
    code, _, err = enter(benchmark.main, benchmark.BenchmarkConfig, *arguments)
    assert code == 2
    assert "has the figures of such a run" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("plan",)}, "unknown part 'plan'"),
        ({"shapes": ("t5_1_1_bas",)}, "did you mean 't5_1_1_base'"),
        ({"shapes": ("lm1b_33m",)}, "has no encoder"),
        ({"shapes": ()}, "shapes is empty"),
        ({"gammas": (3, 0)}, "gammas is .*at least 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"fresh_gamma": 0}, "fresh_gamma is 0"),
        ({"fresh_draft": "lm1b_33m"}, "fresh_draft has 'lm1b_33m', which has no encoder"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16' in config.decode.dtype"),
        ({"prompts": 7, "batch_sizes": (8,)}, "too few for a batch of 8"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(UserError, match=r"unknown benchmark 'decoed'.*did you mean 'decode'"):
        benchmark.BenchmarkConfig(benchmark="decoed")


def test_a_draft_that_is_not_there_is_told_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(decode_plain, "measure", lambda *_: pytest.fail("timed"))
    config = dataclasses.replace(PLAIN, parts=("plain", "drafted"), draft="nope")
    with pytest.raises(UserError, match="unknown model 'nope'"):
        decode.measure(config, seed=3)
