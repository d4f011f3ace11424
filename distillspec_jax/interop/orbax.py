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
from distillspec_jax.errors import UserError, first_line
from distillspec_jax.interop import layout, placing
from distillspec_jax.interop.folders import new_folder, refuse_links
from distillspec_jax.interop.native import model_config
from distillspec_jax.interop.tensors import check_tensors
from distillspec_jax.models.config import ModelConfig, check_has_end
from distillspec_jax.models.cpu_memory import on_large_pages
from distillspec_jax.models.transformer import Transformer
from distillspec_jax.run_folders import FOLDER, FORMAT


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
    return dict(stored)


def read_config(step: Path) -> ModelConfig:
    """The shape of the model in the checkpoint `step`."""
    return model_config(describe(step).get("model"), f"{step}/description")


def read_params(
    step: Path, config: ModelConfig, *, shardings: Any = None, dtype: str = "float32"
) -> Any:
    """The weights of the checkpoint `step`, whose shape is `config`, each in its place."""
    place, stored = step / "params", placing.checked_dtype(dtype)
    refuse_links(place)
    table = layout.leaves(config)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        leaf.path: jax.ShapeDtypeStruct(
            leaf.shape,
            stored,
            sharding=default if shardings is None else layout.get(shardings, leaf.path),
        )
        for leaf in table
    }
    handler = ocp.StandardCheckpointHandler()
    try:
        _check(handler.metadata(place), table, str(place))
        arguments = ocp.args.StandardRestore(layout.nested(abstract))
        return on_large_pages(handler.restore(place, args=arguments))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise UserError(f"the checkpoint {step} is damaged: {first_line(error)}") from error
    finally:
        handler.close()


def save(
    model: Transformer, params: Any, workdir: str | Path, description: Mapping[str, Any]
) -> None:
    """Writes `<workdir>/checkpoints/<step>` with the weights of a model, whole or not at all.

    `description` may hold "step" (default 0), "vocabulary_fingerprint" and more.
    """
    check_has_end(model.config.eos_id, f"model '{model.config.name}'")
    stored = {
        "step": 0,
        **description,
        "model": model.config.as_stored(),
        "best": True,
        "format": FORMAT,
        "versions": {"distillspec_jax": distillspec_jax.__version__, "jax": jax.__version__},
    }
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        description=ocp.args.JsonSave(json.loads(json.dumps(stored))),
    )
    with (
        new_folder(Path(workdir)) as temporary,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(temporary / FOLDER / str(stored["step"]), args=args)


def _check(metadata: Any, table: list[layout.Leaf], where: str) -> None:
    found = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)
    }
    check_tensors({"/".join(leaf.path): leaf.shape for leaf in table}, found, where)
