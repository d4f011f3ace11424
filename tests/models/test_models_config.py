"""What no model can have is refused where a shape is made, by field and value."""

import dataclasses

import pytest

from distillspec_jax.models.config import FieldError, ModelConfig

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=26,
    d_model=10,
    num_heads=2,
    head_dim=3,
    d_ff=8,
    num_encoder_layers=1,
    num_decoder_layers=2,
)


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("d_ff", 0, "at least 1"),
        ("num_decoder_layers", 0, "at least 1"),
        ("num_encoder_layers", -3, "at least 0"),
        ("num_pieces", 27, "within 0 and vocab_size = 26"),
        ("num_pieces", -1, "within 0 and vocab_size = 26"),
        ("relative_buckets", 3, "at least 4"),
        ("relative_max_distance", 16, "more than 16, half of the buckets"),
        ("layer_norm_epsilon", -1e-6, "at least 0 and less than 1"),
        ("layer_norm_epsilon", float("nan"), "at least 0 and less than 1"),
        ("dropout_rate", 1.0, "at least 0 and less than 1"),
        ("dropout_rate", -0.1, "at least 0 and less than 1"),
        ("pad_id", -1, "at least 0"),
        ("pad_id", 26, "less than vocab_size = 26"),
        ("eos_id", -2, "at least -1"),
        ("eos_id", 26, "less than vocab_size = 26"),
        ("decoder_start_id", -1, "at least 0"),
        ("decoder_start_id", 26, "less than vocab_size = 26"),
    ],
)
def test_what_no_model_can_have_is_refused(field, value, must):
    wanted = f"{field} of model 'tiny' is {value}, must be {must}"
    with pytest.raises(FieldError, match=f"^{wanted}$") as error:
        dataclasses.replace(CONFIG, **{field: value})
    assert (error.value.field, error.value.must) == (field, must)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_id": -1},  # nothing ends a text
        {"eos_id": 25, "pad_id": 25, "decoder_start_id": 25, "num_pieces": 26},
        {"num_encoder_layers": 0},
        {"relative_buckets": 4, "relative_max_distance": 3},
        {"relative_max_distance": 17},
        {"dropout_rate": 0.0, "layer_norm_epsilon": 0.0},
    ],
)
def test_what_lies_at_an_edge_is_a_model(fields):
    assert dataclasses.replace(CONFIG, **fields)
