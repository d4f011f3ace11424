"""The distillation benchmark: its figures are what it times, and memory stays when logits grow."""

import dataclasses
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.data.batch import Batch
from distillspec_jax.distill import divergences, recipes
from distillspec_jax.distill.step import make_update
from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.latency import Clock, Timing
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Transformer, init_params
from distillspec_jax.training.optimizers import make_optimizer
from distillspec_jax.training.state import TrainState
from experiments.benchmarks import distill, distill_steps, distill_teacher
from experiments.benchmarks.distill import Config, Pair

TINY = Pair(target="cpu_draft", draft="cpu_draft", batch_size=6, input_length=3, target_length=48)


def test_chunks_bound_the_memory_of_logits():
    """With the texts much longer than a chunk, what grows with the vocabulary is the weights."""
    config = Config(parts=("chunked",), rounds=1, chunked=TINY, chunk=4, vocabularies=(512, 8192))
    summary, records = distill.measure(config, seed=3)
    temporary = {
        (row["vocabulary"], row["chunk"]): row["temporary_bytes"]
        for row in records
        if "vocabulary" in row
    }
    assert len(temporary) == 4
    plain, chunked = (temporary[8192, chunk] - temporary[512, chunk] for chunk in (0, 4))
    rows = 8192 - 512
    weights = 4 * rows * preset("cpu_draft").d_model
    assert plain > 2 * 4 * rows * TINY.batch_size * TINY.target_length  # logits of both models
    assert chunked < 4 * weights + 8 * 4 * rows * TINY.batch_size * 4

    timed = {row["name"]: row for row in records if "seconds" in row}
    ratio = timed["chunked"]["seconds"] / timed["plain"]["seconds"]
    assert summary["chunked_time_over_plain"] == pytest.approx(ratio)
    ratio = timed["chunked"]["temporary_bytes"] / timed["plain"]["temporary_bytes"]
    assert summary["chunked_peak_memory_over_plain"] == ratio
    assert timed["chunked"]["temporary_bytes"] < timed["chunks_alone"]["temporary_bytes"]
    tokens = TINY.batch_size * TINY.target_length
    assert timed["plain"]["tokens_per_second"] == pytest.approx(tokens / timed["plain"]["seconds"])


def test_operations_are_counted_without_the_kernel_of_the_cpu():
    """By hand: two for each weight and token, and twice as many more where it is learnt."""
    pair = Pair(target="cpu_t5_target", draft="cpu_t5_draft", batch_size=4, target_length=16)
    ours = distill_steps.Ours(pair, recipes.named("supkd"), seed=3, abstract=True)
    expected = 0.0
    for model, passes in ((ours.target, 2), (ours.draft, 6)):
        c = model.config
        inner, rows = c.num_heads * c.head_dim, c.vocab_size
        attention, mlp = 4 * c.d_model * inner, 3 * c.d_model * c.d_ff
        source = c.num_encoder_layers * (attention + mlp)
        source += c.num_decoder_layers * 2 * c.d_model * inner  # keys and values of the source
        text = c.num_decoder_layers * (attention + 2 * c.d_model * inner + mlp) + c.d_model * rows
        tokens = pair.batch_size * np.array([pair.input_length, pair.target_length])
        expected += passes * float(tokens @ [source, text])
    assert expected < ours.flops() < 1.25 * expected  # attention, softmax, norms, losses, AdamW


@pytest.mark.gpu
def test_utilisation_is_measured_on_a_gpu(device):
    """With arrays that lie there, whose backend counts no operations before it has compiled."""
    config = Config(parts=("utilisation",), utilisation=TINY, rounds=2, product_size=256)
    summary, _ = distill_steps.utilisation(config, 3)
    assert 0 < summary["score_update_utilisation"] < 1
    assert summary["score_update_flops_per_second"] > 0
    assert jnp.ones(1).devices() == {device}


