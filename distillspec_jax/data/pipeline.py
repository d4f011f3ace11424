"""Examples to batches: a Grain order, pieces, padding, and the share of each host.

The order is a function of (seed, step) alone: every pass over the data is shuffled anew, step `n`
draws the `n`-th slice of the endless order, and each host takes its rows of that slice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import EncodedExample, Example, locate, take
from distillspec_jax.data.vocabulary import Vocabulary
from distillspec_jax.errors import UserError, check_count

# Longer data sets are checked for over-long examples up to here before the first batch, and
# behind it as they are drawn: a run should fail in its first second, not in its second hour.
CHECKED_AHEAD = 20_000
GROUP = 16  # batches whose examples are sorted by length together
_PASSES = 1 << 30  # as good as endless; Grain's endless repeat() cannot make batches of one


def batches(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    seed: int,
    start_step: int = 0,
    truncate: bool = False,
    input_eos: bool = False,
    shuffle: bool = True,
    bucket: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches, from the one of `start_step` on.

    Args:
      examples: a random-access sequence; encoded ones go into a batch as they are.
      vocabulary: makes the pieces.
      batch_size: B over all hosts together; this host yields B / process_count rows.
      input_length, target_length: S and T; a target counts its end of sequence.
      seed: of the order.
      start_step: batches that an earlier part of the run has used.
      truncate: cut over-long examples (an end of sequence is kept); else they are errors.
      input_eos: end inputs, too, with the end of sequence, as T5's encoder was trained.
      shuffle: False keeps the order of the data.
      bucket: above 0, examples of like target length share a batch, and T is cut to the next
        multiple of it: less padding, at most target_length / bucket compiled shapes.
      process_index, process_count: which rows of each batch are this host's.

    Raises:
      UserError: no examples, an example that is over-long or has no input, a setting out of range,
        or a batch that the hosts cannot share evenly.
    """
    check_count("start_step", start_step, least=0)
    check_count("bucket", bucket, least=0, zero="off")
    mine = _host_rows(batch_size, process_index, process_count)
    encode = _Encoder(examples, vocabulary, input_length, target_length, truncate, input_eos)
    encode.check()
    order = grain.MapDataset.range(len(examples))
    if shuffle:
        order = order.seed(seed).shuffle()
    order = order.repeat(_PASSES)
    if not bucket:
        steps = order.batch(batch_size)[start_step:]
        return iter(steps.map(lambda ids: encode(ids[mine])).to_iter_dataset(_read_options(16)))
    group, done = divmod(start_step, GROUP)
    groups = order.batch(batch_size * GROUP)[group:]
    grouped = groups.map(lambda ids: _by_length(encode(ids), batch_size, bucket, seed))
    flat = itertools.chain.from_iterable(grouped.to_iter_dataset(_read_options(2)))
    return (_rows(batch, mine) for batch in itertools.islice(flat, done, None))


