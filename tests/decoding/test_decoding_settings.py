"""Settings of the speculative sampler: what is refused, and what is the same."""

import jax
import pytest

from distillspec_jax.decoding.block_length import BlockLength
from distillspec_jax.decoding.lenience import Lenience
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.decoding.state import Speculation
from distillspec_jax.errors import UserError

GREEDY = Sampling(temperature=0)
SIZES = {"gamma": 3, "max_new_tokens": 17}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gamma": 0}, "gamma is 0"),
        ({"gamma": 2.0}, "gamma is 2.0; it must be an integer of at least 1"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ({"num_drafts": 1.5}, "num_drafts is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"verification": "blok"}, "did you mean 'block'"),
        ({"verification": "greedy"}, "greedy verification needs temperature 0"),
        ({"verification": "block", "lenience": Lenience("linear", 0.5)}, "no exact base"),
        ({"num_drafts": 0}, "num_drafts is 0"),
        ({"num_drafts": 2, "lenience": Lenience("linear", 0.5)}, "several drafts need token"),
        ({"num_drafts": 2, "verification": "block"}, "several drafts need token"),
        ({"gamma": True}, "gamma is True"),
        ({"sampling": 1.0}, r"^sampling is 1\.0; it must be a Sampling"),
        ({"sampling": None}, "^sampling is None; it must be a Sampling"),
        ({"draft_sampling": 0.5}, r"draft_sampling is 0\.5; it must be a Sampling"),
        ({"sampling": GREEDY, "lenience": 0.5}, r"lenience is 0\.5; it must be a Lenience"),
        ({"lenience": 0}, "lenience is 0; it must be a Lenience"),
        ({"draft_sampling": 0}, "draft_sampling is 0; it must be a Sampling"),
        ({"block_length": 3}, "block_length is 3; it must be a BlockLength"),
        ({"verification": None}, "verification is None; it must be a str"),
    ],
)
def test_settings_out_of_range_are_refused(pairs, prompts, settings, named):
    with pytest.raises(UserError, match=named):
        speculative_sample(
            *pairs["encoder-decoder"], prompts, jax.random.key(3), **SIZES | settings
        )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Lenience("linear", 0.0), "lenience is 0.0"),
        (lambda: Lenience("linear", 1.5), "lenience is 1.5"),
        (lambda: Lenience("linear", 1e-38), "lenience is 1e-38, by which float32 cannot divide"),
        (lambda: Lenience("square", 1e-19), "lenience is 1e-19, by which .* as 'square'; 1e-15"),
        (lambda: Lenience("lin"), "did you mean 'linear'"),
        (lambda: BlockLength(min_confidence=1.2), "min_confidence is 1.2"),
        (lambda: BlockLength(max_entropy=-1.0), "max_entropy is -1.0"),
        (lambda: BlockLength(schedule_start=-1), "schedule_start is -1"),
        (lambda: BlockLength(schedule_start=1.5), "schedule_start is 1.5; it must be 0"),
        (lambda: Lenience(epsilon="0.5"), "lenience is '0.5'; it must be a number"),
        (lambda: Lenience(epsilon=True), "lenience is True; it must be a number"),
        (lambda: BlockLength(min_confidence="0.4"), "min_confidence is '0.4'; it must be a num"),
        (lambda: BlockLength(max_entropy=None), "max_entropy is None; it must be a number"),
    ],
)
def test_lenience_and_block_length_out_of_range_are_refused(make, named):
    with pytest.raises(UserError, match=named):
        make()


@pytest.mark.parametrize("settings", [{"verification": "block"}, {"num_drafts": 2}])
def test_an_exact_lenience_is_none_with_every_rule(pairs, settings):
    pair = pairs["encoder-decoder"]
    settings = settings | SIZES
    exact = Speculation(pair.target, pair.draft, lenience=Lenience("square", 1.0), **settings)
    assert exact == Speculation(pair.target, pair.draft, **settings)
