"""Output laws of the verification rules, by enumeration.

The rules are taken as black boxes: every block that a draft can write is listed, each rule's
acceptance thresholds and the edges of its next-token distribution are found by bisecting its
uniforms, and what comes out is compared with the law of the target, text by text.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding.block_length import (
    FIXED,
    BlockLength,
    first_allowance,
    keeps_drafting,
    next_allowance,
)
from distillspec_jax.decoding.lenience import KINDS, Lenience, relax
from distillspec_jax.decoding.multi_draft import k_seq_rule, smallest_rho
from distillspec_jax.decoding.sampling import Sampling, process
from distillspec_jax.decoding.verification import block_rule, greedy_rule, token_rule

pytestmark = pytest.mark.samples

EOS = 1
PASS, FAIL = 0.0, 1e30  # uniforms of a test of K-SEQ
NEVER_READ = np.nan  # what stands behind a row's draft


class Tree:
    """p and q after every prefix of texts of `depth` tokens over a tiny vocabulary."""

    def __init__(self, size, gamma, make, depth=0):
        """make(number of prefixes) -> p, q: [number of prefixes, size] each; depth 0: one block."""
        self.size, self.gamma, self.depth = size, gamma, depth or gamma + 1
        lengths = range(self.depth)
        prefixes = [x for n in lengths for x in itertools.product(range(size), repeat=n)]
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.ps, self.qs = make(len(prefixes))

    def p(self, prefix):
        return self.ps[self.index[prefix]]

    def q(self, prefix):
        return self.qs[self.index[prefix]]

    def texts(self, prefix=()):
        """Every text of `depth` tokens, shorter where EOS ends it, that begins with `prefix`."""
        if len(prefix) == self.depth or (prefix and prefix[-1] == EOS):
            yield prefix, 1.0
            return
        for token, probability in enumerate(self.p(prefix)):
            for text, rest in self.texts((*prefix, token)):
                yield text, probability * rest

    def blocks(self, block_length, before=(), allowance=None):
        """Every block of up to `allowance` tokens that the draft can write behind `before`."""
        every_token = jnp.tile(jnp.arange(self.size), len(self.qs))
        keeps = keeps_drafting(
            block_length, jnp.asarray(self.qs.repeat(self.size, axis=0)), every_token
        )
        keeps = np.asarray(keeps).reshape(self.qs.shape)
        most = self.gamma if allowance is None else allowance

        def grow(block, probability):
            stops = len(block) == most
            if block:
                at = self.index[(*before, *block[:-1])]
                stops |= block[-1] == EOS or not keeps[at, block[-1]]
            if stops:
                yield block, probability
                return
            for token, q in enumerate(self.q((*before, *block))):
                if q > 0:
                    yield from grow((*block, token), probability * q)

        return list(grow((), 1.0))

    def arrays(self, blocks, before=()):
        """The arguments of a rule, one row per block; padded to a fixed number of rows."""
        rows, shape = self.size**self.gamma, (self.size**self.gamma, self.gamma)
        p = np.full((rows, self.gamma + 1, self.size), NEVER_READ)
        q = np.full((*shape, self.size), NEVER_READ)
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(rows, np.int32)
        p[:, 0], q[:, 0] = self.p(before), self.q(before)
        for row, (block, _) in enumerate(blocks):
            lengths[row] = len(block)
            tokens[row, : len(block)] = block
            for i in range(len(block) + 1):
                p[row, i] = self.p((*before, *block[:i]))
            for i in range(len(block)):
                q[row, i] = self.q((*before, *block[:i]))
        return p, q, tokens, lengths


def bisect(holds, shape, dtype):
    """The largest u in [0, 1] with holds(u), for a predicate that fails from some u on."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        yes = holds(middle)
        return jnp.where(yes, middle, low), jnp.where(yes, high, middle)

    bounds = jnp.zeros(shape, dtype), jnp.ones(shape, dtype)
    low, high = jax.lax.fori_loop(0, 56, halve, bounds)
    return (low + high) / 2