@pytest.mark.parametrize(("teraflops", "spread"), [(0.0, [2, 4]), (2e-6, [0.5, 2])])
def test_utilisation_is_a_share_of_the_peak(monkeypatch, teraflops, spread):
    seconds = {"update": np.array([2.0, 4.0, 1.0]), "product": np.array([2.0, 4.0, 2.0])}
    monkeypatch.setattr(
        distill_steps,
        "side_by_side",
        lambda calls, **_: {name: Timing(seconds[name], 9.0) for name in calls},
    )
    size = 100  # 2e6 operations
    monkeypatch.setattr(distill_steps.Ours, "flops", lambda self: float(size**3) * 4)
    config = Config(
        parts=("utilisation",), utilisation=TINY, peak_teraflops=teraflops, product_size=size
    )
    summary, records = distill.measure(config, seed=3)
    assert summary["score_update_flops_per_second"] == 2e6
    assert summary["score_update_flops_per_second_spread"] == [1e6, 4e6]
    assert summary["score_update_utilisation_spread"] == spread
    assert spread[0] <= summary["score_update_utilisation"] <= spread[1]
    assert [row["name"] for row in records] == ["update", "product"]


def test_no_text_ends_before_the_limit():
    """Rollouts of full length: every row of both models, without an end of sequence."""
    pair = dataclasses.replace(TINY, target_length=19)
    ours = distill_steps.Ours(pair, recipes.named("gkd"), seed=3, decoder_only=True)
    batch, metrics = ours.calls()["rollout"]()
    total, rows = metrics["rollout_length"]
    assert rows == 6
    assert batch.targets.shape == (6, 19)
    assert total > 0.95 * 6 * 19  # id 0, padding, may come by chance
    assert metrics["eos_rate"][0] == 0
    assert not ours.draft.config.is_encoder_decoder


def test_memory_is_what_a_call_adds_whoever_allocates_it():
    held = [np.ones(2**23)]  # 64 MiB from before do not count

    def write_32_mebibytes():  # on new pages: the heap may have room left of something freed
        np.frombuffer(mmap.mmap(-1, 2**25), np.uint8)[:] = 1

    found = distill_steps.added_bytes(write_32_mebibytes)
    if found is None:
        pytest.skip("the system does not tell the peak of a process")
    assert 32 * 2**20 * 0.9 < found < held[0].nbytes


def test_parts_without_their_peers_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(distill.importlib.util, "find_spec", lambda name: None)
    assert distill.measure(Config(parts=("trl", "torch")), seed=0) == ({}, [])
    assert "trl: left out, torch, transformers, trl not installed" in capsys.readouterr().out