def eval_batches(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    truncate: bool = False,
    input_eos: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass in the order of the data; rows that fill up the last batch have example id -1.

    Arguments and errors as in `batches`. Every host yields the same number of batches.
    """
    mine = _host_rows(batch_size, process_index, process_count)
    encode = _Encoder(examples, vocabulary, input_length, target_length, truncate, input_eos)
    encode.check()
    ids = np.arange(-(-len(examples) // batch_size) * batch_size)
    ids[len(examples) :] = -1
    steps = grain.MapDataset.source(ids.reshape(-1, batch_size)[:, mine])
    return iter(steps.map(encode).to_iter_dataset(_read_options(16)))


def trimmed(inputs: np.ndarray, bucket: int = 32) -> np.ndarray:
    """Prompts [B, S] without the columns that are padding in all rows, S a multiple of `bucket`.

    Few shapes to compile, and no work on padding that no row needs.
    """
    longest = max(int(_lengths(inputs).max()), 1)
    return inputs[:, : -(-longest // bucket) * bucket]


def _lengths(rows: np.ndarray) -> np.ndarray:
    """Up to the last piece that is no padding, [B, T] -> [B]: a written text may hold id 0."""
    return np.max((rows != 0) * np.arange(1, rows.shape[1] + 1), axis=1)


def _read_options(ahead: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)


def _host_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that are this host's."""
    check_count("batch_size", batch_size)
    check_count("process_count", process_count)
    check_count("process_index", process_index, least=0)
    if process_index >= process_count:
        raise UserError(
            f"process_index is {process_index}, must be below the number of hosts, {process_count}"
        )
    if batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size}, must be a positive multiple of the number of hosts, "
            f"{process_count}"
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _rows(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return Batch(batch.inputs[rows], batch.targets[rows], batch.example_ids[rows])


def _by_length(group: Batch, batch_size: int, bucket: int, seed: int) -> list[Batch]:
    """Splits a group into batches of like target length, in an order drawn from (seed, ids)."""
    lengths = _lengths(group.targets)
    order = np.argsort(lengths, kind="stable").reshape(-1, batch_size)
    np.random.default_rng((seed, int(group.example_ids[0]))).shuffle(order)
    batches = []
    for rows in order:
        longest = int(lengths[rows].max())
        width = min(-(-longest // bucket) * bucket, group.targets.shape[1])
        batch = _rows(group, rows)
        batches.append(batch.replace(targets=batch.targets[:, :width]))
    return batches


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Makes the batch of some example ids."""

    examples: Sequence[Example]
    vocabulary: Vocabulary
    input_length: int  # S
    target_length: int  # T
    truncate: bool
    input_eos: bool

    def __call__(self, ids: np.ndarray) -> Batch:
        """[B] example ids -> the batch; an id of -1 gives a row of padding alone."""
        inputs = np.zeros((len(ids), self.input_length), np.int32)
        targets = np.zeros((len(ids), self.target_length), np.int32)
        rows = np.flatnonzero(ids >= 0)
        drawn = take(self.examples, ids[rows].tolist())
        for row, example in zip(rows, drawn, strict=True):
            source, target = self._pieces(ids[row], example)
            inputs[row, : len(source)] = source
            targets[row, : len(target)] = target
        return Batch(inputs, targets, ids.astype(np.int32))

    def check(self) -> None:
        """Refuses an empty data set, and over-long or empty examples among the first."""
        if len(self.examples) == 0:
            raise UserError("the split holds no examples")
        if not self.truncate:
            ids = range(min(len(self.examples), CHECKED_AHEAD))
            for index, example in zip(ids, take(self.examples, ids), strict=True):
                self._pieces(index, example)

    def _pieces(self, index: int, example: Example | EncodedExample) -> tuple[list[int], list[int]]:
        """The pieces of one example, checked against the lengths or cut to them."""
        end = [self.vocabulary.eos_id]
        own_end = end
        if isinstance(example, EncodedExample):
            source, target = example
            own_end = []  # its writer did not end it where it is cut
        else:
            source = self.vocabulary.encode(example.input) + end * self.input_eos
            target = self.vocabulary.encode(example.target) + end
        if not any(source):  # nothing but padding, if anything
            raise UserError(
                f"{locate(self.examples, index)}: the input has no piece of the vocabulary; give "
                "it a text that has one"
            )
        if self.truncate:
            source = _cut(source, self.input_length, end * self.input_eos)
            target = _cut(target, self.target_length, own_end)
        sides = (("input", source, self.input_length), ("target", target, self.target_length))
        excess = [
            f"{len(pieces)} {side} pieces, where {side}_length is {length}"
            for side, pieces, length in sides
            if len(pieces) > length
        ]
        if excess:
            raise UserError(
                f"{locate(self.examples, index)} is too long: {' and '.join(excess)}; raise what "
                "is too short, or set truncate to true"
            )
        return source, target


def _cut(pieces: list[int], length: int, end: list[int]) -> list[int]:
    return pieces if len(pieces) <= length else pieces[: length - len(end)] + end