@functools.partial(jax.jit, static_argnums=0)
def anatomy(rule, p, q, tokens, lengths):
    """For every outcome of the gamma tests: its probability, accepted tokens, next-token law.

    -> weights [2^gamma, N], num_accepted [2^gamma, N], next_token_law [2^gamma, N, V].
    """
    rows, gamma, size = q.shape
    zeros = jnp.zeros(rows, p.dtype)
    before, after = 0.0, 2.0  # pass every test; fail every test

    def threshold(i):
        def passes(u):
            uniforms = [jnp.full(rows, before if j < i else after, p.dtype) for j in range(gamma)]
            uniforms[i] = u
            return rule(p, q, tokens, lengths, jnp.stack(uniforms, 1), zeros)[0] > i

        return bisect(passes, (rows,), p.dtype)

    h = jnp.stack([threshold(i) for i in range(gamma)], axis=1)

    def outcome(passed):
        passed = jnp.broadcast_to(passed[None], h.shape)
        weight = jnp.prod(jnp.where(passed, h, 1 - h), axis=1)
        uniforms = jnp.where(passed, h / 2, (1 + h) / 2)
        call = functools.partial(rule, p, q, tokens, lengths, uniforms)

        def edge(v):
            return bisect(lambda u: call(u)[1] <= v, (rows,), p.dtype)

        edges = [zeros, *[edge(v) for v in range(size - 1)], zeros + 1]
        return weight, call(zeros)[0], jnp.diff(jnp.stack(edges, axis=1), axis=1)

    return jax.vmap(outcome)(jnp.array(list(itertools.product([False, True], repeat=gamma))))


def ends(rule, tree, blocks, before=(), dtype=np.float64):
    """Every end of a block behind `before`: (block, accepted, probability, next-token law)."""
    with jax.enable_x64(dtype == np.float64):
        p, q, tokens, lengths = tree.arrays(blocks, before)
        found = anatomy(rule, p.astype(dtype), q.astype(dtype), tokens, lengths)
        weights, accepted, next_laws = (np.asarray(x, np.float64) for x in found)
    for outcome, (row, (block, drafted)) in itertools.product(
        range(len(weights)), enumerate(blocks)
    ):
        n = int(accepted[outcome, row])
        assert n <= len(block)
        yield block, n, weights[outcome, row] * drafted, next_laws[outcome, row]


def examine(rule, tree, block_length=FIXED, dtype=np.float64):
    """(law of the emitted text completed by the target, expected accepted tokens per block)."""
    law, expected = dict.fromkeys((text for text, _ in tree.texts()), 0.0), 0.0
    for block, n, weight, next_law in ends(rule, tree, tree.blocks(block_length), dtype=dtype):
        expected += weight * n
        if EOS in block[:n]:
            law[block[:n]] += weight
            continue
        for token, probability in enumerate(next_law):
            for text, rest in tree.texts((*block[:n], token)):
                law[text] += weight * probability * rest
    return law, expected


def examine_schedule(rule, tree, block_length, num_blocks=2):
    """Law of what `num_blocks` blocks emit, completed, and the allowances of the last block."""
    start = int(first_allowance(block_length, tree.gamma, 1)[0])
    states = {((), start): 1.0}  # (text, tokens that its next block may draft)
    for _ in range(num_blocks):
        allowances = {allowance for text, allowance in states if EOS not in text}
        states = _one_block_on(rule, tree, block_length, states)
    law = dict.fromkeys((text for text, _ in tree.texts()), 0.0)
    for (text, _), probability in states.items():
        for whole, rest in tree.texts(text):
            law[whole] += probability * rest
    return law, allowances


def _one_block_on(rule, tree, block_length, states):
    after = collections.defaultdict(float)
    for (text, allowance), weight in states.items():
        if EOS in text:
            after[text, allowance] += weight
            continue
        blocks = tree.blocks(block_length, text, allowance)
        for block, n, probability, next_law in ends(rule, tree, blocks, text):
            whole = jnp.array([n == len(block)])
            then = int(next_allowance(block_length, tree.gamma, jnp.array([allowance]), whole)[0])
            emitted = (*text, *block[:n])
            if EOS in emitted:
                after[emitted, then] += weight * probability
                continue
            for token, share in enumerate(next_law):
                after[(*emitted, token), then] += weight * probability * share
    return after


def largest_error(tree, law):
    return max(abs(law[text] - probability) for text, probability in tree.texts())