def test_unknown_parts_are_refused():
    with pytest.raises(UserError, match=r"unknown part 'torhc'.*did you mean 'torch'"):
        Config(parts=("torhc",))


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_the_torch_baseline_learns_by_our_loss(monkeypatch):
    """From our weights on the same texts, before and after one update; every row is a piece."""
    from experiments.benchmarks import torch_decode, torch_distill

    target, draft = (
        Transformer(ModelConfig(name, 29, width, 2, 3, 11, 2, layers, **changes))
        for name, width, layers, changes in (
            ("target", 7, 2, {"tie_embeddings": True}),
            ("draft", 5, 1, {"tie_embeddings": True, "gated": False, "activation": "relu"}),
        )
    )
    params = {
        model.config.name: init_params(model, jax.random.key(seed))
        for seed, model in enumerate((target, draft))
    }
    rng = np.random.default_rng(3)
    inputs, targets = (rng.integers(3, 29, (4, n)).astype(np.int32) for n in (5, 6))
    make = torch_distill.t5_model

    def with_our_weights(config):
        exported = torch_decode.HuggingFace(Transformer(config), params[config.name])
        module = make(config)
        module.load_state_dict(exported._module.state_dict())
        return module

    monkeypatch.setattr(torch_distill, "t5_model", with_our_weights)
    theirs = torch_distill.t5_update(draft.config, target.config, inputs, targets)
    rule = make_optimizer(distill.OPTIMIZER, 1_000)
    update = jax.jit(make_update(draft, target, recipes.named("supkd"), rule))
    state = TrainState.create(params["draft"], rule, seed=0)
    losses = []
    for _ in range(2):
        batch = Batch(inputs, targets, np.arange(4, dtype=np.int32))
        state, metrics = update(state, params["target"], batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses == [pytest.approx(theirs(), rel=1e-5) for _ in losses]


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_trl_takes_on_policy_steps_of_our_loss(monkeypatch):
    """Of its own samples of the full length; what it minimises is JSD(1/2) of the two models."""
    pytest.importorskip("trl")
    import torch

    from experiments.benchmarks import torch_distill

    trainers, texts, logits = [], [], {}
    build = torch_distill._trainer

    def watched(*arguments):
        trainer = build(*arguments)
        trainers.append(trainer)
        for name, module in (("draft", trainer.model), ("target", trainer.teacher_model)):

            def keep(module, args, given, output, name=name):
                if given["input_ids"].shape[1] > 1:  # not a step of the rollout
                    logits[name] = output.logits.detach().numpy()
                    texts.append(given["input_ids"].numpy())

            module.register_forward_hook(keep, with_kwargs=True)
        return trainer

    monkeypatch.setattr(torch_distill, "_trainer", watched)
    draft, target = (
        ModelConfig(
            name=name,
            vocab_size=29,
            d_model=8,
            d_ff=16,
            num_heads=2,
            head_dim=4,
            num_encoder_layers=0,
            num_decoder_layers=layers,
            tie_embeddings=True,
        )
        for name, layers in (("draft", 1), ("target", 2))
    )
    prompts = np.random.default_rng(3).integers(3, 29, (4, 5)).astype(np.int32)
    calls = torch_distill.trl_calls(draft, target, prompts, 6)
    [trainer] = trainers
    of_target = [each.clone() for each in trainer.teacher_model.parameters()]

    def weights():
        return torch.cat([each.detach().flatten() for each in trainer.model.parameters()])

    written = []
    for _ in range(2):
        before = weights().clone()
        loss = calls["trl_step"]()
        assert not torch.equal(weights(), before)
        scored, again = texts[-2:]
        assert scored.shape == (4, 11)
        assert (scored[:, :5] == prompts).all()
        assert (scored == again).all()
        written.append(scored[:, 5:])
        p, q = (logits[name][:, 4:-1] for name in ("target", "draft"))
        assert loss == pytest.approx(float(divergences.jsd(p, q, beta=0.5).mean()), rel=1e-4)
    assert (written[0] != written[1]).any()
    assert all(map(torch.equal, of_target, trainer.teacher_model.parameters()))
    assert calls["trl_rollout"]().shape == (4, 11)


TAUGHT = ("plain", "with_draft", "plain_step", "step_with_draft")


def taught(models, *batch_sizes):
    """The figures and rows of the teacher part on the tiny models of the suite."""
    config = Config(
        parts=("teacher",),
        rounds=1,
        teacher=str(models / "target"),
        teacher_draft=str(models / "draft"),
        teacher_batch_sizes=batch_sizes,
        teacher_length=4,
        teacher_batches=3,
    )
    return distill.measure(config, seed=3)


def test_the_teacher_with_and_without_a_draft(models):
    summary, records = taught(models, 2)
    assert [(row["name"], row["batch_size"]) for row in records] == [(name, 2) for name in TAUGHT]
    rates = [row["tokens_per_second"] for row in records]
    assert summary["teacher_rollout_speedup"] == pytest.approx(rates[1] / rates[0])
    assert summary["teacher_step_speedup"] == pytest.approx(rates[3] / rates[2])
    assert all(8 < row["tokens"] <= 3 * 2 * 4 for row in records)  # of all three batches


def test_the_teacher_s_rates_are_of_the_tokens_that_each_way_wrote(models, monkeypatch):
    """A way that draws shorter texts is not the faster one for it."""

    def timed(decoders, batches, **_):
        ids = [batch.example_ids.tolist() for batch in batches]
        assert len(set(map(tuple, ids))) == 3
        written = [decoders["with_draft"](batch)[0][0] for batch in batches]
        assert [batch.example_ids.tolist() for batch in written] == ids
        seconds = {"plain": 8.0, "with_draft": 2.0, "plain_step": 9.0, "step_with_draft": 3.0}
        tokens = {"plain": 4, "with_draft": 2, "plain_step": 3, "step_with_draft": 3}
        return Clock(
            {name: np.full(3, seconds[name]) for name in decoders},
            {name: np.full(3, tokens[name]) for name in decoders},
            dict.fromkeys(decoders, 0.0),
            dict.fromkeys(decoders, 0.0),
        )

    monkeypatch.setattr(distill_teacher, "race", timed)
    summary, records = taught(models, 1, 5)
    assert [row["batch_size"] for row in records] == [1] * 4 + [5] * 4
    expected = {"rollout_speedup": 2.0, "step_speedup": 3.0}
    for key, value in expected.items():
        for place in ("", "_batch5"):
            assert summary.pop(f"teacher_{key}{place}") == value
            assert summary.pop(f"teacher_{key}{place}_ci95") == [value] * 2
    assert not {key for key in summary if key.startswith("teacher_")}
