"""The compiled steps against plain gradient descent, written out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillspec_jax.distill import recipes
from distillspec_jax.distill.data_sources import SOURCES, make_source
from distillspec_jax.distill.step import (
    distillation_loss,
    make_distill_step,
    make_finetune_step,
    make_rollout,
    make_update,
    summed_gradients,
)
from distillspec_jax.errors import UserError
from distillspec_jax.models.transformer import Transformer, hidden_states, init_params, score
from distillspec_jax.training.state import TrainState

RATE = 0.5  # of the plain gradient descent in conftest
PIECES = 11
TOKENS, ROWS = 22, 5  # real tokens, and rows that have any, of the batch


def close(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def same_bits(actual, expected) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, actual, expected)))


def sequence_mean(values, targets):
    """Mean over the tokens of each row, then over the rows that have any."""
    mask = targets != 0
    lengths = jnp.sum(mask, 1)
    rows = jnp.sum(jnp.where(mask, values, 0), 1) / jnp.maximum(lengths, 1)
    return jnp.sum(rows) / jnp.sum(lengths > 0)


def log_probs(model, params, batch):
    return jax.nn.log_softmax(score(model, params, batch.inputs, batch.targets)[..., :PIECES])


def plain_likelihood(params, pair, batch):
    chosen = jnp.take_along_axis(
        log_probs(pair.draft, params, batch), jnp.asarray(batch.targets)[..., None], axis=-1
    )
    return sequence_mean(-chosen[..., 0], batch.targets)


def plain_forward_kl(params, pair, batch):
    log_p = log_probs(pair.target, pair.target_params, batch)
    log_q = log_probs(pair.draft, params, batch)
    return sequence_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), batch.targets)


def plain_tempered_jsd(params, pair, batch):
    """JSD[0.1] of the target at temperature 2 and the draft at 0.5."""
    log_p = jax.nn.log_softmax(log_probs(pair.target, pair.target_params, batch) / 2)
    log_q = jax.nn.log_softmax(log_probs(pair.draft, params, batch) / 0.5)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.log(0.1 * p + 0.9 * q)
    terms = 0.1 * p * (log_p - log_m) + 0.9 * q * (log_q - log_m)
    return sequence_mean(jnp.sum(terms, -1), batch.targets)


def plain_lk_hybrid(params, pair, batch):
    """lambda KL(p || q) + (1 - lambda) TVD(p, q), lambda = exp(-alpha) constant: eta is 1."""
    log_p = log_probs(pair.target, pair.target_params, batch)
    log_q = log_probs(pair.draft, params, batch)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    weight = jax.lax.stop_gradient(jnp.exp(-jnp.sum(jnp.minimum(p, q), -1)))
    kl, distance = jnp.sum(p * (log_p - log_q), -1), jnp.sum(jnp.abs(p - q), -1) / 2
    return sequence_mean(weight * kl + (1 - weight) * distance, batch.targets)


def descended(plain_loss, pair, batch):
    """(loss, weights) of one plain step from the pair's draft."""
    loss, grads = jax.jit(jax.value_and_grad(lambda params: plain_loss(params, pair, batch)))(
        pair.draft_params
    )
    return loss, jax.tree.map(lambda w, g: w - RATE * g, pair.draft_params, grads)


def accepted_by_plain(pair, batch):
    """sum_t sum_v min(p_v, q_v) over the real tokens, both at temperature 1."""
    p = jnp.exp(log_probs(pair.target, pair.target_params, batch))
    q = jnp.exp(log_probs(pair.draft, pair.draft_params, batch))
    return jnp.sum(jnp.sum(jnp.minimum(p, q), -1) * (batch.targets != 0))


BOTH = pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])