def random_laws(rng, count, size, zeros=0):
    laws = rng.dirichlet(np.full(size, 0.7), count)
    np.put_along_axis(laws, rng.random(laws.shape).argsort(axis=1)[:, :zeros], 0, axis=1)
    return laws / laws.sum(axis=1, keepdims=True)


def tree_of(kind, size, gamma, seed, depth=0):
    rng = np.random.default_rng([seed, size, gamma])

    def processed(count, sampling):
        logits = jnp.asarray(rng.normal(size=(count, size)) * 2, jnp.float32)
        probs = np.asarray(jax.jit(process, static_argnums=1)(logits, sampling), np.float64)
        return probs / probs.sum(axis=1, keepdims=True)

    def make(count):
        if kind == "any":
            return random_laws(rng, count, size), random_laws(rng, count, size)
        if kind == "zeros":
            return random_laws(rng, count, size, 1), random_laws(rng, count, size, size - 2)
        if kind == "same":
            return (random_laws(rng, count, size),) * 2
        if kind == "disjoint":
            return np.eye(size)[[0] * count], np.eye(size)[[size - 1] * count]
        if kind == "greedy draft":
            return random_laws(rng, count, size), processed(count, Sampling(temperature=0))
        if kind == "processed":
            p = processed(count, Sampling(0.7, top_k=2))
            return p, processed(count, Sampling(1.3, top_p=0.8))
        raise ValueError(kind)

    return Tree(size, gamma, make, depth)


KINDS_OF_TREE = ("any", "zeros", "same", "disjoint", "greedy draft", "processed")
RULES = {"token": token_rule, "block": block_rule}
SHAPES = [(2, 3), (3, 2), (4, 3)]
ADAPTIVE = [BlockLength(min_confidence=0.4), BlockLength(max_entropy=0.8)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "gamma"), SHAPES)
@pytest.mark.parametrize("kind", KINDS_OF_TREE)
def test_output_law_is_the_targets(rule, kind, size, gamma):
    tree = tree_of(kind, size, gamma, seed=5)
    law, _ = examine(RULES[rule], tree)
    assert largest_error(tree, law) < 1e-12
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "gamma"), SHAPES)
@pytest.mark.parametrize("kind", KINDS_OF_TREE)
@pytest.mark.parametrize("block_length", ADAPTIVE, ids=["confidence", "entropy"])
def test_blocks_stopped_by_the_draft_keep_the_law(rule, kind, size, gamma, block_length):
    tree = tree_of(kind, size, gamma, seed=5)
    law, _ = examine(RULES[rule], tree, block_length)
    assert largest_error(tree, law) < 1e-12
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", ["any", "same", "processed"])
@pytest.mark.parametrize("block_length", ADAPTIVE, ids=["confidence", "entropy"])
def test_the_draft_stops_some_blocks_and_not_others(kind, block_length):
    found = set()
    for size, gamma in SHAPES:
        blocks = tree_of(kind, size, gamma, seed=5).blocks(block_length)
        found |= {len(block) < gamma for block, _ in blocks if EOS not in block}
    assert found == {True, False}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "gamma", "start"), [(2, 3, 2), (3, 2, 1)])
@pytest.mark.parametrize("kind", KINDS_OF_TREE)
def test_the_schedule_keeps_the_law_over_two_blocks(rule, kind, size, gamma, start):
    """The second block's length depends on how the first ended; some stop early besides."""
    tree = tree_of(kind, size, gamma, seed=5, depth=start + gamma + 2)
    for confidence in (0.0, 0.4):
        block_length = BlockLength(confidence, schedule_start=start)
        law, allowances = examine_schedule(RULES[rule], tree, block_length)
        if kind == "any":
            assert allowances == {min(start + 2, gamma), max(start - 1, 1)}
        assert largest_error(tree, law) < 1e-12
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_law_in_float32_as_the_sampler_runs_it(rule):
    tree = tree_of("any", 3, 2, seed=3)
    law, _ = examine(RULES[rule], tree, dtype=np.float32)
    assert largest_error(tree, law) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_the_ends_of_the_uniforms(rule):
    """What enumeration cannot see: u = 0 accepts no token of p = 0, the last u < 1 all of p = q."""
    p, q = jnp.array([0.5, 0, 0.5]), jnp.array([0.25, 0.5, 0.25])
    tokens, lengths = jnp.array([[1, 0]]), jnp.array([2])
    targets, least, most = jnp.tile(p, (1, 3, 1)), jnp.zeros((1, 2)), np.nextafter(1, 0, dtype="f4")
    found = RULES[rule](targets, jnp.tile(q, (1, 2, 1)), tokens, lengths, least, least[:, 0])
    assert [x.tolist() for x in found] == [[0], [0]]
    same = RULES[rule](targets, targets[:, :2], 2 * tokens, lengths, least + most, least[:, 0])
    assert same[0].tolist() == [2]


