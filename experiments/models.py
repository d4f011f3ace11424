"""Models of an entrypoint, by name or path: loaded, outlined, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from distillspec_jax import zoo
from distillspec_jax.data.vocabulary import Vocabulary, check_same
from distillspec_jax.decoding.state import check_pair
from distillspec_jax.errors import UserError
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.models.fingerprint import fingerprint
from distillspec_jax.models.transformer import (
    Params,
    Transformer,
    hold_in_compute_dtype,
    in_compute_dtype,
    init_params,
)
from distillspec_jax.sharding.layout import placed


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters and where they are from."""

    path: str
    model: Transformer
    params: Params
    stored: str = ""  # fingerprint of the weights as they were read, if they are held narrower

    @functools.cached_property
    def fingerprint(self) -> str:
        """`models.fingerprint` of the weights as they were read."""
        return self.stored or fingerprint(self.model, self.params)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def __str__(self) -> str:
        is_fresh = zoo.find(self.path).path is None
        origin = " (a preset: fresh weights, never trained)" if is_fresh else ""
        return f"{self.path}{origin}, {self.num_parameters:,} parameters"


class Speaks(Protocol):
    """A task, or anything else that fixes what the ids of tokens mean."""

    @property
    def vocabulary(self) -> Vocabulary: ...


Shardings = Callable[[ModelConfig], Any]  # of a model's parameters, as zoo.load takes it


def load(
    path: str,
    task: Speaks,
    *,
    compute_dtype: str = "float32",
    seed: int = 0,
    shardings: Shardings | None = None,
    is_frozen: bool = False,
) -> Loaded:
    """Loads a model onto its devices; `seed` is of a preset's fresh parameters.

    Its parameters are float32, whatever it computes in, but of a frozen model those that products
    read are of the dtype that it computes in. Raises UserError if it does not speak the task's
    vocabulary.
    """
    _check_vocabulary(path, task)
    model, params = zoo.load(path, seed=seed, shardings=shardings)
    loaded = Loaded(path, _computing_in(compute_dtype, model), params)
    if not is_frozen or compute_dtype == "float32":
        return loaded
    stored = loaded.fingerprint  # before the weights are rounded
    params = hold_in_compute_dtype(loaded.model, params)
    return Loaded(path, loaded.model, params, stored)


def outline(
    path: str,
    task: Speaks,
    *,
    compute_dtype: str = "float32",
    seed: int = 0,
    shardings: Shardings | None = None,
    is_frozen: bool = False,
) -> Loaded:
    """What `load` would load or refuse, with shapes and shardings in place of arrays."""
    _check_vocabulary(path, task)
    model = _computing_in(compute_dtype, _outline(path)[0])
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(seed)))
    if is_frozen:
        shapes = jax.eval_shape(functools.partial(in_compute_dtype, model), shapes)
    if shardings is not None:
        shapes = placed(shapes, shardings(model.config))
    return Loaded(path, model, shapes)


def _computing_in(dtype: str, model: Transformer) -> Transformer:
    return zoo.model(dataclasses.replace(model.config, dtype=dtype))


def _check_vocabulary(path: str, task: Speaks) -> None:
    names = (f"model '{path}'", "the task")
    check_same(zoo.describe(path), task.vocabulary.describe(), names)
    pieces = _outline(path)[0].config.num_pieces
    if pieces < task.vocabulary.size:
        raise UserError(
            f"model '{path}' has {pieces} pieces, the vocabulary of the task has "
            f"{task.vocabulary.size}; take a model of that vocabulary"
        )


def check_meeting(target: str, *drafts: str) -> None:
    """Refuses drafts that cannot speak for the target, before the weights of any are read.

    Compared are their kinds, fingerprints, numbers of pieces, EOS, PAD and start ids.
    """
    (model, pieces), *others = (_outline(path) for path in (target, *drafts))
    for draft, draft_pieces in others:
        check_pair(model, draft, fingerprints=(pieces, draft_pieces))


def _outline(path: str) -> tuple[Transformer, str | None]:
    """A model without parameters, and the fingerprint of its pieces if it is known."""
    known = zoo.describe(path)
    config = ModelConfig(**known["model"] | {"name": path})
    return zoo.model(config), known.get("vocabulary_fingerprint")
