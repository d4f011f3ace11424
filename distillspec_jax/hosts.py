"""Several processes as one job: how they find each other, and what only the first one does.

The engine is `jax.distributed`; it also ends the others when one dies, and names it. What it does
not say is who was missing at the start, so every host leaves a file in the job's folder while it
waits for the others. Later, a host that lives but does not come is named where all of them meet:
`on_first`, `all_true`, `check_same` and `fetch`.

    DISTILLSPEC_HOSTS          number of processes, or `auto` where JAX detects the cluster itself
                               (Slurm, TPU pods, GKE); unset: this process alone
    DISTILLSPEC_HOST           number of this process, where DISTILLSPEC_HOSTS is a number
    JAX_COORDINATOR_ADDRESS    host:port of process 0, where DISTILLSPEC_HOSTS is a number
    DISTILLSPEC_HOSTS_TIMEOUT  seconds to wait for a host, wherever all meet or if it falls silent
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from distillspec_jax import cluster
from distillspec_jax.errors import UserError, first_line

FAILED = 1  # exit code: an error of this host's own
LOST = 75  # exit code: another host is missing or died; the job may be started again
ARRIVALS = ".hosts"  # in the job's folder: one file per host that waits for the others
SHARED = "shared"  # in there: a file of the first host, for the others to see
_SPOKEN_BEFORE = 30.0  # seconds that this module's time limit is ahead of the engine's own
_SEEN_SECONDS = 20.0  # until a new file is seen on all hosts: caches of network file systems
_ADDRESS = re.compile(r"\S+:\d{1,5}")
_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_COMMUNICATION = re.compile(
    "^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED)"
    "|gloo|nccl|communicator|connection|heartbeat|coordination",
    re.IGNORECASE,
)
_meetings = itertools.count()  # the same number in all processes: they all come to all meetings


def initialize(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes that the environment speaks of; nothing to do for one alone.

    Ends the process with exit code LOST and a message that names the hosts that are missing, if
    they are not all there in time. Raises UserError for an environment that makes no sense and for
    a `folder` that is none, or not the same one for all hosts.
    """
    count = environment.get("DISTILLSPEC_HOSTS", "")
    if is_one_host(environment):
        return
    limit = _limit(environment)
    arguments: dict[str, Any] = {}
    if count == "auto":
        me, expected = cluster.detected(environment)
    else:
        expected = cluster.number(environment, "DISTILLSPEC_HOSTS", least=1)
        index = cluster.number(environment, "DISTILLSPEC_HOST", least=0)
        address = environment.get("JAX_COORDINATOR_ADDRESS", "")
        if index >= expected or not _ADDRESS.fullmatch(address):  # the engine would break on it
            raise UserError(
                f"host {index} of {expected} needs DISTILLSPEC_HOST below DISTILLSPEC_HOSTS, and "
                "JAX_COORDINATOR_ADDRESS (host:port of host 0)"
            )
        if index == 0:
            _check_port(int(address.rpartition(":")[2]))
        arguments = {"num_processes": expected, "process_id": index}
        me = str(index)
    if folder.is_file():
        raise UserError(f"{folder} is a file, must be a folder that all hosts see")
    arrivals = folder / ARRIVALS
    arrivals.mkdir(parents=True, exist_ok=True)
    (arrivals / SHARED).unlink(missing_ok=True)  # of a start that was ended
    (arrivals / me).write_text("")
    patience = threading.Timer(limit, _give_up, [arrivals, me, expected, limit])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(limit + _SPOKEN_BEFORE),
            heartbeat_timeout_seconds=limit,
        )
    except ValueError as error:  # of arguments that JAX was to find
        if count != "auto":
            raise
        _take_away(arrivals / me, arrivals, folder)
        raise UserError(
            f"DISTILLSPEC_HOSTS is 'auto', and JAX detects no cluster here ({error}); give the "
            "number of hosts, or leave it out on one host"
        ) from error
    finally:
        patience.cancel()
    (arrivals / me).unlink(missing_ok=True)  # all are here; a restart must not take it for new
    _check_shared(folder, min(_SEEN_SECONDS, limit / 2))


