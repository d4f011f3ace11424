"""How `evaluate` fills its grid: block length, acceptance, clock, and the rows of figures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.decoding.autoregressive import Generation
from distillspec_jax.decoding.block_length import tune
from distillspec_jax.decoding.state import SpeculativeOutput
from distillspec_jax.evaluation import latency
from distillspec_jax.evaluation.acceptance import (
    Counts,
    TeacherForced,
    block_efficiency,
    blocks_along_texts,
)
from distillspec_jax.evaluation.intervals import Estimate
from distillspec_jax.evaluation.quality import pooled_quality
from distillspec_jax.models.config import ModelConfig
from distillspec_jax.progress import Progress
from experiments.bench import Bench, Draft, Prompts, Runner, Setting

Row = dict[str, Any]
# what the texts of the target alone say of token verification in whole blocks
OF_TARGET_TEXTS = ("acceptance_rate_overlap", "block_efficiency_path", "block_efficiency_iid")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one draft did on all prompts in one setting."""

    counts: Counts
    texts: list[str]
    greedy_mismatches: int | None


@dataclasses.dataclass(frozen=True)
class Results:
    """All figures of a grid.

    drafts: one row per draft, seed and setting. pooled: the same over the seeds of a name.
    gains: the last name over each other one, paired. records: for `metrics.jsonl`.
    """

    drafts: list[Row]
    pooled: list[Row]
    gains: list[Row]
    records: list[Row]

    def summary(self) -> Row:
        """The headline, flat: the last name's first row, and its gains at the same setting.

        The first lossless one, if there is any: gains are of lossless rows alone.
        """
        # rows begin with all names in their order; the last row may be any name's tuned gamma
        last_name = list(dict.fromkeys(row["name"] for row in self.pooled))[-1]
        rows = [row for row in self.pooled if row["name"] == last_name]
        headline = min(rows, key=lambda row: not row["lossless"])
        flat = {key: value for key, value in headline.items() if key != "seeds"}
        for gain in self.gains:
            key = f"{gain['figure']}_over_{gain['over']}_t{gain['temperature']:g}"
            if key not in flat:  # the first gamma's, as the row's
                flat |= {
                    key + end: gain["gain" + end] for end in ("", "_ci95") if "gain" + end in gain
                }
        return {**flat, "drafts": self.drafts, "pooled": self.pooled, "gains": self.gains}


def measure(bench: Bench) -> Results:
    """Runs the whole grid."""
    sizes = bench.config.timed_batch_sizes
    timed = sizes if bench.config.timed_prompts else ()
    costs = {size: _costs(bench, size) for size in timed or sizes[:1]}
    chosen, records = (
        _tune(bench, bench.tuning_prompts, costs) if bench.tuning_prompts else ({}, [])
    )
    settings = _settings(bench, chosen)
    measured, along = _decode(bench, settings)
    clocks = {size: _race(bench, settings, size) for size in timed}
    drafts: list[Row] = []
    pooled: list[Row] = []
    for setting in settings:
        cells = {draft.config.seed: measured[setting, draft] for draft in bench.seeds(setting.name)}
        for seed, cell in cells.items():
            drafts += _rows(bench, setting, {seed: cell}, costs, clocks)
        pooled += _rows(bench, setting, cells, costs, clocks)
    drafts = [{**row, "seed": row["seeds"][0]} for row in drafts]
    gains = _gains_in_tau(bench, measured)
    if chosen and clocks:
        for size, clock in clocks.items():
            of_size = {key[:2]: gamma for key, gamma in chosen.items() if key[2] == size}
            speeds = _gains_in_speed(bench, of_size, clock)
            gains += [{**gain, "batch_size": size} for gain in speeds]
    if bench.config.has_whole_blocks:
        records += _curves(bench, along, costs[sizes[0]])
    records += [{"kind": "draft", **row} for row in drafts]
    return Results(drafts, pooled, gains, records)