@BOTH
def test_finetuning_is_gradient_descent_on_the_likelihood(kind, pairs, batch, fresh_state):
    pair = pairs[kind]
    step = make_finetune_step(pair.draft, optax.sgd(RATE))
    state, metrics = step(fresh_state(kind), batch)
    loss, params = descended(plain_likelihood, pair, batch)
    close(state.params, params)
    close(metrics["loss"], (loss * ROWS, ROWS))
    close(metrics["target_length"], (TOKENS, ROWS))


@BOTH
def test_distilling_is_gradient_descent_on_the_divergence(
    kind, pairs, batch, fresh_state, compiled_step
):
    pair = pairs[kind]
    step = compiled_step(kind, recipes.named("supkd"))
    state, metrics = step(fresh_state(kind), pair.target_params, batch)
    loss, params = descended(plain_forward_kl, pair, batch)
    close(state.params, params)
    close(metrics["loss"], (loss * ROWS, ROWS))
    close(metrics["acceptance_rate"], (accepted_by_plain(pair, batch), TOKENS))
    grads = jax.tree.map(lambda w, new: (w - new) / RATE, pair.draft_params, params)
    close(metrics["grad_norm"], (optax.tree.norm(grads), 1), rtol=1e-4)
    close(metrics["rollout_length"], (0, 0))
    close([metrics[f"source_{name}"][0] for name in ("fixed", "draft", "teacher")], [1, 0, 0])


@pytest.mark.parametrize(
    ("plain_loss", "changes"),
    [
        (
            plain_tempered_jsd,
            {"loss": "jsd", "beta": 0.1, "target_temperature": 2.0, "draft_temperature": 0.5},
        ),
        (plain_lk_hybrid, {"loss": "lk_hybrid", "eta": 1.0}),
    ],
    ids=["jsd", "lk_hybrid"],
)
def test_what_a_recipe_says_of_its_loss_is_what_is_descended(
    plain_loss, changes, pairs, batch, fresh_state, compiled_step
):
    kind = "decoder-only"
    pair, recipe = pairs[kind], recipes.named("supkd", **changes)
    state, metrics = compiled_step(kind, recipe)(fresh_state(kind), pair.target_params, batch)
    loss, params = descended(plain_loss, pair, batch)
    close(state.params, params)
    close(metrics["loss"], (loss * ROWS, ROWS))
    close(metrics["acceptance_rate"], (accepted_by_plain(pair, batch), TOKENS))  # of 1, as decoded


def test_likelihood_recipe_is_finetuning(pairs, batch, fresh_state, compiled_step):
    kind = "encoder-decoder"
    step = compiled_step(kind, recipes.named("sft"))
    state, metrics = step(fresh_state(kind), pairs[kind].target_params, batch)
    close(state.params, descended(plain_likelihood, pairs[kind], batch)[1])
    assert "acceptance_rate" not in metrics  # the target was not asked


@BOTH
def test_on_policy_learns_from_its_own_samples_and_not_through_them(
    kind, pairs, batch, fresh_state, compiled_step
):
    pair, recipe = pairs[kind], recipes.named("gkd")
    state, metrics = compiled_step(kind, recipe)(fresh_state(kind), pair.target_params, batch)
    write = jax.jit(make_source(pair.draft, pair.target, recipe, rollout_length=5))
    (tokens, _), _ = write(pair.draft_params, None, batch, jnp.uint32(0), 0)
    written = batch.replace(targets=tokens)
    close(state.params, descended(plain_forward_kl, pair, written)[1])
    close(metrics["rollout_length"], (np.sum(np.asarray(tokens) != 0), 6))
    close(metrics["eos_rate"], (np.sum(np.any(np.asarray(tokens) == 1, 1)), 6))
    other = batch.replace(targets=np.roll(batch.targets, 1, 0))  # its references do not matter
    again, _ = compiled_step(kind, recipe)(fresh_state(kind), pair.target_params, other)
    assert same_bits(again.params, state.params)


