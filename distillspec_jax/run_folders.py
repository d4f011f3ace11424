"""Where the checkpoints of a run lie, and which one stands for it.

`training.checkpoints` writes them and says what is in one, `interop.orbax` reads and writes the
weights alone, `zoo` finds them by the folder of the run.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path

from distillspec_jax.errors import UserError
from distillspec_jax.files import write_text

FOLDER = "checkpoints"
FORMAT = 1


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
