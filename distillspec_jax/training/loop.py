"""The loop around the step, the same for fine-tuning and for distillation."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax import hosts
from distillspec_jax.errors import UserError, check_count, unknown_name
from distillspec_jax.progress import Progress
from distillspec_jax.training.checkpoints import Checkpoints
from distillspec_jax.training.metrics import Writer
from distillspec_jax.training.state import TrainState

TOKENS = "target_length"  # (tokens, rows): its sum over the time is the speed of training


class Batch(Protocol):
    """What the loop itself needs of a batch."""

    @property
    def example_ids(self) -> np.ndarray: ...


StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]]


Figures = dict[str, Any]  # numbers, and [low, high] of their intervals


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When to log, evaluate, save and stop; 0 steps: no records, the rest at the ends."""

    log_every: int = 50
    evaluate_every: int = 500  # also before the first and after the last step
    save_every: int = 500
    keep_last: int = 2
    best_metric: str = ""  # of the evaluation; "" keeps no best checkpoint
    best_mode: str = "max"
    patience: int = 0  # evaluations without a new best before stopping early
    max_skipped: int = 5  # updates in a row that may be left out for a gradient not finite

    def __post_init__(self) -> None:
        if self.best_mode not in ("max", "min"):
            raise unknown_name("best_mode", self.best_mode, ("max", "min"), "the loop")
        if self.patience and not self.best_metric:
            raise UserError("patience needs best_metric, the figure that has to improve")
        if self.patience and not self.evaluate_every:
            raise UserError("patience counts evaluations, and evaluate_every is 0: set it, too")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 0:
                raise UserError(f"{field.name} is {value}, must not be negative")
        for name in ("keep_last", "max_skipped"):
            check_count(name, getattr(self, name))


@dataclasses.dataclass
class Memory:
    """What the loop knows beside the state; saved with it, so that logs resume exactly, too."""

    best_step: int = -1
    best_value: float | None = None
    best_evaluation: Figures = dataclasses.field(default_factory=dict)
    evaluations_since_best: int = 0
    evaluated_step: int = -1
    first_evaluation: Figures = dataclasses.field(default_factory=dict)
    evaluation: Figures = dataclasses.field(default_factory=dict)
    window: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # sum, count
    window_seconds: float = 0.0
    window_tokens: float = 0.0  # of the steps in `window_seconds`
    seconds: float = 0.0  # spent in steps, all starts together
    compile_seconds: float = 0.0  # spent in the first step of each start, which is compiled


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    `ended` is "finished", "early" (no improvement) or "signal" (asked to stop, all is saved).
    """

    state: TrainState
    ended: str
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run does beside its steps.

    evaluate: state -> figures (floats, and [low, high] for intervals); called before the first
      step, every `evaluate_every`, at the end.
    learning_rate: updates before -> rate, only to log it.
    notice: figures of a training record -> a line to say, if something is wrong with them.
    place: puts a batch on the devices.
    """

    evaluate: Callable[[TrainState], Figures] | None = None
    learning_rate: Callable[[int], Any] | None = None
    notice: Callable[[Figures], str | None] | None = None
    place: Callable[[Any], Any] = jax.device_put


NO_HOOKS = Hooks()


def train(
    step_fn: StepFn,
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    config: LoopConfig,
    *,
    steps: int,
    checkpoints: Checkpoints,
    writer_of: Callable[[int, int], Writer],
    hooks: Hooks = NO_HOOKS,
    name: str = "train",
) -> Result:
    """Runs `step_fn` until `steps` steps are taken, from the newest checkpoint if there is one.

    Args:
      step_fn: `(state, batch) -> (state, {name: (sum, count)})`, jitted; may donate `state`.
      state: the state before the first step (its structure also shapes what is restored); it is
        given away: to the first step, or freed for a checkpoint.
      batches: step -> iterator of the batches of that step and the following ones.
      writer_of: (resumed step, last step evaluated until then) -> writer of the records (-1: a
        new run).
      hooks: what to do between steps.
      name: of the run, in what is printed.

    While a step runs, the metrics of the step before are read: the host never waits for the
    newest step, except for the first one and before an evaluation and a save.

    Raises:
      UserError: updates were left out `max_skipped` times in a row, or the data ended.
    """
    memory, resumed = Memory(), -1
    restored = checkpoints.restore(state)
    if restored is not None:
        state, memory = restored[0], Memory(**restored[1])
        resumed = int(state.step)
    step = max(resumed, 0)
    with (
        writer_of(resumed, memory.evaluated_step) as writer,
        Progress(name, steps, done=step, silent=not hosts.is_first()) as progress,
        _StopRequest() as stop,
    ):
        if resumed >= 0:
            progress.say(f"{name}: goes on from the checkpoint of step {resumed}")
        loop = _Loop(config, memory, writer, progress, checkpoints, hooks)
        loop.between_steps(state, step, last=step >= steps)
        stream = batches(step) if step < steps else iter(())
        is_asked = stop.is_asked(step)
        while step < steps and not is_asked and not loop.is_stale:
            batch = _next(stream, step)
            state, metrics = step_fn(state, hooks.place(batch))
            step += 1
            loop.took_step(step, batch, metrics, state)
            # before an evaluation, which may take longer than the notice; the next start makes it
            is_asked = step < steps and stop.is_asked(step)
            if not is_asked:
                loop.between_steps(state, step, last=step >= steps)
        ended = "finished" if step >= steps else "signal" if stop.asked else "early"
        loop.finish(state, step)
    return Result(state, ended, loop.memory)