def test_greedy_rule_emits_the_targets_greedy_text():
    rng = np.random.default_rng(17)
    tree = Tree(3, 2, lambda m: (np.eye(3)[rng.integers(3, size=m)], random_laws(rng, m, 3)))
    law, expected = examine(greedy_rule, tree)
    assert largest_error(tree, law) < 1e-12
    by_token = examine(token_rule, tree)
    assert largest_error(tree, by_token[0]) < 1e-12
    assert expected == pytest.approx(by_token[1], abs=1e-12)


def test_block_verification_reaches_its_papers_toy_example():
    p, q = [1 / 3, 0, 2 / 3], [2 / 3, 0, 1 / 3]  # EOS has no mass
    tree = Tree(3, 2, lambda m: (np.array([p] * m), np.array([q] * m)))
    assert examine(token_rule, tree)[1] == pytest.approx(10 / 9, abs=1e-12)
    assert examine(block_rule, tree)[1] == pytest.approx(11 / 9, abs=1e-12)


def test_block_verification_never_accepts_less():
    gains = []
    for seed in range(40):
        tree = tree_of("any" if seed % 2 else "zeros", 3, 2, seed)
        token, block = examine(token_rule, tree)[1], examine(block_rule, tree)[1]
        gains.append(block - token)
        joint = 0.0  # E[w_1 + w_2], what arXiv 2403.10444 promises
        for x, drafted in tree.blocks(FIXED):
            w = 1.0
            for i in range(len(x)):
                w = min(1, w * tree.p(x[:i])[x[i]] / tree.q(x[:i])[x[i]])
                joint += w * drafted
        assert block == pytest.approx(joint, abs=1e-12)
    assert min(gains) > -1e-12
    assert max(gains) > 0.01


def test_lossy_rules_raise_p_as_the_paper_says():
    p, raised = jnp.array([0, 0.25, 0.5]), {"linear": [0, 0.5, 1], "square": [0, 1, 2]}
    raised["exponential"] = [0, 0.5, 0.5**0.5]
    for kind in KINDS:
        np.testing.assert_allclose(relax(p, Lenience(kind, 0.5)), raised[kind], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "relaxed"), [("linear", False), ("square", False), ("exponential", True)]
)
def test_lossy_acceptance_grows_as_epsilon_falls(kind, relaxed):
    tree = tree_of("any", 3, 2, seed=23)
    expected = [examine(token_rule, tree)[1]]
    for epsilon in (0.8, 0.3):
        lenience = Lenience(kind, epsilon, relaxed)
        law, accepted = examine(functools.partial(token_rule, lenience=lenience), tree)
        expected.append(accepted)
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        assert largest_error(tree, law) > 1e-3  # lossy it is
        first = np.zeros(3)
        for text, probability in law.items():
            first[text[0]] += probability
        raised = relax(jnp.asarray(tree.p(()), jnp.float32), lenience)
        assert (first <= np.asarray(raised) + 1e-6).all()  # no token passes f(p)
    assert expected[0] < expected[1] < expected[2]


@pytest.mark.parametrize("kind", KINDS)
def test_lossy_at_epsilon_one_is_the_exact_rule_bit_for_bit(kind):
    rng = np.random.default_rng(29)
    p = rng.dirichlet(np.ones(13), (101, 4)).astype(np.float32)
    q = rng.dirichlet(np.ones(13), (101, 3)).astype(np.float32)
    tokens = rng.integers(13, size=(101, 3)).astype(np.int32)
    lengths = rng.integers(1, 4, size=101).astype(np.int32)
    uniforms = rng.uniform(size=(101, 4)).astype(np.float32)
    arguments = (p, q, tokens, lengths, uniforms[:, :3], uniforms[:, 3])
    rule = jax.jit(token_rule, static_argnames="lenience")
    exact = rule(*arguments)
    lossy = rule(*arguments, lenience=Lenience(kind, 1.0, relaxed_residual=True))
    assert all((a == b).all() for a, b in zip(exact, lossy, strict=True))
    assert (relax(p, Lenience(kind, 1.0)) == p).all()


