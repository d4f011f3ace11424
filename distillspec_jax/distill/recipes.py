"""Recipes: who writes the text, and which loss teaches the draft on it.

Source of the table: arXiv 2310.08461 (DistillSpec), table 1 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from distillspec_jax.distill import divergences
from distillspec_jax.distill.losses import REDUCTIONS
from distillspec_jax.errors import UserError, check_count, unknown_name

LIKELIHOOD = "nll"  # the loss of the references (or samples) alone; the target scores nothing
LOSSES = (LIKELIHOOD, *divergences.DIVERGENCES)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to distil, checked when it is made.

    Attributes:
      name: what reports call it.
      loss: 'nll' or a name in divergences.DIVERGENCES.
      beta: of loss 'jsd', strictly between 0 and 1.
      eta: of loss 'lk_hybrid', at least 0.
      lambda1: probability that a step uses the batch's own targets (fixed data).
      lambda2: probability that any other step uses samples of the draft, not of the target.
      rollout_temperature: at which draft or target write; 0 is greedy.
      target_temperature, draft_temperature: of the softmaxes inside the loss, above 0.
      interleave_top_k: above 0, the draft's samples are interleaved (arXiv 2410.11325): a token
        outside the target's top k is replaced by one of the target's.
      teacher_gamma: above 0, the target's samples are drawn speculatively with the current draft
        and this block length: the same law, sooner, and the loss takes over the target's states.
      keep_fraction: below 1, only this share of a batch's tokens is learnt from: those whose loss
        exceeds a reference draft's the most (arXiv 2510.19779, AdaSPEC).
      reduction: 'sequence' (mean per sequence, then over the batch) or 'token'.
    """

    name: str = "distillspec"
    loss: str = "jsd"
    beta: float = 0.5
    eta: float = 3.0
    lambda1: float = 0.0
    lambda2: float = 1.0
    rollout_temperature: float = 1.0
    target_temperature: float = 1.0
    draft_temperature: float = 1.0
    interleave_top_k: int = 0
    teacher_gamma: int = 0
    keep_fraction: float = 1.0
    reduction: str = "sequence"

    def __post_init__(self) -> None:
        where = f"recipe '{self.name}'"
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES, where)
        if self.reduction not in REDUCTIONS:
            raise unknown_name("reduction", self.reduction, REDUCTIONS, where)
        if self.loss == "jsd":
            divergences.check_beta(self.beta)
        divergences.check_eta(self.eta)
        for field in ("lambda1", "lambda2"):
            self._require(field, 0 <= getattr(self, field) <= 1, "within 0 and 1")
        for field in ("target_temperature", "draft_temperature"):
            self._require(field, getattr(self, field) > 0, "above 0")
        self._require("rollout_temperature", self.rollout_temperature >= 0, "at least 0")
        for field in ("interleave_top_k", "teacher_gamma"):
            check_count(f"{field} of {where}", getattr(self, field), least=0, zero="off")
        self._require("keep_fraction", 0 < self.keep_fraction <= 1, "above 0 and at most 1")
        if self.keep_fraction < 1 and self.loss == LIKELIHOOD:
            raise UserError(f"keep_fraction of {where} needs a divergence as loss, not 'nll'")

    def _require(self, field: str, holds: bool, range_: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise UserError(f"{field} of recipe '{self.name}' is {value:g}, must be {range_}")

    @property
    def divergence(self) -> divergences.Divergence:
        """The recipe's divergence of [..., V] logits, at its temperatures."""
        return divergences.at_temperatures(
            divergences.named(self.loss, beta=self.beta, eta=self.eta),
            target=self.target_temperature,
            draft=self.draft_temperature,
        )

    @property
    def keeps_target_hidden(self) -> bool:
        """Whether text of the target comes with what the loss needs of the target."""
        from_teacher = self.lambda1 < 1 and self.lambda2 < 1
        return self.teacher_gamma > 0 and from_teacher and self.needs_target_scores

    @property
    def needs_target_scores(self) -> bool:
        """Whether the target has to score the text; a likelihood loss does without."""
        return self.loss != LIKELIHOOD

    @property
    def needs_reference(self) -> bool:
        """Whether the step needs the weights of a reference draft."""
        return self.keep_fraction < 1


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("sft", loss="nll", lambda1=1.0),
        Recipe("seqkd", loss="nll", lambda2=0.0),  # Kim & Rush, arXiv 1606.07947
        Recipe("supkd", loss="forward_kl", lambda1=1.0),  # Hinton, arXiv 1503.02531
        Recipe("imitkd", loss="forward_kl", lambda1=0.5),  # Lin, arXiv 2009.07253
        Recipe("f_distill", loss="tvd", lambda2=0.5),  # Wen, arXiv 2307.15190
        Recipe("gkd", loss="forward_kl"),  # Agarwal, arXiv 2306.13649
        Recipe("distillspec"),
        Recipe("skd", loss="forward_kl", interleave_top_k=25),  # Xu, arXiv 2410.11325
        Recipe(
            "adaspec", loss="forward_kl", lambda1=1.0, keep_fraction=0.4, reduction="token"
        ),  # Hu, arXiv 2510.19779
    )
}


# Fields that only some recipes look at: whose they are, and whether a recipe is such a one.
_BELONGS: dict[str, tuple[str, Callable[[Recipe], bool]]] = {
    "beta": ("loss 'jsd'", lambda r: r.loss == "jsd"),
    "eta": ("loss 'lk_hybrid'", lambda r: r.loss == "lk_hybrid"),
    "target_temperature": ("a divergence as loss", lambda r: r.needs_target_scores),
    "draft_temperature": ("a divergence as loss", lambda r: r.needs_target_scores),
    "lambda2": ("samples, lambda1 below 1", lambda r: r.lambda1 < 1),
    "rollout_temperature": ("samples, lambda1 below 1", lambda r: r.lambda1 < 1),
    "interleave_top_k": ("the draft's samples", lambda r: r.lambda1 < 1 and r.lambda2 > 0),
    "teacher_gamma": ("the target's samples", lambda r: r.lambda1 < 1 and r.lambda2 < 1),
}


def check_used(recipe: Recipe, fields: Iterable[str]) -> None:
    """Refuses fields that were set for a recipe which never looks at them."""
    for field in fields:
        belongs_to, uses = _BELONGS.get(field, ("", lambda _: True))
        if not uses(recipe):
            raise UserError(
                f"{field} belongs to {belongs_to}: recipe '{recipe.name}' has loss "
                f"'{recipe.loss}', lambda1 {recipe.lambda1:g} and lambda2 {recipe.lambda2:g}; "
                "leave it out or change those"
            )


def named(name: str, **changes: Any) -> Recipe:
    """Returns the recipe of that name, with some fields changed."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for change in changes:
        if change not in fields:
            raise unknown_name("field", change, fields, f"recipe '{name}'")
    return dataclasses.replace(RECIPES[name], **changes)