def _next(stream: Iterator[Any], step: int) -> Any:
    try:
        return next(stream)
    except StopIteration:
        raise UserError(f"the training data ended before step {step + 1}") from None


_Pending = tuple[int, Any, list[str], jax.Array]  # step, example ids, names, packed metrics


class _Loop:
    """The host's side of the loop: everything that is not the step itself."""

    def __init__(
        self,
        config: LoopConfig,
        memory: Memory,
        writer: Writer,
        progress: Progress,
        checkpoints: Checkpoints,
        hooks: Hooks,
    ) -> None:
        self.memory, self._progress = memory, progress
        self._config, self._writer, self._checkpoints = config, writer, checkpoints
        self._hooks = hooks
        self._pending: _Pending | None = None
        self._has_compiled = False
        self._is_warned = False
        self._clock = time.perf_counter()

    @property
    def is_stale(self) -> bool:
        patience = self._config.patience
        return 0 < patience <= self.memory.evaluations_since_best

    def took_step(self, step: int, batch: Batch, metrics: Any, state: TrainState) -> None:
        """Notes the step just started, and reads what the one before gave."""
        # Not the counters themselves: they are donated to the next step.
        packed = _pack(metrics, state.skipped, state.skipped_in_row)
        packed.copy_to_host_async()
        before, self._pending = self._pending, (step, batch.example_ids, sorted(metrics), packed)
        self._read(before)
        if not self._has_compiled:  # its time is told apart
            self._flush()

    def between_steps(self, state: TrainState, step: int, *, last: bool) -> None:
        """Evaluates and saves if it is time to."""
        is_best = False
        every = self._config.evaluate_every
        if self._hooks.evaluate and (last or step == 0 or (every and step % every == 0)):
            is_best = self._evaluate_now(state, step)
        every = self._config.save_every
        if last or self.is_stale:
            self._log_rest(state, step)
        if last or is_best or (every and step and step % every == 0):
            self._save(state, best=is_best)

    def finish(self, state: TrainState, step: int) -> None:
        self._save(state, best=self.memory.best_step == step)
        self._checkpoints.wait()

    def _save(self, state: TrainState, *, best: bool) -> None:
        self._flush()
        self._writer.keep()  # no checkpoint without the records before it
        self._checkpoints.save(state, dataclasses.asdict(self.memory), best=best)
        self._clock = time.perf_counter()

    def _flush(self) -> None:
        before, self._pending = self._pending, None
        self._read(before)

    def _read(self, pending: _Pending | None) -> None:
        """Waits for a step's metrics, adds them up and writes the record when it is time to."""
        if pending is None:
            return
        step, example_ids, names, packed = pending
        *pairs, (skipped, skipped_in_row) = np.asarray(packed).tolist()
        metrics = dict(zip(names, pairs, strict=True))
        self._spend(metrics.get(TOKENS, (0.0, 0.0))[0])
        self._stop_if_diverged(step, example_ids, int(skipped_in_row))
        for key, pair in metrics.items():
            old = self.memory.window.get(key, [0.0, 0.0])
            # a loss that is not finite belongs to an update that is skipped, and is counted there
            added = pair if np.isfinite(pair).all() else (0.0, 0.0)
            self.memory.window[key] = [old[0] + added[0], old[1] + added[1]]
        self._progress.update(step, self._status(metrics))
        if self._config.log_every and step % self._config.log_every == 0:
            self._log(step, int(skipped))
            memory = self.memory
            memory.window, memory.window_seconds, memory.window_tokens = {}, 0.0, 0.0

    def _spend(self, tokens: float) -> None:
        """Counts the time since the clock was read last, and the tokens trained on in it."""
        memory, now = self.memory, time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._has_compiled:
            memory.seconds += seconds
            memory.window_seconds += seconds
            memory.window_tokens += tokens
        else:
            memory.compile_seconds += seconds
        self._has_compiled = True

    def _log_rest(self, state: TrainState, step: int) -> None:
        """Writes the record of the steps since the last one, at the end of a run.

        They stay in memory: should the run get more steps, the next record is as if it had not
        ended here. A start that finds the run at its end may say them again: the writer has them.
        """
        self._flush()
        if self._config.log_every and self.memory.window:
            self._log(step, int(state.skipped))

    def _log(self, step: int, skipped: int) -> None:
        memory = self.memory
        values = {
            key: total / count if count else math.nan
            for key, (total, count) in memory.window.items()
        }
        if memory.window_tokens:
            values["tokens_per_second"] = memory.window_tokens / memory.window_seconds
        values["seconds"], values["compile_seconds"] = memory.seconds, memory.compile_seconds
        values["skipped_updates"] = skipped
        if self._hooks.learning_rate is not None:
            updates = max(step - skipped, 1)  # the schedule counts those alone
            values["learning_rate"] = float(self._hooks.learning_rate(updates - 1))
        self._writer.write("train", step, values)
        line = self._hooks.notice(values) if self._hooks.notice else None
        if line and not self._is_warned:  # once, until it was well again
            self._progress.say(f"step {step}: {line}")
        self._is_warned = bool(line)

    def _status(self, metrics: Mapping[str, Any]) -> str:
        parts = []
        if "loss" in metrics:
            total, count = metrics["loss"]
            parts.append(f"loss {total / max(count, 1.0):.4g}")
        if self.memory.window_tokens:
            rate = self.memory.window_tokens / self.memory.window_seconds
            parts.append(f"{rate:,.0f} tokens/s")
        return ", ".join(parts)

    def _stop_if_diverged(self, step: int, example_ids: Any, skipped_in_row: int) -> None:
        if skipped_in_row < self._config.max_skipped:
            return
        self._checkpoints.wait()
        raise UserError(
            f"the gradient was not finite in {skipped_in_row} steps in a row, "
            f"{step - skipped_in_row + 1} to {step} (examples of step {step}: "
            f"{np.asarray(example_ids).tolist()}); none of them changed a weight; look at these "
            "examples, or go on in another workdir from the weights of this one with a lower "
            "config.optimizer.learning_rate"
        )

    def _evaluate_now(self, state: TrainState, step: int) -> bool:
        """Evaluates unless that was done before a restart; says if this is the best so far."""
        memory = self.memory
        if memory.evaluated_step == step:
            return memory.best_step == step
        self._flush()
        assert self._hooks.evaluate is not None
        values = {key: _plain(value) for key, value in self._hooks.evaluate(state).items()}
        self._writer.write("eval", step, values)
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        figures = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self._progress.say(f"step {step}: {figures}")
        memory.evaluated_step, memory.evaluation = step, values
        memory.first_evaluation = memory.first_evaluation or values
        self._clock = time.perf_counter()
        return self._is_new_best(step, values)

    def _is_new_best(self, step: int, values: Figures) -> bool:
        name = self._config.best_metric
        if not name:
            return False
        numbers = [key for key, value in values.items() if isinstance(value, float)]
        if name not in numbers:
            raise unknown_name("best_metric", name, numbers, "the loop")
        memory, value = self.memory, values[name]
        sign = 1 if self._config.best_mode == "max" else -1
        # NaN is greater than nothing, so it is never the best.
        is_best = sign * value > (
            -math.inf if memory.best_value is None else sign * memory.best_value
        )
        if is_best:
            memory.best_step, memory.best_value = step, value
            memory.best_evaluation, memory.evaluations_since_best = dict(values), 0
        else:
            memory.evaluations_since_best += 1
        return is_best


def _plain(value: Any) -> float | list[float]:
    """What JSON can hold, of a number or an interval of any library."""
    return [float(each) for each in value] if np.ndim(value) else float(value)


@jax.jit
def _pack(
    metrics: dict[str, tuple[jax.Array, jax.Array]], skipped: jax.Array, skipped_in_row: jax.Array
) -> jax.Array:
    """One array to read instead of twenty: sums and counts by name, then the two counters."""
    pairs = [*(metrics[name] for name in sorted(metrics)), (skipped, skipped_in_row)]
    return jnp.array(pairs, jnp.float32)  # counters are exact up to 2**24


class _StopRequest:
    """Turns the first SIGTERM or SIGINT into a wish to stop; the second one acts as always.

    Of several hosts one may be told and the others not: there JAX listens for SIGTERM, and has
    them all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._alone = jax.process_count() == 1
        self._before: dict[int, Any] = {}

    def is_asked(self, step: int) -> bool:
        if not self._alone and not self.asked:
            self.asked = hosts.asked_to_stop(step)
        return self.asked

    def __enter__(self) -> _StopRequest:
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = True
        for each, handler in self._before.items():
            signal.signal(each, handler)
