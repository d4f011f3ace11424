"""Examples to batches: a Grain order, tokens, padding, and the share of each host.

The order is a function of (seed, step) alone: every pass over the data is shuffled anew, step `n`
draws the `n`-th slice of the endless order, and each host takes its rows of that slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from distillspec_jax.data.batch import Batch
from distillspec_jax.data.examples import Example, locate, take
from distillspec_jax.data.vocabulary import Vocabulary
from distillspec_jax.errors import UserError

# Longer data sets are checked for over-long examples up to here before the first batch, and
# behind it as they are drawn: a run should fail in its first second, not in its second hour.
CHECKED_AHEAD = 20_000
GROUP = 16  # batches whose examples are sorted by length together
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


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
    shuffle: bool = True,
    bucket: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches, from the one of `start_step` on.

    Args:
      examples: a random-access sequence of examples.
      vocabulary: makes the pieces.
      batch_size: B over all hosts together; this host yields B / process_count rows.
      input_length, target_length: S and T; a target counts its end of sequence.
      seed: of the order.
      start_step: batches that an earlier part of the run has used.
      truncate: cut over-long examples (the target keeps its end of sequence); else they are errors.
      shuffle: False keeps the order of the data.
      bucket: above 0, examples of like target length share a batch, and T is cut to the next
        multiple of it: less padding, at most target_length / bucket compiled shapes.
      process_index, process_count: which rows of each batch are this host's.

    Raises:
      UserError: no examples, an over-long example, or a batch that the hosts cannot share evenly.
    """
    if len(examples) == 0:
        raise UserError("the training split holds no examples")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size = {batch_size} must be a positive multiple of the {process_count} host(s)"
        )
    encode = _Encoder(examples, vocabulary, input_length, target_length, truncate)
    encode.check_ahead()
    order = grain.MapDataset.range(len(examples))
    if shuffle:
        order = order.seed(seed).shuffle()
    rows = batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    if not bucket:
        steps = order.repeat().batch(batch_size)[start_step:]
        return iter(steps.map(lambda ids: encode(ids[mine])).to_iter_dataset(_READ_OPTIONS))
    group, done = divmod(start_step, GROUP)
    groups = order.repeat().batch(batch_size * GROUP)[group:]
    grouped = groups.map(lambda ids: _by_length(encode(ids), batch_size, bucket, seed))
    flat = itertools.chain.from_iterable(grouped.to_iter_dataset(_READ_OPTIONS))
    return (_rows(batch, mine) for batch in itertools.islice(flat, done, None))


def eval_batches(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    truncate: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass in the order of the data; rows that fill up the last batch have example id -1.

    Arguments and errors as in `batches`. Every host yields the same number of batches.
    """
    if len(examples) == 0:
        raise UserError("the evaluation split holds no examples")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size = {batch_size} must be a positive multiple of the {process_count} host(s)"
        )
    encode = _Encoder(examples, vocabulary, input_length, target_length, truncate)
    encode.check_ahead()
    ids = np.arange(-(-len(examples) // batch_size) * batch_size)
    ids[len(examples) :] = -1
    rows = batch_size // process_count
    mine = ids.reshape(-1, process_count, rows)[:, process_index]
    steps = grain.MapDataset.source(mine)
    return iter(steps.map(encode).to_iter_dataset(_READ_OPTIONS))


def _by_length(group: Batch, batch_size: int, bucket: int, seed: int) -> list[Batch]:
    """Splits a group into batches of like target length, in an order drawn from (seed, ids)."""
    lengths = (group.targets != 0).sum(1)
    order = np.argsort(lengths, kind="stable").reshape(-1, batch_size)
    np.random.default_rng((seed, int(group.example_ids[0]))).shuffle(order)
    batches = []
    for ids in order:
        longest = max(int(lengths[ids].max()), 1)
        width = min(-(-longest // bucket) * bucket, group.targets.shape[1])
        batch = _rows(group, ids)
        batches.append(batch.replace(targets=batch.targets[:, :width]))
    return batches


def _rows(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return Batch(batch.inputs[rows], batch.targets[rows], batch.example_ids[rows])


class _Encoder:
    """Makes the batch of some example ids."""

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        input_length: int,
        target_length: int,
        truncate: bool,
    ):
        self.examples, self.vocabulary = examples, vocabulary
        self.input_length, self.target_length = input_length, target_length
        self.truncate = truncate

    def __call__(self, ids: np.ndarray) -> Batch:
        """[B] example ids -> the batch; an id of -1 gives a row of padding alone."""
        inputs = np.zeros((len(ids), self.input_length), np.int32)
        targets = np.zeros((len(ids), self.target_length), np.int32)
        present = [row for row, index in enumerate(ids) if index >= 0]
        drawn = take(self.examples, [int(ids[row]) for row in present])
        for row, example in zip(present, drawn, strict=True):
            source, target = self.pieces(int(ids[row]), example)
            inputs[row, : len(source)] = source
            targets[row, : len(target)] = target
        return Batch(inputs, targets, np.asarray(ids, np.int32))

    def check_ahead(self) -> None:
        if not self.truncate:
            ids = list(range(min(len(self.examples), CHECKED_AHEAD)))
            for index, example in zip(ids, take(self.examples, ids), strict=True):
                self.pieces(index, example)

    def pieces(self, index: int, example: Example) -> tuple[list[int], list[int]]:
        """The pieces of one example, checked against the lengths or cut to them."""
        source = self.vocabulary.encode(example.input)
        target = [*self.vocabulary.encode(example.target), self.vocabulary.eos_id]
        if self.truncate:
            source = source[: self.input_length]
            if len(target) > self.target_length:
                target = [*target[: self.target_length - 1], self.vocabulary.eos_id]
        if len(source) > self.input_length or len(target) > self.target_length:
            raise UserError(
                f"{locate(self.examples, index)} is too long: {len(source)} input pieces and "
                f"{len(target)} target pieces (its end counted), where input_length = "
                f"{self.input_length} and target_length = {self.target_length}; raise them, or "
                "set truncate = True"
            )
        return source, target
