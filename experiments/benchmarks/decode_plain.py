"""Fresh models decode: beside Hugging Face, and against reading the weights; alone and drafted."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillspec_jax.decoding.autoregressive import generate
from distillspec_jax.decoding.sampling import Sampling
from distillspec_jax.decoding.speculative import speculative_sample
from distillspec_jax.decoding.state import SpeculativeOutput
from distillspec_jax.evaluation.latency import Timing, side_by_side
from distillspec_jax.models.cpu_memory import on_large_pages
from distillspec_jax.models.presets import preset
from distillspec_jax.models.transformer import Params, Transformer, init_params, start
from experiments.benchmarks.decode import Config, Found, Row

GREEDY = Sampling(temperature=0.0)


HEADLINES = (
    *("plain_over_huggingface", "plain_over_weight_read", "fraction_of_bandwidth"),
    "fraction_of_bandwidth_with_draft",
)
OF_A_LENGTH = "milliseconds_per_token"
GROWTH = "longest_over_shortest_per_token"


def measure(config: Config, seed: int, has_peers: bool) -> Found:
    """Every shape, batch size and length; the headline is of the first length."""
    memory = Memory(config.read_megabytes)
    summary: Row = {}
    records: list[Row] = []
    for shape in config.shapes:
        suffix = "" if shape == config.shapes[0] else "_" + shape.rpartition("_")[2]
        run = _Run(config, shape, seed, memory, has_peers)
        for batch_size in config.batch_sizes:
            for new_tokens in config.new_tokens:
                print(f"{shape}: batch {batch_size}, {new_tokens} tokens", flush=True)
                row = run.measure(batch_size, new_tokens)
                records.append(row)
                place = f"_batch{batch_size}{suffix}"
                summary |= named(row, OF_A_LENGTH, f"{OF_A_LENGTH}_length{new_tokens}{place}")
                if new_tokens == config.new_tokens[0]:
                    for key in HEADLINES:
                        summary |= named(row, key, key + place)
            growth = run.growth(batch_size)
            summary |= named(growth, GROWTH, f"{GROWTH}_batch{batch_size}{suffix}")
    counts = ("equal_tokens", "compared_tokens")
    summary |= {key: sum(row[key] for row in records) for key in counts if has_peers}
    summary["compilations_per_shape"] = max(row["compilations"] for row in records)
    return summary, records


def named(row: Row, key: str, name: str) -> Row:
    """One figure of a record and its spread, under another name."""
    if key not in row:
        return {}
    return {name: row[key], f"{name}_spread": row[f"{key}_spread"]}


class Memory:
    """A block of the memory that holds the weights, to learn how fast it can be read.

    A CPU's is read by all cores at once; a device's by a compiled reduction and by a copy, which
    writes as much, and the faster of the two counts.
    """

    def __init__(self, megabytes: int) -> None:
        block = on_large_pages(jnp.ones(megabytes * 2**18))
        self._moved = {"read": block.nbytes}
        self.calls: dict[str, Callable[[], Any]] = {}
        if jax.default_backend() == "cpu":
            self.calls["read"] = _reader_of_cores(np.asarray(block))
        else:
            self._moved["copy"] = 2 * block.nbytes
            self.calls["read"] = functools.partial(_largest, block)
            self.calls["copy"] = functools.partial(_negative, block)

    def bandwidth(self, seconds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Bytes a second in every round [rounds], from the seconds of `calls`."""
        return np.max([moved / seconds[name] for name, moved in self._moved.items()], axis=0)


def _reader_of_cores(block: np.ndarray) -> Callable[[], Any]:
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(block.view(np.int64), cores)  # read faster than floats: less to compute
    pool = concurrent.futures.ThreadPoolExecutor(cores)
    return lambda: max(pool.map(np.bitwise_or.reduce, parts))


_largest, _negative = jax.jit(jnp.max), jax.jit(jnp.negative)