def test_what_the_teacher_saw_while_writing_is_not_scored_again(pairs, batch, fresh_state):
    kind = "encoder-decoder"
    pair, recipe = pairs[kind], recipes.named("gkd", lambda2=0.0, teacher_gamma=3)
    rollout = jax.jit(make_rollout(pair.draft, pair.target, recipe, rollout_length=5))
    written, _ = rollout(fresh_state(kind), pair.target_params, batch)
    # a target that can no more than turn states into logits
    blind = jax.tree.map(lambda w: np.full_like(w, np.nan), pair.target_params)
    blind["head"] = pair.target_params["head"]
    update = jax.jit(make_update(pair.draft, pair.target, recipe, optax.sgd(RATE), micro_batches=2))
    state, metrics = update(fresh_state(kind), blind, written)
    loss, params = descended(plain_forward_kl, pair, written)
    close(state.params, params)
    close(metrics["loss"], (loss * 6, 6))


@pytest.mark.parametrize("chunk", [None, 3])
def test_exactly_nothing_flows_into_the_target(chunk, pairs, batch):
    pair = pairs["encoder-decoder"]

    def total(params, target_params):
        loss_sum = distillation_loss(
            pair.draft, pair.target, recipes.named("distillspec"), target_params, None, chunk=chunk
        )
        return loss_sum(params, batch, None)[0]

    grads, target_grads = jax.jit(jax.grad(total, argnums=(0, 1)))(
        pair.draft_params, pair.target_params
    )
    assert all(np.all(np.asarray(g) == 0.0) for g in jax.tree.leaves(target_grads))
    assert all(np.any(np.asarray(g) != 0.0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("decoder-only", {"chunk": 3}),
        ("encoder-decoder", {"micro_batches": 3}),
        ("encoder-decoder", {"micro_batches": 2, "chunk": 4}),
    ],
)
def test_chunks_and_parts_change_nothing(kind, settings, pairs, batch, fresh_state, compiled_step):
    """The empty row makes the parts unequal in rows that count."""
    recipe, weights = recipes.named("supkd"), pairs[kind].target_params
    whole, metrics = compiled_step(kind, recipe)(fresh_state(kind), weights, batch)
    split, split_metrics = compiled_step(kind, recipe, **settings)(
        fresh_state(kind), weights, batch
    )
    close(split.params, whole.params)
    close(split_metrics, metrics)


def test_dropout_is_a_function_of_seed_and_step(pairs, batch):
    """Off unless asked for; every call starts from the same weights."""
    pair, optimizer = pairs["encoder-decoder"], optax.sgd(RATE)
    steps = {
        flag: make_finetune_step(pair.draft, optimizer, dropout=flag) for flag in (True, False)
    }

    def after(dropout, seed=0, step=0):
        state = TrainState.create(pair.draft_params, optimizer, seed=seed)
        return steps[dropout](state.replace(step=jnp.int32(step)), batch)[0].params

    assert same_bits(after(True), after(True))
    assert not same_bits(after(True), after(False))
    assert not same_bits(after(True), after(True, seed=1))
    assert not same_bits(after(True), after(True, step=1))
    assert same_bits(after(False), after(False, step=1))


def test_each_part_of_a_batch_draws_anew(batch):
    """Sums over three parts, each with the key of its number."""

    def loss_sum(weight, part, key):
        total = weight * jax.random.normal(key) + jnp.sum(part.example_ids)
        return total, {"loss": (total, jnp.ones(()))}

    key = jax.random.key(31)
    grads, metrics = summed_gradients(loss_sum, jnp.float32(0), batch, key, 3)
    drawn = [float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(3)]
    assert float(grads) == pytest.approx(sum(drawn))
    close(metrics["loss"], (np.sum(batch.example_ids), 3))


def test_no_dropout_in_distillation(pairs, batch, fresh_state, compiled_step):
    kind, recipe = "decoder-only", recipes.named("gkd")
    pair = pairs[kind]
    assert pair.draft.config.dropout_rate > 0
    without = [
        Transformer(dataclasses.replace(model.config, dropout_rate=0.0))
        for model in (pair.draft, pair.target)
    ]
    step = make_distill_step(*without, recipe, optax.sgd(RATE), rollout_length=5)
    expected, _ = step(fresh_state(kind), pair.target_params, batch)
    actual, _ = compiled_step(kind, recipe)(fresh_state(kind), pair.target_params, batch)
    close(actual.params, expected.params)