def _check_port(port: int) -> None:
    """Refuses a port that this host cannot listen on: there the engine breaks, or crashes."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"host 0 cannot listen on port {port} of JAX_COORDINATOR_ADDRESS ({error}); give one "
            "that is free there, the same on all hosts"
        ) from error


def is_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment speaks of no other process, as far as it says a number."""
    count = environment.get("DISTILLSPEC_HOSTS", "")
    if count == "auto":
        return cluster.detected(environment)[1] == 1
    return count in ("", "1")


def _check_shared(folder: Path, patience: float) -> None:
    """Refuses a folder that only looks the same: each host would wait for files of the others."""
    sign = folder / ARRIVALS / SHARED
    on_first(lambda: sign.write_text(""))
    ends = time.monotonic() + patience
    while not sign.exists() and time.monotonic() < ends:
        time.sleep(0.5)
    is_shared = all_true(sign.exists())
    on_first(lambda: sign.unlink(missing_ok=True))
    if not is_shared:
        raise UserError(
            f"--workdir={folder} is not one folder that all hosts see; give a place on a file "
            "system that they share"
        )


def _take_away(*paths: Path) -> None:
    """Removes a file and, if nothing else is in them, the folders it was put into."""
    with contextlib.suppress(OSError):
        for path in paths:
            path.rmdir() if path.is_dir() else path.unlink()


def _limit(environment: Mapping[str, str]) -> int:
    return cluster.number(environment, "DISTILLSPEC_HOSTS_TIMEOUT", "300", least=1)


def _give_up(arrivals: Path, me: str, expected: int | None, limit: float) -> None:
    try:
        why = _missing(arrivals, me, expected, limit)
    except OSError as error:  # the others met at this moment, and took their files away
        why = f"not all hosts came within {limit:g} seconds ({error}); start all again"
    _leave(why)


