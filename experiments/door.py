"""The door of every entrypoint: flags and config files come in, a frozen dataclass goes on.

An entrypoint is a frozen dataclass, a `main(config, workdir)` and `door.run(main, Config)`.
Below the door there are no flags and no ConfigDict; errors come out of it as one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import inspect
import io
import math
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

import distillspec_jax
from distillspec_jax import hosts
from distillspec_jax.errors import UserError, first_line
from experiments.schema import check_overrides, complete, flag_refused, flat, to_dataclass
from experiments.usage import default_of, usage

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "path of the config file", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for everything the run writes")

_PLAN = flags.DEFINE_bool(
    "plan", False, "say what each device would hold and compute, without allocating; then leave"
)
_MEMORY = flags.DEFINE_float(
    "device_memory_gib", None, "memory of a device: says whether the plan fits"
)

BAD_INPUT = 2
STOPPED = 143  # what a shell reports for SIGTERM: the job is saved but not done

INTERRUPTED = 130  # the same for Ctrl-C
UNREAD = 141  # and for a reader that leaves

_NO_ROOM, _NO_ACCESS = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_MENDS = {
    **dict.fromkeys(_NO_ROOM, "make room"),
    **dict.fromkeys(_NO_ACCESS, "allow access"),
    **dict.fromkeys(_NO_FOLDER, "give the path of a folder"),
}
_DOOR = ("config", "workdir", "plan", "device_memory_gib")


def run(
    main: Callable[[Any, Path], int | None],
    config_class: type,
    *,
    plan: Callable[[Any, float | None], int | None],
    on_hosts: bool = False,
) -> None:
    """Parses the flags into a `config_class`, calls `main(config, workdir)` and leaves.

    A UserError is printed as one sentence, exit code 2; a number that `main` returns is the
    exit code. A class whose fields all have defaults needs no --config. `plan(config, GiB of a
    device)` is what --plan calls instead. `on_hosts` says that `main` runs on several hosts.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        return _or_exit(lambda: _parse_flags(argv, config_class))

    def start(argv: Sequence[str]) -> None:
        del argv
        _open()
        config = _or_exit(lambda: to_dataclass(config_class, _CONFIG.value or {}, "config"))
        if _PLAN.value:
            sys.exit(_or_exit(lambda: plan(config, _MEMORY.value)))
        workdir = Path(str(_WORKDIR.value)).absolute()
        _or_exit(lambda: _join_hosts(workdir, on_hosts))
        if jax.distributed.is_initialized():
            _among_hosts(lambda: _or_exit(lambda: _check_alike(config)))
            sys.exit(_among_hosts(lambda: _or_exit(lambda: main(config, workdir))))
        sys.exit(_or_exit(lambda: main(config, workdir)))

    _run(start, parse)


def run_flags(
    main: Callable[[], int | None],
    *,
    plan: Callable[[float | None], int | None],
    has_workdir: bool = False,
) -> None:
    """The same for an entrypoint that has flags of its own in place of a config.

    `has_workdir` says that `main` reads --workdir; the door's --config is refused.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        return _or_exit(lambda: _parse_own_flags(argv, has_workdir))

    def start(argv: Sequence[str]) -> None:
        _open()
        if len(argv) > 1:
            print(f"error: '{argv[1]}' is not a flag; see --help", file=sys.stderr)
            sys.exit(BAD_INPUT)
        sys.exit(_or_exit(lambda: plan(_MEMORY.value) if _PLAN.value else main()))

    _run(start, parse)


def _run(start: Callable[[Sequence[str]], None], parse: Callable[..., list[str]]) -> None:
    """absl's `app.run`; Ctrl-C is answered from the first moment to the last."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    listens = is_main and before != signal.SIG_IGN  # as a shell starts a job in the background
    if listens:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        app.run(start, flags_parser=parse)
    finally:
        if listens:
            signal.signal(signal.SIGINT, before)


def _interrupted(number: int, frame: types.FrameType | None) -> None:
    """Leaves at once: an exception may come up in a callback of JAX's, where it is dropped.

    What is written whole is kept, locks go with the process. Loops that save listen themselves.
    """
    del number, frame
    with contextlib.suppress(RuntimeError):  # it came in the middle of a print
        sys.stdout.flush()
    shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides the cursor
    os.write(2, f"{shown}\nstopped; the same command goes on or starts again\n".encode())
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def raising_ctrl_c() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt: for a wait that it is to end, and nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open() -> None:
    _enable_compilation_cache()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that has no letter for a text
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no UTF-8 is told where it is read
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs each save, and errors it raises


def _join_hosts(workdir: Path, on_hosts: bool) -> None:
    if not on_hosts and not hosts.is_one_host():
        raise UserError(
            f"this entrypoint runs on one host, and DISTILLSPEC_HOSTS is "
            f"'{os.environ['DISTILLSPEC_HOSTS']}'; start it on one, without that variable "
            "(finetune and distill run on several)"
        )
    hosts.initialize(workdir)


def _check_alike(config: Any) -> None:
    """Refuses hosts that would not do the same: they would wait for each other for ever."""
    hosts.check_same(
        {
            "the kind of run": type(config).__name__,
            "the version of distillspec_jax": distillspec_jax.__version__,
            "the version of jax": jax.__version__,
            **flat(dataclasses.asdict(config), "config."),
        }
    )


