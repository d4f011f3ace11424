"""Orbax checkpoints of a run: `<workdir>/checkpoints/<step>/params` and `/description`.

The layout is that of `training.checkpoints`; here only the weights are read or written, so a
folder written here is loaded like a run's, but has no training to go on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import distillspec_jax
from distillspec_jax.errors import UserError, check_count, first_line
from distillspec_jax.interop import layout, placing
from distillspec_jax.interop.folders import new_folder, refuse_links
from distillspec_jax.interop.native import model_config
from distillspec_jax.interop.tensors import check_tensors
from distillspec_jax.models.config import ModelConfig, check_has_end
from distillspec_jax.models.cpu_memory import on_large_pages
from distillspec_jax.models.fingerprint import checksums
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.run_folders import FOLDER, FORMAT, SUMS, sealed, unsealed


def is_step(folder: Path) -> bool:
    """Whether a folder is one checkpoint of a run."""
    return (folder / "params").is_dir() and (folder / "description").is_dir()


def describe(step: Path) -> dict[str, Any]:
    """What a run said about itself when it saved the checkpoint `step`."""
    refuse_links(step / "description")
    handler = ocp.JsonCheckpointHandler()
    try:
        stored = handler.restore(step / "description", ocp.args.JsonRestore())
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deeply
        raise UserError(f"{step} is not a checkpoint: its description cannot be read") from error
    finally:
        handler.close()
    if not isinstance(stored, Mapping) or stored.get("format") != FORMAT:
        raise UserError(f"{step} is not a checkpoint of this project, format {FORMAT}")
    try:
        return unsealed(stored)
    except ValueError as error:
        raise UserError(f"the checkpoint {step} is damaged: {error}") from error


def read_config(step: Path) -> ModelConfig:
    """The shape of the model in the checkpoint `step`."""
    return model_config(describe(step).get("model"), f"{step}/description")


def read_params(
    step: Path, config: ModelConfig, *, shardings: Any = None, dtype: str = "float32"
) -> Any:
    """The weights of the checkpoint `step`, whose shape is `config`, each in its place.

    Raises UserError unless they are those that were saved, to the bit.
    """
    place, wanted = step / "params", placing.checked_dtype(dtype)
    refuse_links(place)
    handler = ocp.StandardCheckpointHandler()
    try:
        found = _checked(handler.metadata(place), layout.leaves(config), str(place))
        arguments = ocp.args.StandardRestore(layout.nested(_abstract(found, shardings)))
        params = on_large_pages(handler.restore(place, args=arguments))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise UserError(f"the checkpoint {step} is damaged: {first_line(error)}") from error
    finally:
        handler.close()
    stored = describe(step).get(SUMS)  # older checkpoints have others, or none
    if stored is not None and stored != checksums(params).tolist():
        raise UserError(
            f"the checkpoint {step} is damaged: its weights are not those it was saved with"
        )
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == wanted else leaf.astype(wanted), params)


def _abstract(
    found: Mapping[layout.Path, Any], shardings: Any
) -> dict[layout.Path, jax.ShapeDtypeStruct]:
    """Shapes of stored arrays with the places they are to have."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(path: layout.Path, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = default if shardings is None else layout.get(shardings, path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {path: one(path, leaf) for path, leaf in found.items()}


def save(
    model: Transformer, params: Any, workdir: str | Path, description: Mapping[str, Any]
) -> None:
    """Writes `<workdir>/checkpoints/<step>` with the weights of a model, whole or not at all.

    `description` may hold "step" (default 0), "vocabulary_fingerprint" and more. Raises UserError
    for a step that is no number: it becomes the name of a folder.
    """
    check_count("step of the description", description.get("step", 0), least=0)
    check_has_end(model.config.eos_id, f"model '{model.config.name}'")
    stored = {
        "step": 0,
        **description,
        "model": model.config.as_stored(),
        "best": True,
        "format": FORMAT,
        "versions": {"distillspec_jax": distillspec_jax.__version__, "jax": jax.__version__},
    }
    stored[SUMS] = checksums(params).tolist()
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        description=ocp.args.JsonSave(sealed(json.loads(json.dumps(stored)))),
    )
    with (
        new_folder(Path(workdir)) as temporary,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(temporary / FOLDER / str(stored["step"]), args=args)


def _checked(metadata: Any, table: list[layout.Leaf], where: str) -> dict[layout.Path, Any]:
    """What is stored, by path, if that is what `table` asks for; else UserError."""
    found = {
        tuple(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)
    }
    names = {"/".join(path): leaf for path, leaf in found.items()}
    check_tensors({"/".join(leaf.path): leaf.shape for leaf in table}, names, where)
    return found