def _leave(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(LOST)  # the engine's own wait cannot be interrupted


def _missing(arrivals: Path, me: str, expected: int | None, limit: float) -> str:
    """Who did not come. A file older than mine by the limit is of an earlier start: who waited
    since then has given up. One who was killed while waiting, within that time, counts as here.

    Ages are differences between times of one file server: no two clocks are compared.
    """
    newest = (arrivals / me).stat().st_mtime
    here = {p.name for p in arrivals.iterdir() if p.stat().st_mtime > newest - limit}
    if expected is None:
        return _late(f"only {', '.join(sorted(here))} came", limit)
    absent = [str(host) for host in range(expected) if str(host) not in here]
    return _late(_did_not_come(absent, expected), limit)


def _did_not_come(absent: Sequence[str], expected: int) -> str:
    if not absent:
        return f"not all of {expected} came"
    return f"host{'s' * (len(absent) > 1)} {', '.join(absent)} of {expected} did not come"


def _late(who: str, limit: float) -> str:
    return f"{who} within {limit:g} seconds; look at their logs, and start all again"


def is_of_engine(error: BaseException) -> bool:
    """Whether an error is JAX's own; a CPU's collectives fail by ValueError.

    Other errors may speak of connections, too.
    """
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return of_jax or str(error).startswith("UNKNOWN: Gloo")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or the engine found no memory, however its backend words it."""
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    return isinstance(error, MemoryError) or (of_jax and bool(_NO_MEMORY.search(str(error))))


def failed(error: BaseException, environment: Mapping[str, str] = os.environ) -> int:
    """Says why one of several processes failed; returns the exit code.

    Where the hosts lost each other it lets the engine name the one that died: that ends this
    process when the heartbeat is missed. The code is LOST if it does not.
    """
    text = str(error)[:500]
    of_engine = is_of_engine(error)
    if is_out_of_memory(error):
        print(
            f"error: host {jax.process_index()} is out of memory ({first_line(error)}); --plan "
            "says what each device holds and which option makes it less",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    if not (of_engine and _COMMUNICATION.search(text)):
        traceback.print_exception(error)
        return FAILED
    print(f"error: the hosts lost each other: {text}", file=sys.stderr, flush=True)
    time.sleep(_limit(environment) + 10)
    return LOST


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return jax.process_index() == 0


def _meet() -> None:
    """Returns when all processes are here; ends them with code LOST if one does not come in time.

    For before a collective, which has no time limit. The limit is for hosts to come, not for what
    devices still do: saves and evaluations of any length lie before it, in all hosts alike.
    """
    limit = _limit(os.environ)
    try:
        barrier = multihost.get_barrier_sync_fn()
        barrier(key=f"distillspec_meeting_{next(_meetings)}", timeout_ms=1_000 * limit)
    except jax.errors.JaxRuntimeError as error:
        _, named, names = str(error).partition("timed out task names:")
        if not named:
            raise
        absent = sorted(re.findall(r"^\d+$", names, re.MULTILINE), key=int)
        _leave(_late(_did_not_come(absent, jax.process_count()), limit))


def on_first(action: Callable[[], Any]) -> Any:
    """Does `action` in the first process alone; returns its result there, None elsewhere.

    Waits for it in all processes, no longer than for a host: it should be short. A UserError or
    OSError of it is raised in all of them, so that none goes on alone.
    """
    if jax.process_count() == 1:
        return action()
    _meet()
    result, error = None, None
    if is_first():
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = caught
    kind, told = of_first(_told(error))
    if error is not None:
        raise error
    if kind:
        raise OSError(*told) if kind == "system" else UserError(*told)
    return result


def _told(error: UserError | OSError | None) -> tuple[str, list[Any]]:
    """What kind of error it is, "" for none, and what makes another one like it."""
    if error is None:
        return "", []
    if not isinstance(error, OSError):
        return "user", [str(error)]
    if not error.strerror:
        return "system", [str(error)]
    return "system", [error.errno, error.strerror, str(error.filename or "") or None]


def of_first(value: Any) -> Any:
    """What the first process has, JSON, in all of them; all must ask."""
    return value if jax.process_count() == 1 else _from_all(value)[0]


def check_same(values: Mapping[str, Any]) -> None:
    """Raises UserError in all processes unless their values, JSON by name, are the same.

    What differs would have them take different steps, and wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    first, *others = _from_all(values)
    for host, theirs in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = (json.dumps(each.get(name)) for each in (first, theirs))
            if here != there:
                raise UserError(
                    f"the hosts were not started alike: {name} is {here} on host 0 and {there} on "
                    f"host {host}; start all with the same command, code and data"
                )


def _from_all(value: Any) -> list[Any]:
    """What every process has, in their order; JSON."""
    _meet()
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(mine.size))).ravel()
    padded = np.pad(mine, (0, sizes.max() - mine.size))
    texts = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]


def all_true(flag: bool) -> bool:
    """Whether the flag is true in every process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    _meet()
    return bool(np.all(multihost_utils.process_allgather(np.array([flag]))))


def fetch(tree: Any) -> Any:
    """The whole arrays on this host, wherever their rows lie; all processes must ask."""

    def is_here(leaf: Any) -> bool:
        return getattr(leaf, "is_fully_addressable", True)

    def whole(leaf: Any) -> np.ndarray:
        if is_here(leaf):
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    if not all(map(is_here, jax.tree.leaves(tree))):
        _meet()
    return jax.tree.map(whole, tree)


def asked_to_stop(step: int) -> bool:
    """Whether a process was told to stop (SIGTERM): true after the same step in all of them."""
    return multihost_utils.reached_preemption_sync_point(step)