def _among_hosts(action: Callable[[], Any]) -> Any:
    """Does `action` in one of several processes; an error ends this one at once.

    Not by sys.exit: at exit JAX waits for the others, and they wait for this one.
    """
    try:
        return action()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException as error:
        code = hosts.failed(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _or_exit(action: Callable[[], Any]) -> Any:
    try:
        result = action()
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # who read what is said has left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(UNREAD)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not hosts.is_out_of_memory(error) or jax.distributed.is_initialized():
            raise  # of several hosts the one that has too little is named
        print(
            f"error: this does not fit into memory ({first_line(error)}); --plan says what is "
            "needed and which option makes it less",
            file=sys.stderr,
        )
    except OSError as error:
        right = _MENDS.get(error.errno or 0)
        if right is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}; {right} or choose another place", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _parse_flags(argv: Sequence[str], config_class: type) -> list[str]:
    """absl's parser, but bad flags come out as UserError, and defaults can be overridden."""
    _leave_if_asked_for_help(argv, _DOOR, config_class)
    check_overrides(argv, config_class)
    files = [arg for arg in argv[1:] if re.match(r"--?config(=|$)", arg)]
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times ({' '.join(files)}); give it once")
    if not files:
        if any(
            default_of(field) is dataclasses.MISSING for field in dataclasses.fields(config_class)
        ):
            raise UserError("--config=FILE.py is missing; see --help")
        argv = [argv[0], "--config=", *argv[1:]]  # absl knows no --config.KEY without
    flags.FLAGS["config"].parser = _ConfigParser(config_class, is_given=bool(files))
    rest = _parsed(argv, config_class)
    _check_memory()
    if not _WORKDIR.value and not _PLAN.value:
        raise UserError("--workdir=FOLDER is missing; see --help")
    if "://" in str(_WORKDIR.value):
        raise UserError(
            f"--workdir={_WORKDIR.value} is an address, must be a folder: mount the bucket on all "
            "hosts, as the heads of launch/tpu_pod.sh and launch/gke_jobset.yaml say"
        )
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is not a flag; flags are --config, --config.KEY, --workdir")
    return rest


def _parse_own_flags(argv: Sequence[str], has_workdir: bool) -> list[str]:
    """The parser of `run_flags`: nothing that the door defines is taken and not looked at."""
    _leave_if_asked_for_help(argv, _DOOR[1 if has_workdir else 2 :])
    given = [match[1] for arg in argv[1:] if (match := re.match(r"--?([a-z_]+)", arg))]
    for name in ("config", *(() if has_workdir else ("workdir",))):
        if name in given:
            raise UserError(f"this entrypoint takes no --{name}; see --help for its own flags")
    rest = _parsed(argv)
    _check_memory()
    return rest


def _leave_if_asked_for_help(
    argv: Sequence[str], names: Sequence[str], config_class: type | None = None
) -> None:
    if any(arg in ("-h", "-help", "--help", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(usage(names, config_class), flush=True)
        sys.exit(0)


def _check_memory() -> None:
    if _MEMORY.value is not None and not _PLAN.value:
        raise UserError("--device_memory_gib belongs to --plan; give both, or neither")
    if _MEMORY.value is not None and not 0 < _MEMORY.value < math.inf:
        raise UserError(f"--device_memory_gib is {_MEMORY.value}, must be a finite number above 0")


def _parsed(argv: Sequence[str], config_class: type | None = None) -> list[str]:
    """absl's parser; a shell leaves the ~ of --flag=~/folder as it is, and no prompt is a path."""
    home = os.path.expanduser("~")
    path = re.compile(r"(--?(?!prompt=|config\.prompt=)[\w.]+=)~(?=/|$)")
    try:
        return flags.FLAGS([path.sub(lambda flag: flag[1] + home, arg) for arg in argv])
    except flags.Error as error:
        if isinstance(error.__context__, UserError):  # absl wraps what a parser raises
            raise error.__context__ from None
        raise flag_refused(str(error), config_class) from error


class _ConfigParser(flags.ArgumentParser):
    """Calls get_config of `FILE.py` or `FILE.py:ARGUMENT`, and completes what it returns.

    Not ml_collections' own parser: that one hides a file that is missing until it is used, and
    loads it by means that Python is about to drop.
    """

    def __init__(self, config_class: type, *, is_given: bool) -> None:
        self._config_class, self._is_given = config_class, is_given

    def parse(self, path: str) -> ConfigDict:
        if not self._is_given:
            complete(config := ConfigDict(), self._config_class)
            return config
        file, *argument = path.split(":", 1)
        get_config = _load_module(file).get_config
        try:
            inspect.signature(get_config).bind(*argument)
        except TypeError:
            wrong = f"takes no options: leave ':{argument[0]}' out" if argument else "needs options"
            raise UserError(f"{file} {wrong} (--config)") from None
        config = get_config(*argument)
        if not isinstance(config, ConfigDict):
            raise UserError(f"get_config() of {file} returns no ConfigDict")
        complete(config, self._config_class)
        return config


def _load_module(file: str) -> types.ModuleType:
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file} (--config)")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} (--config) is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg} (--config)") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} (--config) has no function get_config")
    return module


def _enable_compilation_cache() -> None:
    """Keeps compiled programs below the user's cache folder: a second start is quick."""
    with contextlib.suppress(RuntimeError):  # the user has no home, so there is none
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "distillspec_jax" / "xla"))
