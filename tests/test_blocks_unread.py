"""Block passes leave out what nobody reads: of a clean pass the last layer's output, of equal rows all but one."""

import pytest
import torch
from block_cases import block_policy, keys_of, some_prompts
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from espo_lightning import BlockDecoding, BlockELBO, Layout, Policy

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def policy_of(kind: str) -> Policy:
    """Random weights of a family, norms and biases included, with grouped queries."""
    tiny = block_policy(4, "response")
    config, network = FAMILIES[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = config(vocab_size=len(tiny.tokenizer), intermediate_size=48, **sizes)
    settings.is_causal = False
    generator, model = torch.Generator().manual_seed(0), network(settings).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return Policy(model, tiny.tokenizer, mask_id=tiny.mask_id, layout=Layout(4, "response")).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pass_that_predicts_nothing_writes_the_keys_of_one_that_does(kind):
    policy, ids = policy_of(kind), torch.randint(7, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    sees = torch.ones(3, 8, 8, dtype=torch.bool).tril(3)
    caches = []
    for predicted in (False, True):
        prefix = policy.prefix()
        with torch.no_grad():
            values = policy(
                ids, sees, torch.full_like(ids, predicted, dtype=torch.bool), lambda x: x[:, 0], prefix=prefix
            )
        assert len(values) == 24 * predicted
        caches.append([(layer.keys, layer.values) for layer in prefix.cache.layers])
    for silent, spoken in zip(*caches):
        assert all(torch.equal(a, b) for a, b in zip(silent, spoken))


def test_the_last_layer_of_such_a_pass_makes_no_queries():
    policy, asked = policy_of("llama"), []
    policy.layers[-1].self_attn.q_proj.register_forward_hook(lambda *_: asked.append(True))
    ids, sees = torch.full((1, 4), 9), torch.ones(1, 4, 4, dtype=torch.bool)
    for predicted in (False, True):
        policy(ids, sees, torch.full_like(ids, predicted, dtype=torch.bool), lambda x: x[:, 0], prefix=policy.prefix())
        assert len(asked) == predicted


@pytest.mark.parametrize("origin", ["global", "response"])
def test_rows_that_are_alike_need_not_be_cut_one_by_one(origin):
    """The same prompts, said to be without padding, or with a mask that hides nothing."""
    policy, told = block_policy(4, origin), some_prompts((6, 6, 6))
    plain = told._replace(mask=None)
    assert [policy.layout.slots(prompts, 8).alike for prompts in (plain, told)] == [True, False]
    completions = [BlockDecoding(8, 4, 8).generate(policy, prompts, keys_of(3)) for prompts in (plain, told)]
    assert torch.equal(*completions)
    law, gradients = BlockELBO(3, block=4), []
    masks = law.draw(keys_of(3), 8)
    for prompts in (plain, told):
        policy.zero_grad()
        terms = law.log_probs(policy, prompts, completions[0], masks)
        terms.sum().backward()
        gradients.append((terms, *(weight.grad.clone() for weight in policy.parameters())))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