def decoder_bytes(model: Transformer, params: Params) -> int:
    """Bytes of weights that one decoding step has to read.

    Those of the decoder, but for the kernels that read the source once, and the matrix that
    makes the logits.
    """
    head = params["embedding" if model.config.tie_embeddings else "head"]
    leaves = jax.tree_util.tree_leaves_with_path(params["decoder"])
    layers = (x for path, x in leaves if "key_value" not in jax.tree_util.keystr(path))
    return head.nbytes + sum(x.nbytes for x in layers)


def ratio(key: str, above: np.ndarray | float, below: np.ndarray | float) -> Row:
    """Median over rounds of above / below, [rounds] each, and its least and greatest value."""
    ratios = above / below
    return {
        key: float(np.median(ratios)),
        f"{key}_spread": [float(np.min(ratios)), float(np.max(ratios))],
    }


_start = jax.jit(start, static_argnums=(0, 3))
_generate: Any = jax.jit(generate, static_argnums=0, static_argnames=("sampling", "max_new_tokens"))


def endless(shape: str, dtype: str) -> Transformer:
    """A model of a preset's shape whose texts nothing ends."""
    known = preset(shape)
    changes: dict[str, Any] = {"num_pieces": known.vocab_size, "eos_id": -1, "dropout_rate": 0.0}
    return Transformer(dataclasses.replace(known, dtype=dtype, **changes))


def fresh(model: Transformer, seed: int) -> Params:
    """Weights in the dtype that the model computes in."""
    params = init_params(model, jax.random.key(seed))
    return jax.tree.map(lambda x: x.astype(model.config.dtype), params)