@pytest.mark.parametrize("rule", RULES)
def test_rejection_without_residual_mass_falls_back_to_the_target(rule):
    p = jnp.array([[[0.25, 0.75], [0.5, 0.5]]])
    q = p[:, :1] * (1 + 1e-6)  # all of p lies under q, as rounding can have it
    drafted, just_fails = jnp.array([[0]]), jnp.array([[0.9999999]])
    arguments = (p, q, drafted, jnp.array([1]), just_fails, jnp.array([0.9]))
    num_accepted, next_token = jax.jit(RULES[rule])(*arguments)
    assert (int(num_accepted[0]), int(next_token[0])) == (0, 1)


@functools.partial(jax.jit, static_argnums=0)
def fork(i, p, q, tokens, lengths, uniforms, last):
    """K-SEQ at position i, all rejected behind it: thresholds [N, K], next-token law [N, V]."""
    rows, num_drafts, gamma = tokens.shape
    size, tested = p.shape[-1], num_drafts if i < gamma else 0
    drafted = tokens[:, :tested, min(i, gamma - 1)].T

    @jax.vmap
    def emitted(uniforms, u):
        arguments = (p, q, tokens, lengths, uniforms, last.at[:, i].set(u))
        path, num_accepted, next_token = k_seq_rule(*arguments)
        followed = tokens[jnp.arange(rows), path]
        token = jnp.where(num_accepted > i, followed[:, min(i, gamma - 1)], next_token)
        return token, followed

    low, high = jnp.zeros(rows, p.dtype), jnp.full(rows, 1 - 1e-9, p.dtype)

    def outcomes(us):
        """Whether each draft's token comes whatever is drawn behind it, and is that of law <= v."""
        tried = [uniforms.at[:, j, i].set(us[j]) for j in range(tested)]
        draws = jnp.stack([low] * tested + [high] * tested + list(us[tested:]))
        token, followed = emitted(jnp.stack([*tried, *tried, *[uniforms] * (size - 1)]), draws)
        comes = (token[:tested] == drafted) & (token[tested : 2 * tested] == drafted)
        below = token[2 * tested :] <= jnp.arange(size - 1)[:, None]
        return jnp.concatenate([comes, below]), followed[-1]

    us = bisect(lambda us: outcomes(us)[0], (tested + size - 1, rows), p.dtype)
    law = jnp.diff(jnp.stack([low, *us[tested:], low + 1]), axis=0).T
    # of a draft that has left the text the token may come as the only correction
    comes, followed = outcomes(jnp.full_like(us, FAIL))
    has_left = jnp.any(tokens[:, :tested, :i] != followed[:, None, :i], axis=2)
    return jnp.where(has_left & comes[:tested].T, 0, us[:tested].T), law


def examine_k_seq(tree, num_drafts, block_length=FIXED):
    """The same as `examine`, by following every outcome of every position."""
    blocks = tree.blocks(block_length)
    combinations = list(itertools.product(enumerate(blocks), repeat=num_drafts))
    chosen = [[row for row, _ in drafts] for drafts in combinations]
    weights = [np.prod([drafted for _, (_, drafted) in drafts]) for drafts in combinations]
    others = tree.size - 1  # tokens that do not end a block
    most = sum(others**n for n in range(tree.gamma)) + others**tree.gamma
    missing = most**num_drafts - len(chosen)  # one shape for all trees of a size
    chosen, weights = np.array(chosen + chosen[:1] * missing), np.array(weights + [0.0] * missing)
    p, q, tokens, lengths = (array[chosen] for array in tree.arrays(blocks))
    uniforms = np.full(tokens.shape, FAIL)
    last = np.zeros((len(weights), tree.gamma + 1))
    for i in range(tree.gamma + 1):
        h, law = (np.asarray(x) for x in fork(i, p, q, tokens, lengths, uniforms, last))
        branches, rejected = [], np.ones(len(weights))
        for j in range(h.shape[1]):
            accept = uniforms.copy()
            accept[:, j, i] = PASS
            branches.append((rejected * h[:, j], accept, last))
            rejected = rejected * (1 - h[:, j])
        middles = np.cumsum(law, axis=1) - law / 2
        for v in range(law.shape[1]):
            drawn = last.copy()
            drawn[:, i] = middles[:, v]
            branches.append((rejected * law[:, v], uniforms, drawn))
        weights = np.concatenate([weights * share for share, _, _ in branches])
        uniforms = np.concatenate([accept for _, accept, _ in branches])
        last = np.concatenate([drawn for _, _, drawn in branches])
        p, q, tokens, lengths = (
            np.concatenate([x] * len(branches)) for x in (p, q, tokens, lengths)
        )
    outcome = jax.jit(k_seq_rule)(p, q, tokens, lengths, uniforms, last)
    law, expected = dict.fromkeys((text for text, _ in tree.texts()), 0.0), 0.0
    outcome = [np.asarray(each) for each in outcome]
    for row in np.flatnonzero(weights):
        path, n, token = (each[row] for each in outcome)
        text = tuple(tokens[row, path, :n].tolist())
        expected += weights[row] * n
        wholes = [(text, 1.0)] if EOS in text else tree.texts((*text, int(token)))
        for whole, rest in wholes:
            law[whole] += weights[row] * rest
    return law, expected


