"""The slot loop against decoding everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillspec_jax.decoding import slots
from distillspec_jax.decoding.slots import slot_sample
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.errors import UserError

GAMMA, LIMIT = 3, 13
RNG = jax.random.key(5)


def both(pair, prompts, row_ids=None, num_drafts=1, **settings):
    common = {"gamma": GAMMA, "max_new_tokens": LIMIT, "num_drafts": num_drafts}
    ids = None if row_ids is None else jnp.asarray(row_ids)
    whole = speculative_sample(*pair, prompts, RNG, row_ids=ids, **common)
    speculation = Speculation(pair.target, pair.draft, **common)
    params = pair.target_params, pair.draft_params
    return whole, slot_sample(speculation, *params, prompts, RNG, row_ids=row_ids, **settings)


@pytest.mark.parametrize(
    ("count", "num_slots", "refill", "num_drafts"),
    [(53, 7, 2, 1), (53, 11, 11, 1), (3, 7, 2, 1), (23, 5, 1, 2)],
)
def test_every_prompt_comes_out_as_in_one_batch(
    pair, prompts, count, num_slots, refill, num_drafts
):
    told = []
    whole, out = both(
        pair,
        prompts[:count],
        num_drafts=num_drafts,
        slots=num_slots,
        refill=refill,
        report=told.append,
    )
    for name in ("tokens", "lengths", "origins"):
        np.testing.assert_array_equal(getattr(out, name), getattr(whole, name))
    for name in ("target_calls", "drafted", "tested", "accepted", "emitted", "finished"):
        ours, theirs = getattr(out.statistics, name), getattr(whole.statistics, name)
        np.testing.assert_array_equal(ours, theirs)
    assert told == sorted(told)
    assert told[-1] == count


def test_row_ids_decide_the_random_numbers(pairs, prompts):
    ids = np.arange(53)[::-1] * 3
    whole, out = both(pairs["decoder-only"], prompts, row_ids=ids, slots=7, refill=2)
    np.testing.assert_array_equal(out.tokens, whole.tokens)


def test_slots_compile_once(pairs, prompts):
    functions = slots._begin, slots._run, slots._refill
    before = [function._cache_size() for function in functions]
    for count in (53, 41):
        both(pairs["decoder-only"], prompts[:count], slots=3, refill=2)
    assert [function._cache_size() for function in functions] == [size + 1 for size in before]


def test_slots_spend_fewer_target_calls_than_batches(pairs, prompts, monkeypatch):
    """What refilling is for; counted where the blocks run."""
    passes, num_slots = [], 8

    def counted(*arguments):
        jax.debug.callback(lambda: passes.append(1))
        return advance(*arguments)

    advance = slots.advance
    monkeypatch.setattr(slots, "advance", counted)
    slots._run.clear_cache()
    whole, _ = both(pairs["encoder-decoder"], prompts, slots=num_slots)
    jax.effects_barrier()
    slots._run.clear_cache()
    calls = np.asarray(whole.statistics.target_calls)
    batches = sum(calls[i : i + num_slots].max() for i in range(0, len(calls), num_slots))
    assert calls.sum() / num_slots <= len(passes) < 0.9 * batches


def test_bad_requests_are_refused(pairs, prompts, spoil):
    pair = pairs["encoder-decoder"]
    speculation = Speculation(pair.target, pair.draft, GAMMA, LIMIT)
    params = pair.target_params, pair.draft_params

    def refused(named, inputs=prompts, params=params, **settings):
        with pytest.raises(UserError, match=named):
            slot_sample(speculation, *params, inputs, RNG, **{"slots": 8, **settings})

    refused("refill is 9", refill=9)
    refused("refill is 0; it must be an integer of at least 1", refill=0)
    refused("slots is 0; it must be an integer of at least 1", slots=0)
    refused(r"inputs have shape \(0, 5\)", inputs=prompts[:0])
    refused("row id -1 in row 0 is outside 0 <= id", row_ids=np.arange(53) - 1)
    refused("gave NaN", params=(spoil(params[0]), params[1]))
