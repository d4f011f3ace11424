"""Checkpoints of a run, kept by Orbax: written behind the steps, whole or not at all.

Layout, for readers that want the weights and no training state:

    <workdir>/checkpoints/<step>/params        item of StandardSave: the weights to use (float32
                                               'params' dict of the model; the moving average
                                               where the run keeps one)
    <workdir>/checkpoints/<step>/description   item of JsonSave: {"model": dataclasses.asdict of
                                               ModelConfig, "vocabulary_fingerprint": str, "step":
                                               int, "best": bool, "format": 1, "versions": {...},
                                               "sums": checksums of the weights, by leaf, "loop":
                                               digest of that item, "seal": digest of this one
                                               but for "best", and what else the run said about
                                               itself}
    <workdir>/checkpoints/<step>/training      item of StandardSave: the rest of TrainState, and
                                               checksums of all arrays
    <workdir>/checkpoints/<step>/loop          item of JsonSave: what the loop remembers

The weights to take from a run are those of the largest step whose description says `best`, or of
the largest step if none does (`run_folders.chosen_step`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import distillspec_jax
from distillspec_jax import hosts
from distillspec_jax.errors import UserError, first_line
from distillspec_jax.models.fingerprint import checksums
from distillspec_jax.run_folders import (
    FOLDER,
    FORMAT,
    SUMS,
    check_digest,
    digest,
    drop_unfinished_reads,
    mark_best,
    saved_steps,
    sealed,
    unsealed,
)
from distillspec_jax.training.state import TrainState

IDENTITY = ("model", "vocabulary_fingerprint", "optimizer")  # must agree for a run to go on
ITEMS = ("params", "training", "description", "loop")
SMALL = 2**28  # bytes of a state below which Orbax's bookkeeping takes longer than a copy

# How a ValueError of TensorStore begins where the system failed, not the file.
_NO_DAMAGE = (
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL"),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
)

# What the input can mend, as the system and TensorStore word it.
_NO_WRITING = re.compile(
    "No space left|quota exceeded|RESOURCE_EXHAUSTED|permission.denied"
    "|Operation not permitted|Read-only file system|Not a directory|No such file",
    re.IGNORECASE,
)

_Read = tuple[Any, dict[str, Any], dict[str, Any]]  # params, the rest of the state, memory


class _Manager(ocp.CheckpointManager):
    """Leaves it to the loop to ask JAX whether to stop.

    Asked here as well, behind the steps and of an older one, JAX would agree on a step that the
    loop has passed, and no host would ever stop.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """Saves and restores a run below `<workdir>/checkpoints`; see the layout above."""

    def __init__(
        self, workdir: Path, description: Mapping[str, Any], *, keep_last: int = 2
    ) -> None:
        """Opens the folder. `description` is JSON: "model", "vocabulary_fingerprint" and more.

        Kept are the `keep_last` newest checkpoints and the best one.
        """
        self._folder = workdir.absolute() / FOLDER
        self._aside = self._folder.parent / "damaged"
        self._description = json.loads(json.dumps(description))  # tuples become lists, as stored
        self._best = _KeepStep()
        self._clerk = ThreadPoolExecutor(1, "checkpoints")
        self._filing: Future[Any] | None = None
        newest = checkpoint_managers.LatestN(keep_last)
        hosts.on_first(lambda: self._folder.mkdir(parents=True, exist_ok=True))
        # Orbax lets processes that it is told by number meet at their coordinator, others in a
        # program on the devices, which has to keep its place among the steps
        together = set(range(jax.process_count())) if jax.process_count() > 1 else None
        self._manager = _Manager(
            self._folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=together
                ),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, self._best]),
                cleanup_tmp_directories=True,  # what a killed save left behind
            ),
        )

    def save(self, state: TrainState, memory: Mapping[str, Any], *, best: bool = False) -> None:
        """Saves `state` and the loop's `memory` (JSON); returns when the arrays are copied.

        Writing goes on behind; an error of it is raised by the next call of this object. So does
        Orbax's bookkeeping, half a millisecond an array, if the state is small.
        """
        self.wait()  # a death loses no more than this save and the steps since
        step = int(state.step)
        if best:
            self._best.step = step
        if step in self._manager.all_steps():
            if best:  # it was saved before it could be evaluated
                hosts.on_first(lambda: mark_best(self._folder / str(step)))
            return
        params, training = _split(state)
        training["checksums"] = checksums((params, training))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, training)))
        is_small = size <= SMALL
        if is_small:
            params, training = _copy((params, training))  # the next step takes the state's memory
        description = self._describe(step, best)
        file = functools.partial(self._file, params, training, description, dict(memory))
        if is_small:
            self._filing = self._clerk.submit(file)
        else:
            with self._told():
                file()

    def _file(
        self, params: Any, training: Any, description: dict[str, Any], memory: dict[str, Any]
    ) -> None:
        sums = np.asarray(training["checksums"])[: len(jax.tree.leaves(params))]
        description[SUMS] = sums.tolist()
        description["loop"] = digest(memory)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            description=ocp.args.JsonSave(sealed(description)),
            loop=ocp.args.JsonSave(memory),
        )
        self._manager.save(description["step"], args=args)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint in the structure of `state`, and the loop's memory.

        None if the run has saved nothing yet; else the arrays of `state` are freed first: a
        device need not hold two states. A damaged checkpoint is put aside, said loudly, and the
        one before is taken; UserError if all are damaged or if they belong to another run. What
        shows no damage (no memory, a file system that fails) is raised and moves nothing.
        """
        # what another host sees of a shared folder may be older
        steps = hosts.of_first(sorted(self._manager.all_steps(), reverse=True))
        shapes = _abstract(state)
        if steps:
            for leaf in jax.tree.leaves(state):
                leaf.delete()
        for step in steps:
            restored, reason = self._restore_step(step, shapes)
            if restored is not None:
                self._best.step = restored[1].get("best_step", -1)
                return restored
            drop_unfinished_reads()
            hosts.on_first(functools.partial(self._put_aside, step, reason))
            self._manager.reload()
        if self._aside.is_dir() and any(self._aside.iterdir()):  # also those of earlier starts
            raise UserError(
                f"all checkpoints in {self._folder} are damaged (they are kept in {self._aside}); "
                "start again in another workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._settle()
        with self._told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        try:
            self._settle()
        finally:
            self._clerk.shutdown()
            with self._told():
                self._manager.close()

    def _settle(self) -> None:
        """Waits for the bookkeeping of the save before, and raises its error."""
        filing, self._filing = self._filing, None
        if filing is not None:
            with self._told():
                filing.result()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what a full or closed disk makes Orbax raise, now or behind, into one sentence.

        A fault of the file system that may pass is no bad input: the job may start again.
        """
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's are ValueError
            if hosts.is_of_engine(error) or not _NO_WRITING.search(str(error)):
                raise
            whole = saved_steps(self._folder)
            kept = f"the one of step {whole[-1]} is whole" if whole else "there is none before it"
            raise UserError(
                f"a checkpoint could not be saved in {self._folder} ({first_line(error)}); "
                f"{kept}; make room or allow writing, then start the same command again"
            ) from error

    def _describe(self, step: int, best: bool) -> dict[str, Any]:
        versions = {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "distillspec_jax": distillspec_jax.__version__,
        }
        own = {"step": step, "best": best, "format": FORMAT, "versions": versions}
        return self._description | own

    def _restore_step(
        self, step: int, shapes: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """What the checkpoint of a step holds, None on all hosts if one finds it damaged; and why.

        Reading is each host's own; what is computed of it is asked of all of them.
        """
        read, reason = self._read_whole(step, shapes)
        if not hosts.all_true(read is not None):
            return None, reason
        assert read is not None
        params, training, memory = read
        wrong = _contradiction(step, params, training)
        if not hosts.all_true(not wrong):
            return None, wrong or reason
        return (_join(shapes, params, training), memory), ""

    def _read_whole(self, step: int, shapes: TrainState) -> tuple[_Read | None, str]:
        """What the checkpoint of a step holds, None if that is damaged; and why it may be so."""
        try:
            return self._read_step(step, shapes), "another host could not read it"
        except UserError:
            raise
        except Exception as error:
            cause = _cause(error)
            if _shows_damage(cause):
                return None, first_line(cause)
            place = self._folder / str(step)
            if isinstance(cause, PermissionError) or str(cause).startswith("PERMISSION_DENIED"):
                drop_unfinished_reads()
                raise UserError(
                    f"checkpoint {place} may not be read ({first_line(cause)}); allow reading, "
                    "then start the same command again"
                ) from error
            error.add_note(f"checkpoint {place} was not read; nothing says that it is damaged")
            raise

    def _read_step(self, step: int, shapes: TrainState) -> _Read:
        """Reads without a word to other hosts: one that fails here would leave them waiting."""
        place = self._folder / str(step)
        description, memory = unsealed(_json(place / "description")), _json(place / "loop")
        self._check_identity(step, description)
        check_digest(memory, description.get("loop"))
        params, training = _split(shapes)
        sums = (len(jax.tree.leaves((params, training))),)
        training["checksums"] = jax.ShapeDtypeStruct(
            sums, jnp.uint32, sharding=shapes.step.sharding
        )
        found = _arrays(place / "params", params), _arrays(place / "training", training), memory
        if SUMS not in description:  # of an earlier version, which summed in another way
            found[1]["checksums"] = None
        return found

    def _check_identity(self, step: int, stored: Mapping[str, Any]) -> None:
        place = self._folder / str(step)
        if stored["format"] > FORMAT:
            raise UserError(
                f"checkpoint {place} has format {stored['format']}, this version of "
                f"distillspec_jax reads up to {FORMAT}; install the version that wrote it: "
                f"{stored['versions']['distillspec_jax']}"
            )
        for key in IDENTITY:
            mine, theirs = self._description.get(key), stored.get(key)
            if mine != theirs:
                raise UserError(
                    f"checkpoint {place} belongs to another run: its {key} is {theirs}, "
                    f"this run's is {mine}; use another workdir"
                )
        mine, theirs = (each.get("sources", {}) for each in (self._description, stored))
        for name in mine.keys() & theirs.keys():
            if mine[name] != theirs[name]:
                raise UserError(
                    f"checkpoint {place} was made with another {name}: what its path leads to has "
                    "changed since; put that back, or use another workdir"
                )

    def _put_aside(self, step: int, reason: str) -> None:
        self._aside.mkdir(exist_ok=True)
        place = self._aside / str(step)
        shutil.rmtree(place, ignore_errors=True)
        print(
            f"warning: the checkpoint of step {step} is damaged ({reason}); it is moved to {place} "
            "and the one before is used",
            file=sys.stderr,
            flush=True,
        )
        shutil.move(self._folder / str(step), place)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class _KeepStep(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of one step, which may change."""

    step = -1

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _json(place: Path) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler()
    try:
        return handler.restore(place, ocp.args.JsonRestore())
    finally:
        handler.close()


def _arrays(place: Path, shapes: Any) -> Any:
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(place, args=ocp.args.StandardRestore(shapes))
    finally:
        handler.close()


def _contradiction(step: int, params: Any, training: dict[str, Any]) -> str:
    """Why the arrays are not those that were saved at `step`, '' if they are; takes the sums out.

    To be asked on all hosts: the sums are over whole arrays.
    """
    stored = training.pop("checksums")
    if stored is not None and not np.array_equal(checksums((params, training)), stored):
        return "the arrays do not have the checksums they were saved with"
    if int(training["step"]) != step:
        return f"it holds step {int(training['step'])}"
    return ""


def _cause(error: BaseException) -> BaseException:
    """What went wrong below a bare Exception, in which Orbax wraps errors of reading arrays."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _shows_damage(error: BaseException) -> bool:
    """Whether an error of reading is what cut, lost or changed files make Orbax raise."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    of_content = ValueError | LookupError | AttributeError | TypeError
    return isinstance(error, of_content) and not str(error).startswith(_NO_DAMAGE)


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The weights to hand out, and the rest of the state by name."""
    training = {
        "step": state.step,
        "seed": state.seed,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "opt_state": state.opt_state,
    }
    if state.average is not None:
        training["trained_params"] = state.params
    return state.averaged_params, training


def _join(state: TrainState, params: Any, training: dict[str, Any]) -> TrainState:
    if state.average is None:
        return state.replace(params=params, **training)
    trained = training.pop("trained_params")
    return state.replace(params=trained, average=params, **training)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
