"""The batch that travels from the pipeline to the step."""

from __future__ import annotations

from typing import Any

import flax.struct


class Batch(flax.struct.PyTreeNode):
    """Padded examples, int32 arrays of numpy (from the pipeline) or JAX (inside a step).

    Attributes:
      inputs: [B, S] source pieces, right-padded with 0.
      targets: [B, T] reference pieces with the end of sequence, right-padded with 0.
      example_ids: [B] index of each row in its data set, from which its randomness is derived;
        -1 marks a row that only fills up the last batch of an evaluation.
      target_hidden: [B, T, D] decoder outputs of the target on these targets, where it has them
        from writing the text; the loss need not score it again then.
    """

    inputs: Any
    targets: Any
    example_ids: Any
    target_hidden: Any = None