class _Run:
    """One shape with fresh weights, which Hugging Face has too."""

    def __init__(
        self, config: Config, shape: str, seed: int, memory: Memory, has_peers: bool
    ) -> None:
        self._config, self._shape, self._seed, self._memory = config, shape, seed, memory
        self._model = endless(shape, config.dtype)
        self._params = on_large_pages(jax.jit(functools.partial(fresh, self._model))(seed))
        self._draft: Any = None  # model and parameters
        for name in config.fresh_drafts:
            draft = endless(name, config.dtype)
            params = jax.jit(functools.partial(fresh, draft))(seed + 1)
            self._draft = draft, on_large_pages(params)
        self._peer: Any = None
        if has_peers:
            from experiments.benchmarks.torch_decode import HuggingFace

            self._peer = HuggingFace(self._model, self._params)

    def measure(self, batch_size: int, new_tokens: int) -> Row:
        """Everything about one batch size and length."""
        inputs = self._inputs(batch_size)
        texts: dict[str, np.ndarray] = {}

        def plain() -> None:
            texts["plain"] = np.asarray(self._plain(inputs, new_tokens))

        def huggingface() -> None:
            texts["huggingface"], _ = self._peer.generate(inputs, new_tokens)

        calls: dict[str, Callable[[], Any]] = {
            "plain": plain,
            "encode": lambda: _start(self._model, self._params, inputs, new_tokens),
            **self._memory.calls,
        }
        calls |= {"huggingface": huggingface} if self._peer else {}
        calls |= self._drafted(inputs, new_tokens)
        before = _generate._cache_size()
        timings = side_by_side(calls, repeats=self._config.rounds, seed=self._seed)
        row = {
            "shape": self._shape,
            "batch_size": batch_size,
            "input_length": self._config.input_length,
            "new_tokens": new_tokens,
            "compilations": _generate._cache_size() - before,
            **self._figures(timings, batch_size, new_tokens),
        }
        if self._draft:
            row |= self._reading_of_blocks(timings, inputs, new_tokens)
        if self._peer:
            row["equal_tokens"] = int(np.sum(texts["plain"] == texts["huggingface"]))
            row["compared_tokens"] = texts["plain"].size
        return row

    def growth(self, batch_size: int) -> Row:
        """Time of a token at the longest limit over that at the shortest, both in every round."""
        inputs = self._inputs(batch_size)
        lengths = min(self._config.new_tokens), max(self._config.new_tokens)
        calls: dict[str, Callable[[], Any]] = {
            f"plain {length}": functools.partial(self._plain, inputs, length) for length in lengths
        }
        calls["encode"] = lambda: _start(self._model, self._params, inputs, lengths[0])
        timings = side_by_side(calls, repeats=self._config.rounds, seed=self._seed)
        source = timings["encode"].seconds
        short, long = ((timings[f"plain {n}"].seconds - source) / n for n in lengths)
        return ratio(GROWTH, long, short)

    def _drafted(self, inputs: np.ndarray, new_tokens: int) -> dict[str, Callable[[], Any]]:
        """The same with a draft, if there is one, and the draft's reading of the source."""
        if not self._draft:
            return {}
        return {
            "speculative": lambda: self._speculative(inputs, new_tokens).tokens,
            "encode_draft": lambda: _start(*self._draft, inputs, new_tokens),
        }

    def _speculative(self, inputs: np.ndarray, new_tokens: int) -> SpeculativeOutput:
        draft, draft_params = self._draft
        return speculative_sample(
            self._model,
            self._params,
            draft,
            draft_params,
            jnp.asarray(inputs),
            jax.random.key(self._seed),
            gamma=self._config.fresh_gamma,
            max_new_tokens=new_tokens,
            sampling=GREEDY,
        )

    def _reading_of_blocks(
        self, timings: Mapping[str, Timing], inputs: np.ndarray, new_tokens: int
    ) -> Row:
        """What a block has to read, over what could be read in its time.

        The target's weights once, the draft's for every token it writes.
        """
        statistics = self._speculative(inputs, new_tokens).statistics
        blocks = int(np.max(statistics.target_calls))  # a row that is done waits for the others
        seconds = {name: timing.seconds for name, timing in timings.items()}
        source = seconds["encode"] + seconds["encode_draft"]
        block = (seconds["speculative"] - source) / blocks
        read = decoder_bytes(self._model, self._params)
        read += self._config.fresh_gamma * decoder_bytes(*self._draft)
        bandwidth = self._memory.bandwidth(seconds)
        return {
            "draft": self._draft[0].config.name,
            "gamma": self._config.fresh_gamma,
            "blocks": blocks,
            "block_efficiency": float(np.sum(statistics.emitted) / np.sum(statistics.target_calls)),
            **ratio("fraction_of_bandwidth_with_draft", read / bandwidth, block),
        }

    def _inputs(self, batch_size: int) -> np.ndarray:
        shape = batch_size, self._config.input_length
        rng = np.random.default_rng(self._seed)
        return rng.integers(2, self._model.config.num_pieces, shape).astype(np.int32)

    def _plain(self, inputs: np.ndarray, new_tokens: int) -> jax.Array:
        """Texts [B, new_tokens]; greedy decoding does not look at the key."""
        key = jax.random.key(self._seed)
        settings = {"sampling": GREEDY, "max_new_tokens": new_tokens}
        return _generate(self._model, self._params, inputs, key, **settings).tokens

    def _figures(self, timings: Mapping[str, Timing], batch_size: int, new_tokens: int) -> Row:
        """Ratios of the rounds. The time of a token is without the reading of the source."""
        seconds = {name: timing.seconds for name, timing in timings.items()}
        step = (seconds["plain"] - seconds["encode"]) / new_tokens
        bandwidth = self._memory.bandwidth(seconds)
        read = decoder_bytes(self._model, self._params) / bandwidth
        row = {
            **{f"{name}_seconds": timing.median for name, timing in timings.items()},
            "compile_seconds": timings["plain"].first_call - timings["plain"].median,
            "plain_tokens_per_second": batch_size * new_tokens / timings["plain"].median,
            "bandwidth_gigabytes_per_second": float(np.median(bandwidth)) / 1e9,
            **ratio("milliseconds_per_token", 1e3 * step, 1),
            **ratio("plain_over_weight_read", step, read),
            **ratio("fraction_of_bandwidth", read, step),
        }
        if "huggingface" in seconds:
            tokens_per_second = batch_size * new_tokens / timings["huggingface"].median
            row["huggingface_tokens_per_second"] = tokens_per_second
            row |= ratio("plain_over_huggingface", seconds["huggingface"], seconds["plain"])
        return row
