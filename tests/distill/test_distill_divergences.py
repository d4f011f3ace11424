"""Divergences: values, gradients, identities, limits and edges against float64 formulas."""

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distillspec_jax.distill
from distillspec_jax.distill import divergences
from distillspec_jax.errors import UserError


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def plogp(weights: np.ndarray, over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """sum_v weights log(over / under), 0 where the weight is."""
    ratio = np.divide(over, under, where=weights > 0, out=np.ones_like(weights))
    return np.sum(weights * np.log(ratio), -1)


def _jsd(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * plogp(p, p, m) + (1 - beta) * plogp(q, q, m)


def _tvd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(-1) / 2


def _lk_hybrid(p: np.ndarray, q: np.ndarray, eta: float, weight: Any = None) -> np.ndarray:
    weight = np.exp(-eta * (1 - _tvd(p, q))) if weight is None else weight
    return weight * plogp(p, p, q) + (1 - weight) * _tvd(p, q)


# name -> value of float64 distributions p (target) and q (draft), written from the paper
FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "forward_kl": lambda p, q: plogp(p, p, q),
    "reverse_kl": lambda p, q: plogp(q, q, p),
    "jsd[0.5]": lambda p, q: _jsd(p, q, 0.5),
    "jsd[0.1]": lambda p, q: _jsd(p, q, 0.1),
    "jsd[0.9]": lambda p, q: _jsd(p, q, 0.9),
    "tvd": _tvd,
    "negative_log_acceptance": lambda p, q: -np.log(np.minimum(p, q).sum(-1)),
    "lk_hybrid": lambda p, q, weight=None: _lk_hybrid(p, q, 3.0, weight),
}


def _by_probability(q: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Gradient in the logits of q from the slope in its probabilities."""
    return q * (slope - np.sum(q * slope, -1, keepdims=True))


def _jsd_gradient(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    return _by_probability(q, (1 - beta) * np.log(q / (beta * p + (1 - beta) * q)))


def _lk_gradient(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    weight = np.exp(-3.0 * (1 - _tvd(p, q)))[..., None]
    return weight * (q - p) + (1 - weight) * _by_probability(q, np.sign(q - p) / 2)


# name -> gradient in the draft's logits where all p, q > 0, the closed forms of the README
GRADIENTS: dict[str, Callable[..., np.ndarray]] = {
    "forward_kl": lambda p, q: q - p,
    "reverse_kl": lambda p, q: q * (np.log(q / p) - plogp(q, q, p)[..., None]),
    "jsd[0.5]": lambda p, q: _jsd_gradient(p, q, 0.5),
    "jsd[0.1]": lambda p, q: _jsd_gradient(p, q, 0.1),
    "jsd[0.9]": lambda p, q: _jsd_gradient(p, q, 0.9),
    "tvd": lambda p, q: _by_probability(q, np.sign(q - p) / 2),
    "negative_log_acceptance": lambda p, q: (
        _by_probability(q, np.sign(q - p) / 2) / np.minimum(p, q).sum(-1)[..., None]
    ),
    "lk_hybrid": _lk_gradient,
}


README = Path(distillspec_jax.distill.__file__).with_name("README.md")
NAMES = sorted(FORMULAS)


SHAPE = (53, 7)


@functools.cache
def compiled(name: str):
    """(value, gradient in the draft's logits) of a divergence like 'tvd' or 'jsd[0.1]'."""
    name, _, beta = name.rstrip("]").partition("[")
    function = divergences.named(name, beta=float(beta or 0.5))
    return jax.jit(function), jax.jit(jax.grad(lambda p, q: jnp.sum(function(p, q)), argnums=1))


def logits(seed: int, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    return tuple(scale * np.random.default_rng(seed).standard_normal((2, *SHAPE)))


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows [n, v] of fewer and shorter logits in SHAPE: one shape, one compilation."""
    out = np.zeros(SHAPE)
    out[:, rows.shape[1] :] = -np.inf
    out[: len(rows), : rows.shape[1]] = rows
    return out


def values(name, target_logits, draft_logits) -> np.ndarray:
    return np.asarray(compiled(name)[0](np.float32(target_logits), np.float32(draft_logits)))


def gradients(name, target_logits, draft_logits) -> np.ndarray:
    return np.asarray(compiled(name)[1](np.float32(target_logits), np.float32(draft_logits)))


def test_every_divergence_has_a_formula_here():
    assert {name.partition("[")[0] for name in NAMES} == set(divergences.DIVERGENCES)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_formulas(name):
    z_p, z_q = logits(1)
    p, q = softmax(z_p), softmax(z_q)
    np.testing.assert_allclose(values(name, z_p, z_q), FORMULAS[name](p, q), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        gradients(name, z_p, z_q), GRADIENTS[name](p, q), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_difference_quotient(name):
    z_p, z_q = logits(2)
    p, step = softmax(z_p), 1e-6
    # the weight of lk_hybrid is a constant for the gradient
    fixed = {}
    if name == "lk_hybrid":
        fixed["weight"] = np.exp(-3.0 * (1 - FORMULAS["tvd"](p, softmax(z_q))))
    quotient = np.empty_like(z_q)
    for v in range(SHAPE[1]):
        shift = np.eye(SHAPE[1])[v] * step
        above, below = (FORMULAS[name](p, softmax(z_q + s), **fixed) for s in (shift, -shift))
        quotient[:, v] = (above - below) / (2 * step)
    np.testing.assert_allclose(gradients(name, z_p, z_q), quotient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "beta"), [("reverse_kl", 1.0), ("jsd[0.9]", 0.9), ("jsd[0.5]", 0.5), ("jsd[0.1]", 0.1)]
)
def test_gradient_of_models_that_nearly_agree_is_not_rounded_away(name, beta):
    rng = np.random.default_rng(3)
    z_p = np.float32(8.0 * rng.standard_normal((64, 400)))
    z_q = np.float32(z_p + 0.01 * rng.standard_normal(z_p.shape))
    expected = GRADIENTS[name](softmax(np.float64(z_p)), softmax(np.float64(z_q)))
    error = np.linalg.norm(gradients(name, z_p, z_q) - expected) / np.linalg.norm(expected)
    assert error < 1.2e-5 / beta  # the gradient is of log(q / m), about beta log(q / p)


def readme_table() -> dict[str, list[float]]:
    """name -> value and gradient, as pinned in the README."""
    row = r"^\| `([a-z_]+(?:\[[\d.]+\])?)` \| ([-\d.]+) \| ([-\d., ]+) \|$"
    rows = re.findall(row, README.read_text(), re.MULTILINE)
    return {name: [float(x) for x in (value, *grads.split(", "))] for name, value, grads in rows}


def test_readme_pins_the_numbers():
    table = readme_table()
    assert set(table) == set(NAMES) | {"acceptance_rate"}
    with np.errstate(divide="ignore"):
        z_p, z_q = (padded(np.log([row])) for row in ([0.6, 0.3, 0.1, 0.0], [0.3, 0.5, 0.2, 0.0]))
    alpha, *slope = table.pop("acceptance_rate")
    assert alpha == pytest.approx(float(divergences.acceptance_rate(z_p, z_q)[0]), abs=6e-6)
    np.testing.assert_allclose(slope, -gradients("tvd", z_p, z_q)[0, :4], atol=6e-6)
    for name, (value, *slope) in table.items():
        np.testing.assert_allclose(value, values(name, z_p, z_q)[0], atol=6e-6, err_msg=name)
        grads = gradients(name, z_p, z_q)[0, :4]
        np.testing.assert_allclose(slope, grads, atol=6e-6, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_zero_where_both_agree_and_positive_elsewhere(name):
    z_p, z_q = logits(3)
    np.testing.assert_allclose(values(name, z_p, z_p + 5.0), 0.0, atol=3e-6)
    np.testing.assert_allclose(gradients(name, z_p, z_p), 0.0, atol=1e-6)
    assert np.all(values(name, z_p, z_q) > 1e-3)


def test_swapping_the_models():
    z_p, z_q = logits(4)
    np.testing.assert_allclose(
        values("forward_kl", z_p, z_q), values("reverse_kl", z_q, z_p), rtol=1e-5
    )
    np.testing.assert_allclose(
        values("jsd[0.1]", z_p, z_q), values("jsd[0.9]", z_q, z_p), rtol=1e-4, atol=1e-7
    )
    assert np.max(np.abs(values("jsd[0.1]", z_p, z_q) - values("jsd[0.1]", z_q, z_p))) > 1e-2


@pytest.mark.parametrize(("end", "limit"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_limits_of_jsd(end, limit):
    z_p, z_q = logits(5, scale=1.0)
    distances = []
    for small in (0.1, 0.01, 0.001):
        beta = small if end == 0 else 1 - small
        scaled = values(f"jsd[{beta}]", z_p, z_q) / small
        distances.append(np.max(np.abs(scaled - values(limit, z_p, z_q))))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02


def test_bounds():
    z_p, z_q = logits(6, scale=6.0)
    tvd, fkl, rkl = (values(name, z_p, z_q) for name in ("tvd", "forward_kl", "reverse_kl"))
    assert np.all((tvd >= 0) & (tvd <= 1 + 1e-6))
    assert np.max(tvd) > 0.99  # the sample reaches the corners
    assert np.all(tvd <= np.sqrt(fkl / 2) + 1e-6)  # Pinsker, either direction
    assert np.all(tvd <= np.sqrt(rkl / 2) + 1e-6)
    for beta in (0.1, 0.5, 0.9):
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        jsd = values(f"jsd[{beta}]", z_p, z_q)
        assert np.all(jsd <= entropy + 1e-6)
        assert np.max(jsd) > 0.95 * entropy


def test_acceptance_is_one_minus_tvd_and_its_log():
    z_p, z_q = logits(7)
    alpha = np.asarray(divergences.acceptance_rate(z_p, z_q))
    np.testing.assert_allclose(alpha, 1 - values("tvd", z_p, z_q), atol=1e-6)
    np.testing.assert_allclose(
        values("negative_log_acceptance", z_p, z_q), -np.log(alpha), rtol=1e-5, atol=1e-6
    )


def test_one_hot_target_makes_cross_entropy():
    _, z_q = logits(8)
    z_p = np.where(np.arange(7) == 3, 0.0, -np.inf)[None].repeat(53, 0)
    cross_entropy = -np.log(softmax(z_q)[:, 3])
    for name in ("negative_log_acceptance", "forward_kl"):
        np.testing.assert_allclose(values(name, z_p, z_q), cross_entropy, rtol=1e-5)
        expected = softmax(z_q) - np.eye(7)[3]
        np.testing.assert_allclose(gradients(name, z_p, z_q), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [-np.inf, -1e9])
@pytest.mark.parametrize("name", NAMES)
def test_ids_masked_in_both_are_as_if_dropped(name, masked):
    z_p, z_q = logits(9)
    holes = np.array([False, True, False, False, True, False, False])
    with_holes = [np.where(holes, masked, z) for z in (z_p, z_q)]
    dropped = [padded(z[:, ~holes]) for z in (z_p, z_q)]
    np.testing.assert_allclose(values(name, *with_holes), values(name, *dropped), rtol=1e-5)
    grads = gradients(name, *with_holes)
    assert np.all(grads[:, holes] == 0.0)
    kept = gradients(name, *dropped)[:, : np.sum(~holes)]
    np.testing.assert_allclose(grads[:, ~holes], kept, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_target_alone_excludes(name):
    """A target cut by top-k: the loss stays finite, reverse KL by the floor of log p."""
    z_p, z_q = logits(10)
    z_p = np.where(z_p < np.sort(z_p)[:, 4:5], -np.inf, z_p)
    assert np.all(np.isfinite(values(name, z_p, z_q)))
    grads = gradients(name, z_p, z_q)
    assert np.all(np.isfinite(grads))
    if name in ("forward_kl", "jsd[0.1]"):
        p, q = softmax(z_p), softmax(z_q)
        np.testing.assert_allclose(grads, GRADIENTS[name](p, q), rtol=1e-4, atol=1e-6)


def test_what_the_draft_alone_excludes():
    z_p, z_q = logits(11)
    z_q[:, 2] = -np.inf
    assert np.all(values("forward_kl", z_p, z_q) == np.inf)
    p, q = softmax(z_p), softmax(z_q)
    np.testing.assert_allclose(gradients("forward_kl", z_p, z_q), q - p, atol=1e-6)
    for name in set(NAMES) - {"forward_kl", "lk_hybrid"}:
        assert np.all(np.isfinite(values(name, z_p, z_q)))
        assert np.all(np.isfinite(gradients(name, z_p, z_q)))


@pytest.mark.parametrize("size", [1e3, 1e5])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, size):
    """Opposite certainties: p = (1, 0, 0), q = (0, 1, 0) up to e^-size."""
    z_p, z_q = size * np.eye(*SHAPE), size * np.eye(*SHAPE, k=1)
    value, grads = values(name, z_p, z_q)[0], gradients(name, z_p, z_q)
    assert np.all(np.isfinite(grads))
    expected = {
        "forward_kl": size,
        "reverse_kl": -divergences.LOG_FLOOR,
        "jsd[0.5]": np.log(2),
        "jsd[0.1]": -0.1 * np.log(0.1) - 0.9 * np.log(0.9),
        "jsd[0.9]": -0.1 * np.log(0.1) - 0.9 * np.log(0.9),
        "tvd": 1.0,
        "negative_log_acceptance": -np.log(divergences.ACCEPTANCE_FLOOR),
        "lk_hybrid": size,
    }
    assert value == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_flows_into_the_target(name):
    z_p, z_q = (np.float32(z) for z in logits(12))
    grads = jax.jit(jax.grad(lambda z: jnp.sum(compiled(name)[0](z, z_q))))(z_p)
    assert np.all(np.asarray(grads) == 0.0)


def test_half_precision_logits_are_judged_in_float32():
    z_p, z_q = (z.astype(jnp.bfloat16) for z in logits(13))
    value = compiled("jsd[0.5]")[0](z_p, z_q)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, values("jsd[0.5]", z_p, z_q), rtol=1e-6)


def test_temperatures_belong_to_their_models():
    z_p, z_q = (np.float32(z) for z in logits(14))
    tempered = divergences.at_temperatures(divergences.forward_kl, target=2.0, draft=0.5)
    np.testing.assert_allclose(
        tempered(z_p, z_q), FORMULAS["forward_kl"](softmax(z_p / 2), softmax(z_q * 2)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("beta", "instead"),
    [(0.0, "forward_kl"), (1.0, "reverse_kl"), (-0.5, "forward_kl"), (1.5, "reverse_kl")],
)
def test_beta_at_the_ends_is_refused_with_what_to_use(beta, instead):
    with pytest.raises(UserError, match=f"beta of jsd is .*'{instead}'"):
        divergences.named("jsd", beta=beta)


def test_unknown_name():
    with pytest.raises(UserError, match=r"unknown divergence 'forwardkl'.*'forward_kl'"):
        divergences.named("forwardkl")


@pytest.mark.parametrize("draft", [(2, 7), (5,), (1, 5), (3, 2, 5)])
def test_logits_of_other_shapes_are_refused(draft):
    """Not broadcast: a row of logits against a batch would be a plausible number."""
    with pytest.raises(UserError, match=re.escape(f"have shapes (2, 5) and {draft}")):
        divergences.tvd(jnp.zeros((2, 5)), jnp.zeros(draft))


def texts(size: int, horizon: int) -> list[tuple[int, ...]]:
    """All texts of tokens 0..size-1 that token 0 or the horizon ends."""
    return [
        (*body, last)
        for length in range(horizon)
        for body in itertools.product(range(1, size), repeat=length)
        for last in range(size)
        if last == 0 or length == horizon - 1
    ]


def test_acceptance_theorem_on_random_trees():
    """alpha >= 1 - T (T / L_p) epsilon, epsilon = E_q[mean_t TVD_t]: theorem 4.1, enumerated."""
    size, horizon, trees = 3, 3, 7
    all_texts = texts(size, horizon)
    prefixes = sorted({text[:t] for text in all_texts for t in range(len(text))})
    assert len(prefixes) * trees <= SHAPE[0]
    lengths = np.array([len(text) for text in all_texts])
    ratios = []
    for seed, scale in itertools.product(range(20), (0.1, 0.5, 2.0)):
        rng = np.random.default_rng(seed)
        z_p = rng.standard_normal((trees * len(prefixes), size))
        z_q = z_p + scale * rng.standard_normal(z_p.shape)
        distances = values("tvd", padded(z_p), padded(z_q))
        for tree in range(trees):
            rows = {prefix: tree * len(prefixes) + i for i, prefix in enumerate(prefixes)}

            def along(text, table, rows=rows):
                return [table[rows[text[:t]]] for t in range(len(text))]

            def law(logits, along=along):
                steps = softmax(logits)
                return np.array(
                    [
                        np.prod([row[token] for row, token in zip(along(y, steps), y, strict=True)])
                        for y in all_texts
                    ]
                )

            p, q = law(z_p), law(z_q)
            assert p.sum() == pytest.approx(1)
            summed = np.array([np.sum(along(text, distances)) for text in all_texts])
            length = np.sum(p * lengths)
            lost = np.sum(p * summed) / length  # 1 - alpha
            epsilon = np.sum(q * summed / lengths)
            ratios.append(lost / (horizon * horizon / length * epsilon))
    assert max(ratios) <= 1
    assert max(ratios) > 0.3  # the bound is not so far off that nothing could break it


@pytest.mark.parametrize("eta", [-5.0, float("nan")])
def test_an_eta_below_zero_is_refused(eta):
    with pytest.raises(UserError, match=f"eta of lk_hybrid is {eta:g}, must be at least 0"):
        divergences.named("lk_hybrid", eta=eta)
    with pytest.raises(UserError, match="eta of lk_hybrid"):
        divergences.lk_hybrid(np.ones(3), np.ones(3), eta=eta)


@pytest.mark.parametrize("which", ["target", "draft"])
@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan")])
def test_temperatures_of_a_loss_are_above_zero(which, temperature):
    with pytest.raises(UserError, match=f"{which} temperature is {temperature:g}, must be above"):
        divergences.at_temperatures(divergences.forward_kl, **{which: temperature})