@pytest.mark.parametrize(
    ("kind", "size", "gamma", "num_drafts"),
    [
        *((kind, *sizes) for kind in KINDS_OF_TREE for sizes in ((3, 2, 2), (2, 2, 3))),
        *(
            pytest.param(kind, *sizes, marks=pytest.mark.slow)
            for kind in KINDS_OF_TREE
            for sizes in ((4, 2, 2), (2, 3, 2))
        ),
    ],
)
def test_several_drafts_keep_the_law_and_accept_more(kind, size, gamma, num_drafts):
    tree = tree_of(kind, size, gamma, seed=31)
    with jax.enable_x64(True):
        law, expected = examine_k_seq(tree, num_drafts)
    assert largest_error(tree, law) < 1e-7  # rho is bisected to 2^-30
    assert expected > examine(token_rule, tree)[1] - 1e-9


@pytest.mark.parametrize("kind", KINDS_OF_TREE)
@pytest.mark.parametrize("block_length", ADAPTIVE, ids=["confidence", "entropy"])
@pytest.mark.parametrize(("size", "gamma", "num_drafts"), [(3, 2, 2), (2, 2, 3)])
def test_several_drafts_stopped_early_keep_the_law(kind, block_length, size, gamma, num_drafts):
    tree = tree_of(kind, size, gamma, seed=31)
    with jax.enable_x64(True):
        law, _ = examine_k_seq(tree, num_drafts, block_length)
    assert largest_error(tree, law) < 1e-7
    assert sum(law.values()) == pytest.approx(1, abs=1e-7)


def test_one_draft_of_k_seq_is_token_verification():
    rng = np.random.default_rng(37)
    p, q = rng.dirichlet(np.ones(5), (211, 4)), rng.dirichlet(np.ones(5), (211, 3))
    tokens, lengths = rng.integers(5, size=(211, 3)), rng.integers(1, 4, size=211)
    uniforms, last = rng.uniform(size=(211, 3)), rng.uniform(size=(211, 4))
    row = [x[:, None] for x in (p, q, tokens, lengths, uniforms)]
    _, num_accepted, next_token = jax.jit(k_seq_rule)(*row, last)
    final = last[np.arange(211), np.asarray(num_accepted)]
    single = jax.jit(token_rule)(p, q, tokens, lengths, uniforms, final)
    assert (single[0] == num_accepted).all()
    assert (single[1] == next_token).all()
    assert len(np.unique(num_accepted)) == 4


def test_rho_is_where_the_correction_is_just_a_distribution():
    rng = np.random.default_rng(41)
    p, q = (rng.dirichlet(np.ones(5), 101).astype(np.float32) for _ in range(2))
    count = rng.integers(1, 6, size=101)
    rho = np.asarray(jax.jit(smallest_rho)(p, q, count))
    beta = np.minimum(q, p / rho[:, None]).sum(axis=1)
    np.testing.assert_allclose(1 - (1 - beta) ** count, rho * beta, atol=1e-5)
    assert (rho[count == 1] == 1).all()
    assert (rho <= count).all()