MIXED = recipes.named("distillspec", lambda1=0.4, lambda2=0.5, loss="tvd")


def test_same_seed_same_bits_and_one_compilation(pairs, batch, fresh_state, compiled_step):
    kind, step = "encoder-decoder", compiled_step("encoder-decoder", MIXED)

    def run(seed):
        state, sources = fresh_state(kind, seed), []
        for _ in range(5):
            state, metrics = step(state, pairs[kind].target_params, batch)
            sources.append([int(metrics[f"source_{name}"][0]) for name in SOURCES])
        return state, sources

    first, sources = run(2)
    again, again_sources = run(2)
    assert same_bits(first.params, again.params)
    assert sources == again_sources
    assert not same_bits(first.params, run(3)[0].params)
    assert step._cache_size() == 1


def test_the_state_is_donated_and_the_target_is_not(pairs, batch, fresh_state, compiled_step):
    kind, state = "encoder-decoder", fresh_state("encoder-decoder")
    compiled_step(kind, recipes.named("supkd"))(state, pairs[kind].target_params, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(pairs[kind].target_params))


def test_on_policy_distillation_raises_the_acceptance_rate(pairs, batch):
    pair, optimizer = pairs["encoder-decoder"], optax.adam(0.02)
    recipe = recipes.named("distillspec", loss="forward_kl")
    step = make_distill_step(pair.draft, pair.target, recipe, optimizer, rollout_length=5)
    state, rates = TrainState.create(pair.draft_params, optimizer), []
    for _ in range(120):
        state, metrics = step(state, pair.target_params, batch)
        rates.append(float(metrics["acceptance_rate"][0] / metrics["acceptance_rate"][1]))
    assert np.mean(rates[-20:]) > np.mean(rates[:20]) + 0.1


@BOTH
def test_computing_in_bfloat16_leaves_float32_what_is_kept(kind, pairs, batch):
    """Weights, optimiser and metrics; the loss is that of float32 but for rounding, and falls."""
    pair, optimizer = pairs[kind], optax.adam(0.02)
    halves = [
        Transformer(dataclasses.replace(model.config, dtype="bfloat16"))
        for model in (pair.draft, pair.target)
    ]
    found = []
    for models in ((pair.draft, pair.target), halves):
        recipe = recipes.named("supkd")
        step = make_distill_step(*models, recipe, optimizer, rollout_length=5)
        state, losses = TrainState.create(pair.draft_params, optimizer), []
        for _ in range(30):
            state, metrics = step(state, pair.target_params, batch)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        kept = jax.tree.leaves((state.params, state.opt_state, metrics))
        assert {leaf.dtype.name for leaf in kept} <= {"float32", "int32"}
        found.append(losses)
    exact, rounded = found
    assert rounded[0] == pytest.approx(exact[0], rel=0.02)
    assert rounded[0] != exact[0]
    assert rounded[-1] < 0.8 * rounded[0]


def test_bfloat16_is_of_products_and_not_of_softmax_or_logits(pair, batch):
    model = Transformer(dataclasses.replace(pair.draft.config, dtype="bfloat16"))
    text = batch.inputs, batch.targets
    hidden = jax.eval_shape(lambda params: hidden_states(model, params, *text), pair.draft_params)
    traced = jax.make_jaxpr(lambda params: score(model, params, *text))(pair.draft_params)
    assert hidden.dtype == jnp.bfloat16
    assert traced.out_avals[0].dtype == jnp.float32
    assert set(re.findall(r"(\w+)\[[\d,]*\] = exp ", str(traced))) == {"f32"}  # of softmax alone


