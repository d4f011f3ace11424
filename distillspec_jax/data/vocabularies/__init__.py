"""The packaged vocabulary, and the one function that makes it. To make it again:

    python -c "from distillspec_jax.data import vocabularies; vocabularies.train('my.model')"

SentencePiece of another version may order pieces that are as frequent in another way.
"""

from __future__ import annotations

import collections
import io
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from distillspec_jax.data.stories import story, words

MAX_NUMBER_PIECE = 150
_MAX_PIECES = 512
_NUM_STORIES = 20_000
_LONGEST = (48, 63)  # also some that are too long for the splits


def train(path: str | Path) -> None:
    """Trains the unigram vocabulary of `arithmetic_stories` on its pretraining split.

    Every number 0..150 is one piece, whatever the corpus says: with its digits apart, arithmetic is
    not learnt by models of this size. The seeds are whole words, since SentencePiece's own search
    for repeated substrings meets most words only once (it counts each distinct word once).
    Pieces: 0 pad, 1 end of sequence, 2 unknown; no start.
    """
    stories = (story("pretrain", index, longest=_LONGEST) for index in range(_NUM_STORIES))
    texts = [text for pair in stories for text in pair]
    counts = collections.Counter(word for text in texts for word in words(text))
    seeds = [(w, n) for w, n in counts.most_common() if not w.removeprefix("▁").isdigit()]
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seed_file:
        seed_file.writelines(f"{word}\t{count}\n" for word, count in seeds)
        seed_file.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=_MAX_PIECES,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="0123456789",
            seed_sentencepieces_file=seed_file.name,
            user_defined_symbols=[f"▁{number}" for number in range(MAX_NUMBER_PIECE + 1)],
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    messages: Any = sentencepiece_model_pb2  # made at import, which type checkers cannot see
    proto = messages.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a temporary file of this machine
    Path(path).write_bytes(proto.SerializeToString(deterministic=True))