def _settings(bench: Bench, chosen: Mapping[TunedFor, int]) -> list[Setting]:
    """The grid in the order of the rows: temperature, gamma, lenience, name."""
    config = bench.config
    settings: dict[Setting, None] = {}  # a set that keeps the order
    for temperature in config.temperatures:
        lenience = config.lenience if temperature else (1.0,)  # at T = 0 nothing can be relaxed
        gammas = [(gamma, bench.names) for gamma in config.gammas]
        gammas += [(chosen[key], [key[0]]) for key in chosen if key[1] == temperature]
        for gamma, names in gammas:
            for name in names:
                for epsilon in lenience:
                    settings[Setting(name, temperature, gamma, epsilon)] = None
    return list(settings)


# --- costs, and the gamma of highest predicted speed ---------------------------------------------


Costs = Mapping[str, latency.StepCosts]  # by name of draft
TunedFor = tuple[str, float, int]  # name, temperature, batch size


def _costs(bench: Bench, batch_size: int) -> Costs:
    """Step costs at a timed batch size; the models' shape decides."""
    config = bench.config
    inputs = jnp.asarray(bench.prompts.inputs[:batch_size])

    @functools.cache
    def of_shape(shape: ModelConfig) -> latency.StepCosts:
        draft = next(d.loaded for d in bench.drafts if d.shape == shape)
        models = bench.target.model, bench.target.params, draft.model, draft.params
        return latency.step_costs(*models, inputs, {*config.gammas, *config.gamma_grid})

    return {name: of_shape(bench.seeds(name)[0].shape) for name in bench.names}


def _tune(
    bench: Bench, prompts: Prompts, costs: Mapping[int, Costs]
) -> tuple[dict[TunedFor, int], list[Row]]:
    """The gamma of highest predicted speed, on the tuning split: more rows want shorter blocks."""
    config = bench.config
    chosen: dict[TunedFor, int] = {}
    records: list[Row] = []
    runs = len(config.temperatures) * (1 + len(bench.drafts))
    with Progress("tune", runs * len(prompts.row_ids), unit="prompt") as progress:
        runner = Runner(bench, progress)
        for temperature in config.temperatures:
            texts = runner.plain(prompts, temperature)
            for name in bench.names:
                scored = [runner.along(prompts, d, temperature, texts) for d in bench.seeds(name)]
                for size, of_size in costs.items():
                    steps = of_size[name]
                    curve = {g: _prediction(scored, g, steps) for g in config.gamma_grid}
                    best = tune(
                        {gamma: row["block_efficiency_path"] for gamma, row in curve.items()},
                        steps.cost_ratio,
                        {gamma: row["verification_cost"] for gamma, row in curve.items()},
                    ).gamma
                    chosen[name, temperature, size] = best
                    about = {"kind": "tune", "name": name, "temperature": temperature}
                    about |= {"batch_size": size}
                    records += [{**about, **row, "chosen": g == best} for g, row in curve.items()]
    return chosen, records


def _curves(
    bench: Bench,
    along: Mapping[tuple[float, Draft], TeacherForced],
    costs: Costs,
) -> list[Row]:
    """tau and predicted speed on the prompts of the claim for every gamma of the grid."""
    records = []
    for temperature in bench.config.temperatures:
        for name in bench.names:
            scored = [along[temperature, draft] for draft in bench.seeds(name)]
            about = {"kind": "curve", "name": name, "temperature": temperature}
            for gamma in sorted({*bench.config.gammas, *bench.config.gamma_grid}):
                records.append({**about, **_prediction(scored, gamma, costs[name])})
    return records


def _prediction(seeds: Sequence[TeacherForced], gamma: int, costs: latency.StepCosts) -> Row:
    blocks = [blocks_along_texts(along.accept, along.lengths, gamma) for along in seeds]
    tokens, calls = (np.stack(column) for column in zip(*blocks, strict=True))
    tau = block_efficiency(tokens, calls, gamma)
    return {"gamma": gamma, **tau.keys("block_efficiency_path"), **_speeds(tau.value, gamma, costs)}


def _speeds(tau: float, gamma: int, costs: latency.StepCosts) -> Row:
    c, v = costs.cost_ratio, costs.verification_cost(gamma)
    return {
        "cost_ratio": c,
        "verification_cost": v,
        "speedup_predicted": latency.predicted_speedup(tau, gamma, c),
        "speedup_predicted_verification": latency.predicted_speedup(tau, gamma, c, v),
    }


