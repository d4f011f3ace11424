"""Where the checkpoints of a run lie, and which one stands for it.

`training.checkpoints` writes them and says what is in one, `interop.orbax` reads and writes the
weights alone, `zoo` finds them by the folder of the run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillspec_jax.errors import UserError
from distillspec_jax.files import write_text

FOLDER = "checkpoints"
FORMAT = 1
SEAL = "seal"  # in the description: digest of all else in it
SUMS = "sums"  # in the description: `models.fingerprint.checksums` of the weights


def newest_step(workdir: Path) -> int:
    """The step of the newest checkpoint, -1 if there is none."""
    return max(saved_steps(workdir / FOLDER), default=-1)


def chosen_step(workdir: Path) -> int:
    """The step whose weights stand for the run: the best one saved, else the newest.

    Raises UserError if there is no checkpoint.
    """
    folder = workdir / FOLDER
    found = saved_steps(folder)
    if not found:
        raise UserError(f"there is no checkpoint in {folder}")
    best = [step for step in found if says_best(folder / str(step))]
    return max(best or found)


def sealed(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a checkpoint with its seal, by which a changed letter is seen."""
    return {**description, SEAL: digest(description)}


def unsealed(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description without its seal; ValueError if that is broken. Older ones have none."""
    kept = {key: value for key, value in description.items() if key != SEAL}
    check_digest(kept, description.get(SEAL))
    return kept


def check_digest(values: Mapping[str, Any], wanted: str | None) -> None:
    """ValueError unless `digest` of the values is the wanted one, if there is one."""
    if wanted is not None and digest(values) != wanted:
        raise ValueError("its texts are not those that were saved")


def digest(values: Mapping[str, Any]) -> str:
    """Hex sha256 of JSON; "best" does not count, which is written later, too."""
    kept = {key: value for key, value in values.items() if key != "best"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def says_best(checkpoint: Path) -> bool:
    """Whether a checkpoint's description says that it is the best of its run."""
    metadata = checkpoint / "description" / "metadata"
    try:
        return bool(json.loads(metadata.read_text("utf-8"))["best"])
    except (OSError, LookupError, TypeError, ValueError, RecursionError):  # none that we wrote
        return False


def mark_best(checkpoint: Path) -> None:
    """Has the description of a whole checkpoint say that it is the best, unless it does."""
    if says_best(checkpoint):
        return
    metadata = checkpoint / "description" / "metadata"
    stored = json.loads(metadata.read_text("utf-8")) | {"best": True}
    write_text(metadata, json.dumps(stored))


def drop_unfinished_reads() -> None:
    """Lets the other reads of a failed restore go without a traceback of each on the terminal."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    was_disabled = logger.disabled
    logger.disabled, sys.unraisablehook = True, lambda _: None
    gc.collect()
    logger.disabled, sys.unraisablehook = was_disabled, hook
