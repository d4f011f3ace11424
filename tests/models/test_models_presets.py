"""Every preset at its true size, by shape evaluation: nothing is allocated."""

import jax
import pytest

from distillspec_jax.errors import UserError
from distillspec_jax.models.presets import PRESETS, preset
from distillspec_jax.models.transformer import Transformer, init_params

# parameter counts of the released checkpoints (unique parameters, as `transformers` counts them)
PUBLISHED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
}


def count(name: str) -> int:
    model = Transformer(preset(name))
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_t5_sizes_are_the_published_ones(name):
    assert count(name) == PUBLISHED[name]


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_flan_has_the_sizes_of_t5_1_1(size):
    assert count(f"flan_t5_{size}") == PUBLISHED[f"t5_1_1_{size}"]


@pytest.mark.parametrize(("name", "millions"), [("lm1b_33m", 33), ("lm1b_234m", 234)])
def test_the_papers_decoder_only_pair(name, millions):
    assert abs(count(name) / 1e6 / millions - 1) < 0.03
    assert not PRESETS[name].is_encoder_decoder


def test_cpu_target_has_a_decoder_worth_speeding_up():
    model = Transformer(preset("cpu_target"))
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["decoder"])) >= 5_000_000


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 't5_1_1_small'"):
        preset("t5_1_1_smal")
