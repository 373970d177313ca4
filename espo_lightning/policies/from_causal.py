"""From a causal model to a diffusion policy by supervised training, as Dream (arXiv:2508.15487) was made of Qwen2.5."""

from typing import Any

import torch
from torch import Tensor, nn

from espo_lightning.policies.formats import layout_keys
from espo_lightning.policies.layout import Layout

MASK_TOKEN = "<|mask|>"  # Dream's


def set_blocks(config: Any, layout: Layout) -> None:
    """Give the config of a denoising model block-causal attention, in place.

    Raises:
        ValueError: the model is causal, predicts with a shift, or has other blocks.
    """
    if getattr(config, "is_causal", True) is not False:
        raise ValueError("block is for denoising policies, and this checkpoint is causal: set denoise: true as well")
    if config.logits_shift:
        raise ValueError(
            "block needs a policy whose hidden state i predicts token i, but this checkpoint has logits_shift 1: its "
            "first token of a block would be predicted without seeing the block"
        )
    keys = layout_keys(layout)
    told = {key: value for key in keys if (value := getattr(config, key, None)) is not None}
    if any(keys[key] != value for key, value in told.items()):
        raise ValueError(f"the checkpoint has {told}, but load_policy was told {keys}: drop block and origin")
    for key, value in keys.items():
        setattr(config, key, value)


def make_denoising(model: nn.Module, tokenizer, shift: int = 1) -> None:
    """Give a causal model and its tokenizer the form of a diffusion policy, in place; `sft` then teaches it to denoise.

    Attention looks both ways, and hidden state i-1 still predicts token i, which keeps what the head has learnt; with
    ``shift`` 0 hidden state i does, as blocks need and as SDAR was made of Qwen3. The mask token is the tokenizer's own
    if it has one, else a new one on a spare row of the embedding, or on one more row. A new row is the mean of the
    others.

    Args:
        model: a transformers causal LM with ``.model.embed_tokens`` and ``.lm_head``.
        tokenizer: of transformers.
        shift: 1 or 0.

    Raises:
        ValueError: the model is a diffusion model already.
    """
    config = model.config
    if getattr(config, "is_causal", True) is False:
        raise ValueError("denoise: true is for causal checkpoints, and this one denoises already: drop it")
    if tokenizer.mask_token_id is None:
        known = len(tokenizer)
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        if len(tokenizer) > known:
            _set_mean_row(model, tokenizer.mask_token_id)
    config.is_causal, config.logits_shift, config.mask_token_id = False, shift, tokenizer.mask_token_id


@torch.no_grad()
def _set_mean_row(model: nn.Module, row: int) -> None:
    """Make a row of embedding and head the mean of the rows before it; the row may be one past the last."""
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    for layer in (embedding, head):
        known: Tensor = layer.weight[:row]
        layer.weight = nn.Parameter(torch.cat([known, known.mean(0, keepdim=True), layer.weight[row + 1 :]]))
    if tied:
        head.weight = embedding.weight
    model.config.vocab_size = embedding.num_embeddings = head.out_features = len(embedding.weight)