# --- decoding and the clock ----------------------------------------------------------------------


def _decode(
    bench: Bench, settings: Sequence[Setting]
) -> tuple[dict[tuple[Setting, Draft], Measured], dict[tuple[float, Draft], TeacherForced]]:
    measured, along = {}, {}
    prompts = bench.prompts
    runs = len(bench.config.temperatures) * (1 + len(bench.drafts))
    runs += sum(len(bench.seeds(setting.name)) for setting in settings)
    with Progress("decode", runs * len(prompts.row_ids), unit="prompt") as progress:
        runner = Runner(bench, progress)
        for temperature in bench.config.temperatures:
            texts = runner.plain(prompts, temperature)
            for draft in bench.drafts:
                along[temperature, draft] = runner.along(prompts, draft, temperature, texts)
            for setting in (each for each in settings if each.temperature == temperature):
                for draft in bench.seeds(setting.name):
                    output = runner.speculative(prompts, draft, setting)
                    measured[setting, draft] = Measured(
                        counts=Counts.of(output, along[temperature, draft], setting.gamma),
                        texts=[bench.task.vocabulary.decode(row) for row in output.tokens.tolist()],
                        greedy_mismatches=None if temperature else _mismatches(output, texts),
                    )
    return measured, along


def _mismatches(output: SpeculativeOutput, texts: Generation) -> int:
    """Prompts whose text differs from plain decoding's in any token."""
    return int(np.any(output.tokens != texts.tokens, axis=1).sum())


def _race(bench: Bench, settings: Sequence[Setting], batch_size: int) -> latency.Clock:
    """Wall clock of the target alone and with every draft, one temperature after the other."""
    config = bench.config
    batches = _timed_batches(bench.prompts, config.timed_prompts, batch_size)
    clocks: list[latency.Clock] = []
    total = len(config.temperatures) * len(batches)
    with Progress(f"time, batch {batch_size}", total, unit="call") as progress:
        for temperature in config.temperatures:
            decoders = {_target(temperature): _decoder(bench.plain, temperature)}
            for setting in (each for each in settings if each.temperature == temperature):
                for draft in bench.seeds(setting.name):
                    name = _entrant(setting, draft.config.seed)
                    decoders[name] = _decoder(bench.speculative, draft, setting)
            clocks.append(
                latency.race(
                    decoders,
                    batches,
                    batch_size=batch_size,
                    repeats=config.timed_repeats,
                    on_prompt=functools.partial(_advance, progress, len(clocks) * len(batches)),
                )
            )
    return latency.Clock.join(clocks)


def _advance(progress: Progress, before: int, done: int) -> None:
    progress.update(before + done)


def _timed_batches(
    prompts: Prompts, count: int, batch_size: int
) -> list[tuple[jax.Array, jax.Array]]:
    count = min(count, len(prompts.row_ids)) // batch_size
    rows = np.arange(count * batch_size).reshape(count, batch_size)
    return [(jnp.asarray(prompts.row_ids[row]), jnp.asarray(prompts.inputs[row])) for row in rows]


def _target(temperature: float) -> str:
    return f"target at {temperature}"


def _entrant(setting: Setting, seed: int) -> str:
    return f"{setting} of seed {seed}"


