"""Small causal policies, and what their tests share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from espo_lightning import (
    Autoregressive,
    Policy,
    Prompts,
)
from espo_lightning.lab.exact import enumerate_completions

PAD, EOS = 0, 1
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


class Tokenizer:
    pad_token_id, eos_token_id = PAD, EOS


def causal(family: str = "llama", vocabulary: int = 9, seed: int = 2, attention: str = "sdpa", **config) -> Policy:
    """Random weights with spread logits, so that no two tokens are nearly tied."""
    make_config, make_model = FAMILIES[family]
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "head_dim": 8}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        model = make_model(make_config(vocab_size=vocabulary, **size, **ids | config))
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2 if "norm" in name else 0.5, generator=generator)
    return Policy(model.eval(), Tokenizer(), mask_id=None, shift=1, causal=True)


def prompts_of(rows: int, width: int = 5, vocabulary: int = 9, seed: int = 0) -> Prompts:
    """Left-padded prompts of 1 to ``width`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) >= torch.arange(rows).unsqueeze(1) % width
    return Prompts(torch.randint(2, vocabulary, (rows, width), generator=generator).masked_fill(~mask, PAD), mask)


def unpadded(prompts: Prompts, row: int) -> Prompts:
    return Prompts(prompts.ids[row : row + 1, prompts.mask[row]], None)


def terms_of(policy, prompts: Prompts, completion: torch.Tensor) -> torch.Tensor:
    """[B, L]."""
    likelihood = Autoregressive()
    masks = likelihood.draw(torch.zeros(len(completion), dtype=torch.int64), completion.shape[1])
    return likelihood.terms(policy, prompts, completion, masks).squeeze(0)


def texts(policy, vocabulary: int, length: int) -> torch.Tensor:
    """Every completion once: all canvases [N, L] that are end-of-text from their first end-of-text on."""
    every = enumerate_completions(vocabulary, length)
    after = torch.arange(length) > policy.lengths(every).unsqueeze(1)
    return every[(every == EOS).where(after, True).all(1)]


class Counting:
    """A policy that notes the rows and columns that its calls compute, and on how many positions the head ran."""

    def __init__(self, policy):
        self.policy, self.calls = policy, []
        self.mask_id, self.tokenizer, self.eos_ids = policy.mask_id, policy.tokenizer, policy.eos_ids
        self.lengths, self.prefix = policy.lengths, policy.prefix

    def __call__(self, ids, attention, select, reduce, *columns, prefix=None):
        known = 0 if prefix is None else len(prefix)
        self.calls.append(((len(ids), ids.shape[1] - known), int(select.sum())))
        return self.policy(ids, attention, select, reduce, *columns, prefix=prefix)