def test_selected_tokens_are_those_with_the_largest_gain(pairs, batch, fresh_state, compiled_step):
    kind = "encoder-decoder"
    pair, recipe = pairs[kind], recipes.named("adaspec")
    reference = init_params(pair.draft, jax.random.key(29))
    log_p = log_probs(pair.target, pair.target_params, batch)
    losses = [
        jnp.sum(jnp.exp(log_p) * (log_p - log_probs(pair.draft, params, batch)), -1)
        for params in (pair.draft_params, reference)
    ]
    gains = np.where(batch.targets != 0, losses[0] - losses[1], -np.inf)
    kept = gains >= np.sort(gains.ravel())[::-1][8]  # ceil(0.4 * 22) = 9
    expected = (np.sum(np.asarray(losses[0])[kept]), 9)
    states = []
    for chunk in (None, 3):
        state, metrics = compiled_step(kind, recipe, chunk=chunk)(
            fresh_state(kind), pair.target_params, batch, reference
        )
        close(metrics["loss"], expected)
        close(metrics["acceptance_rate"][1], TOKENS)  # alpha is that of all tokens
        states.append(state)
    close(states[0].params, states[1].params)


def test_eight_devices_give_the_numbers_of_one(pairs, batch, fresh_state, compiled_step):
    kind = "encoder-decoder"
    pair, step = pairs[kind], compiled_step(kind, recipes.named("gkd"), chunk=3)
    eight = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch)
    eight = eight.replace(example_ids=np.arange(8, dtype=np.int32))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    by_row = jax.NamedSharding(mesh, jax.P("data"))
    alone, metrics = step(fresh_state(kind), pair.target_params, eight)
    together, together_metrics = step(
        jax.device_put(fresh_state(kind), everywhere),
        jax.device_put(pair.target_params, everywhere),
        jax.device_put(eight, by_row),
    )
    close(together.params, alone.params)
    close(together_metrics, metrics)


def test_refusals(pairs, batch, fresh_state, compiled_step):
    kind = "encoder-decoder"
    pair, weights = pairs[kind], pairs[kind].target_params
    with pytest.raises(UserError, match="recipe 'adaspec' needs weights of a reference draft"):
        compiled_step(kind, recipes.named("adaspec"))(fresh_state(kind), weights, batch)
    with pytest.raises(UserError, match="recipe 'gkd' takes no weights of a reference draft"):
        compiled_step(kind, recipes.named("gkd"))(
            fresh_state(kind), weights, batch, pair.draft_params
        )
    with pytest.raises(UserError, match="a batch of 6 does not split into 4 parts"):
        compiled_step(kind, recipes.named("supkd"), micro_batches=4)(
            fresh_state(kind), weights, batch
        )
    other = Transformer(dataclasses.replace(pair.target.config, num_pieces=9))
    with pytest.raises(UserError, match="number of pieces 9 and 11"):
        make_update(pair.draft, other, recipes.named("gkd"), optax.sgd(RATE))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk": 0}, "chunk is 0; it must be an integer of at least 1"),
        ({"micro_batches": 0}, "micro_batches is 0; it must be an integer of at least 1"),
        ({"micro_batches": -1}, "micro_batches is -1"),
        ({"rollout_length": 2.0}, r"rollout_length is 2\.0; it must be an integer of at least 1"),
        ({"recipe": "distillspec"}, "recipe is 'distillspec'; it must be a Recipe"),
    ],
)
def test_settings_of_a_step_are_refused_when_it_is_made(pairs, settings, words):
    pair = pairs["decoder-only"]
    given = {"recipe": recipes.named("gkd"), "optimizer": optax.sgd(RATE), "rollout_length": 5}
    with pytest.raises(UserError, match=words):
        make_distill_step(pair.draft, pair.target, **given | settings)
    if settings.keys() & {"chunk", "micro_batches"}:
        with pytest.raises(UserError, match=words):
            make_finetune_step(pair.draft, optax.sgd(RATE), **settings)
