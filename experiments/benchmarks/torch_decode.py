"""Greedy decoding by Hugging Face models with our weights; needs torch and transformers."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from distillspec_jax.interop import huggingface
from distillspec_jax.models.transformer import Params, Transformer


class HuggingFace:
    """The T5ForConditionalGeneration that our export of a model becomes."""

    def __init__(self, model: Transformer, params: Params) -> None:
        """Goes by way of a folder, as users do. With a negative eos_id nothing ends a text."""
        transformers.utils.logging.set_verbosity_error()
        self._config = model.config
        stored = Transformer(dataclasses.replace(model.config, eos_id=max(model.config.eos_id, 1)))
        with tempfile.TemporaryDirectory() as folder:
            huggingface.save(stored, params, Path(folder) / "model")
            read = transformers.T5ForConditionalGeneration.from_pretrained(Path(folder) / "model")
        self._module = read.eval()
        if model.config.eos_id < 0:
            read.config.eos_token_id = read.generation_config.eos_token_id = None

    def generate(
        self,
        inputs: np.ndarray,
        max_new_tokens: int,
        assistant: HuggingFace | None = None,
        gamma: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts after inputs [B, S]: tokens [B, max_new_tokens] padded, lengths [B].

        An assistant drafts `gamma` tokens in every block; transformers then takes one row only.
        """
        pad_id = self._config.pad_id
        inputs = inputs[:, : int((inputs != pad_id).sum(axis=1).max())]
        source = torch.tensor(inputs, dtype=torch.long)
        settings: dict[str, Any] = {}
        if assistant is not None:
            drafting = assistant._module.generation_config
            drafting.num_assistant_tokens = gamma
            drafting.num_assistant_tokens_schedule = "constant"
            drafting.assistant_confidence_threshold = 0.0
            settings["assistant_model"] = assistant._module
        with torch.inference_mode():
            texts = self._module.generate(
                source,
                attention_mask=(source != pad_id).long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                **settings,
            )
        tokens = np.full((len(inputs), max_new_tokens), pad_id, np.int32)
        tokens[:, : texts.shape[1] - 1] = texts[:, 1:].numpy()  # without the start token
        ends = tokens == self._config.eos_id
        return tokens, np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, max_new_tokens)
