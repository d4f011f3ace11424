"""Recipes: the paper's table, and what they refuse."""

import pytest

from distillspec_jax.distill import recipes
from distillspec_jax.distill.data_sources import source_probabilities
from distillspec_jax.errors import UserError

# PAPER table 1: P(fixed), P(draft), P(teacher), loss
TABLE = {
    "sft": (1, 0, 0, "nll"),
    "seqkd": (0, 0, 1, "nll"),
    "supkd": (1, 0, 0, "forward_kl"),
    "imitkd": (0.5, 0.5, 0, "forward_kl"),
    "f_distill": (0, 0.5, 0.5, "tvd"),
    "gkd": (0, 1, 0, "forward_kl"),
    "distillspec": (0, 1, 0, "jsd"),
    "skd": (0, 1, 0, "forward_kl"),
    "adaspec": (1, 0, 0, "forward_kl"),
}


def test_the_table_of_the_paper():
    assert set(TABLE) == set(recipes.RECIPES)
    for name, (fixed, draft, teacher, loss) in TABLE.items():
        recipe = recipes.named(name)
        expected = {"fixed": fixed, "draft": draft, "teacher": teacher}
        assert source_probabilities(recipe) == expected, name
        assert recipe.loss == loss, name
        assert recipe.needs_target_scores == (loss != "nll"), name
        assert recipe.reduction == ("token" if name == "adaspec" else "sequence"), name
        assert recipe.needs_reference == (name == "adaspec"), name
    assert recipes.named("skd").interleave_top_k == 25
    assert recipes.named("adaspec").keep_fraction == 0.4


def test_fields_can_be_changed_and_the_table_stays():
    changed = recipes.named("gkd", loss="jsd", beta=0.9, lambda1=0.25)
    assert (changed.loss, changed.beta, changed.lambda1) == ("jsd", 0.9, 0.25)
    assert recipes.named("gkd").loss == "forward_kl"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gkt", {}, "unknown recipe 'gkt'; did you mean 'gkd'"),
        ("gkd", {"lamda1": 0.5}, "unknown field 'lamda1' in recipe 'gkd'; did you mean 'lambda1'"),
        ("gkd", {"loss": "jds"}, "unknown loss 'jds' in recipe 'gkd'; did you mean 'jsd'"),
        ("gkd", {"reduction": "mean"}, "unknown reduction 'mean'"),
        ("gkd", {"lambda1": 1.5}, "lambda1 of recipe 'gkd' is 1.5, must be within 0 and 1"),
        ("gkd", {"lambda2": -0.1}, "lambda2 of recipe 'gkd' is -0.1, must be within 0 and 1"),
        ("gkd", {"lambda1": float("nan")}, "lambda1 of recipe 'gkd' is nan"),
        ("distillspec", {"beta": 0.0}, "use the divergence 'forward_kl' instead"),
        ("distillspec", {"beta": 1.0}, "use the divergence 'reverse_kl' instead"),
        ("gkd", {"draft_temperature": 0.0}, "draft_temperature of recipe 'gkd' is 0, must be"),
        ("gkd", {"rollout_temperature": -1.0}, "rollout_temperature of recipe 'gkd' is -1"),
        ("adaspec", {"keep_fraction": 0.0}, "keep_fraction of recipe 'adaspec' is 0"),
        ("sft", {"keep_fraction": 0.5}, "needs a divergence as loss, not 'nll'"),
        ("skd", {"interleave_top_k": -1}, "interleave_top_k of recipe 'skd' is -1"),
        ("skd", {"interleave_top_k": 2.5}, "interleave_top_k of recipe 'skd' is 2.5; it must be 0"),
        ("seqkd", {"teacher_gamma": 1.5}, "teacher_gamma of recipe 'seqkd' is 1.5; it must be 0"),
    ],
)
def test_bad_recipes_are_refused_in_words(name, changes, message):
    with pytest.raises(UserError) as error:
        recipes.named(name, **changes)
    assert message in str(error.value)


def test_a_beta_that_is_not_used_is_not_judged():
    assert recipes.named("gkd", beta=1.0).loss == "forward_kl"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gkd", {"beta": 0.1}, "beta belongs to loss 'jsd': recipe 'gkd' has loss 'forward_kl'"),
        ("distillspec", {"eta": 1.0}, "eta belongs to loss 'lk_hybrid'"),
        ("seqkd", {"target_temperature": 3.0}, "belongs to a divergence as loss"),
        ("supkd", {"rollout_temperature": 0.5}, "belongs to samples, lambda1 below 1"),
        ("seqkd", {"interleave_top_k": 25}, "belongs to the draft's samples"),
        ("distillspec", {"teacher_gamma": 5}, "teacher_gamma belongs to the target's samples"),
        ("gkd", {"loss": "jsd", "beta": 0.1}, None),
        ("distillspec", {"lambda1": 0.5, "lambda2": 0.5, "teacher_gamma": 5}, None),
        ("skd", {"interleave_top_k": 10, "keep_fraction": 0.5}, None),
    ],
)
def test_what_a_recipe_never_looks_at_is_not_set(name, changes, words):
    recipe = recipes.named(name, **changes)
    if words is None:
        recipes.check_used(recipe, changes)
    else:
        with pytest.raises(UserError, match=words):
            recipes.check_used(recipe, changes)
