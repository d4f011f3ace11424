"""The same distillation steps in torch: TRL's GKDTrainer, and a plain loop over Hugging Face T5.

Imported only where the extra `peers` is installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from distillspec_jax.models.config import ModelConfig

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0


def causal_model(config: ModelConfig) -> Any:
    """A decoder-only model of the same sizes: Llama where the MLP is gated, else GPT-2."""
    if config.gated:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                intermediate_size=config.d_ff,
                num_hidden_layers=config.num_decoder_layers,
                num_attention_heads=config.num_heads,
                head_dim=config.head_dim,
                tie_word_embeddings=config.tie_embeddings,
                pad_token_id=config.pad_id,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.d_model,
            n_inner=config.d_ff,
            n_layer=config.num_decoder_layers,
            n_head=config.num_heads,
            n_positions=256,
            tie_word_embeddings=config.tie_embeddings,
            pad_token_id=config.pad_id,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def trl_calls(
    draft: ModelConfig, target: ModelConfig, inputs: np.ndarray, length: int
) -> dict[str, Callable[[], Any]]:
    """On-policy steps of TRL on prompts [B, S] with samples of `length` tokens, and its rollout."""
    trainer = _trainer(draft, target, len(inputs), length)
    prompts = torch.from_numpy(inputs.astype(np.int64))

    def batch() -> dict[str, torch.Tensor]:
        return {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}

    def step() -> float:
        loss = trainer.training_step(trainer.model, batch())
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), CLIP_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    def rollout() -> np.ndarray:
        with torch.no_grad():
            tokens, *_ = trainer.generate_on_policy_outputs(
                trainer.model, batch(), trainer.generation_config
            )
        assert tokens.shape[1] == prompts.shape[1] + length
        return tokens.numpy()

    return {"trl_step": step, "trl_rollout": rollout}


def _trainer(draft: ModelConfig, target: ModelConfig, batch_size: int, length: int) -> Any:
    """GKDTrainer as its documentation builds it, with nothing to read: batches are handed to it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    transformers.logging.set_verbosity_error()
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = Tokenizer(models.WordLevel({"0": 0, "1": 1, "2": 2}, unk_token="2"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", unk_token="2"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=length,
            max_length=None,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        trainer = GKDTrainer(
            model=causal_model(draft),
            teacher_model=causal_model(target),
            args=arguments,
            data_collator=lambda rows: rows,
            train_dataset=Dataset.from_list([{"messages": []}] * batch_size),
            processing_class=tokenizer,
        )
    trainer.create_optimizer_and_scheduler(num_training_steps=1_000)
    trainer.current_gradient_accumulation_steps = 1
    for each in (trainer.generation_config, trainer.model.generation_config):
        each.eos_token_id = None  # every sample has the full length
    return trainer


def t5_model(config: ModelConfig) -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu" if config.gated else "relu",
            tie_word_embeddings=config.tie_embeddings,
        )
    )


def t5_update(
    draft: ModelConfig, target: ModelConfig, inputs: np.ndarray, targets: np.ndarray
) -> Callable[[], float]:
    """Score and update by forward KL, all tokens real: inputs [B, S], targets [B, T]."""
    student, teacher = t5_model(draft), t5_model(target).eval()
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]  # no labels: they cost a loss of their own
    texts = {
        "input_ids": torch.from_numpy(inputs.astype(np.int64)),
        "decoder_input_ids": torch.from_numpy(shifted.astype(np.int64)),
    }

    def update() -> float:
        with torch.no_grad():
            target_log_probs = teacher(**texts).logits.log_softmax(-1)
        draft_log_probs = student(**texts).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            draft_log_probs, target_log_probs, reduction="none", log_target=True
        )
        loss = loss.sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return update