def _decoder(decode: Callable[..., Any], *arguments: Any) -> latency.Decoder:
    def timed(batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        output = decode(*arguments, *batch)
        return output.tokens, output.lengths

    return timed


# --- rows ----------------------------------------------------------------------------------------


def _rows(
    bench: Bench,
    setting: Setting,
    cells: Mapping[int, Measured],
    costs: Mapping[int, Costs],
    clocks: Mapping[int, latency.Clock],
) -> list[Row]:
    """The figures of some seeds of one setting: a row for each timed batch size, or one."""
    config, gamma, is_lossless = bench.config, setting.gamma, setting.lenience == 1
    counts = Counts.stack([cell.counts for cell in cells.values()])
    tau = counts.block_efficiency.value
    figures = counts.keys()
    if not (is_lossless and config.has_whole_blocks):
        figures = {k: v for k, v in figures.items() if not k.startswith(OF_TARGET_TEXTS)}
    if config.drafts_whole_blocks:
        size_ratio = _size_ratio(bench, setting.name)
        figures["memory_bound_speedup"] = latency.predicted_speedup(tau, gamma, size_ratio)
    row = {
        **dataclasses.asdict(setting),
        "seeds": list(cells),
        "draft_sampling": dataclasses.asdict(bench.draft_sampling(setting.temperature)),
        "lossless": is_lossless,
        "verification": config.verification,
        "num_drafts": config.num_drafts,
        "block_length": dataclasses.asdict(config.block_length),
        **figures,
        **_quality(bench, [cell.texts for cell in cells.values()]),
    }
    if not is_lossless:
        row |= {"lenience_kind": config.lenience_kind, "relaxed_residual": config.relaxed_residual}
    mismatches = [each.greedy_mismatches for each in cells.values()]
    if mismatches[0] is not None:
        row["greedy_mismatches"] = sum(mismatches)
    names = [_entrant(setting, seed) for seed in cells]

    def at_size(size: int) -> Row:
        costs_here = costs[size][setting.name]
        predicted = _speeds(tau, gamma, costs_here) if config.drafts_whole_blocks else {}
        if size not in clocks:
            return predicted
        timed = clocks[size].keys(names, _target(setting.temperature))
        return {"batch_size": size, **predicted, **timed}

    return [row | at_size(size) for size in clocks or config.timed_batch_sizes[:1]]


def _size_ratio(bench: Bench, name: str) -> float:
    return bench.seeds(name)[0].loaded.num_parameters / bench.target.num_parameters


def _quality(bench: Bench, texts: Sequence[Sequence[str]]) -> Row:
    score = pooled_quality(bench.task.metric, texts, bench.prompts.references)
    if score is None:  # by the task, or for want of references
        return {"quality_metric": "none"}
    return {"quality_metric": bench.task.metric, **score.keys("quality")}


def _gains_in_tau(bench: Bench, measured: Mapping[tuple[Setting, Draft], Measured]) -> list[Row]:
    """tau of the last name over that of each other one, lossless, at each gamma of the config."""

    def counts_of(name: str, temperature: float, gamma: int) -> Counts:
        setting = Setting(name, temperature, gamma)
        return Counts.stack([measured[setting, draft].counts for draft in bench.seeds(name)])

    *others, best = bench.names
    gains = []
    for temperature in bench.lossless_temperatures:
        for gamma in bench.config.gammas:
            mine = counts_of(best, temperature, gamma)
            for name in others:
                theirs = counts_of(name, temperature, gamma)
                apart = not mine.block_efficiency.overlaps(theirs.block_efficiency)
                row = _gain("block_efficiency", best, name, temperature, mine.gain(theirs))
                gains.append({**row, "gamma": gamma, "intervals_apart": apart})
    return gains


def _gains_in_speed(
    bench: Bench, chosen: Mapping[tuple[str, float], int], clock: latency.Clock
) -> list[Row]:
    """Tokens per second of the last name over each other one, lossless, each at its own gamma."""
    *others, best = bench.names
    gains = []
    for temperature in bench.lossless_temperatures:

        def entrants(name: str, temperature: float = temperature) -> list[str]:
            setting = Setting(name, temperature, chosen[name, temperature])
            return [_entrant(setting, draft.config.seed) for draft in bench.seeds(name)]

        for name in others:
            gain = clock.speedup(entrants(best), entrants(name))
            row = _gain("tokens_per_second", best, name, temperature, gain, clock.batch_size)
            gammas = chosen[best, temperature], chosen[name, temperature]
            gains.append({**row, "gamma": gammas[0], "gamma_over": gammas[1]})
    return gains


def _gain(
    figure: str, name: str, over: str, temperature: float, gain: Estimate, batch_size: int = 1
) -> Row:
    """A row of gains; `batch_size` is how many prompts each of the estimate's samples holds."""
    about = {"figure": figure, "name": name, "over": over, "temperature": temperature}
    return {**about, **gain.keys("gain"), "num_prompts": gain.n * batch_size}
