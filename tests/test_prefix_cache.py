"""The prefix cache: what it computes, and what it saves."""

import pytest
import torch
import torch.nn.functional as F
from cache_cases import Stale, padded
from decoder_cases import policy_fixture  # noqa: F401
from decoding_cases import keys_of, peaky_policy, rng, some_prompts

from espo_lightning import (
    Decoding,
    LoRA,
    Policy,
    Prompts,
    dream_schedule,
    entropy_order,
    generate,
)


def with_lora(policy: Policy) -> Policy:
    from espo_lightning.policies.lora import add_adapter

    base = peaky_policy(3)
    model = add_adapter(base.model, LoRA(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng(13))
    return Policy(model, base.tokenizer, mask_id=base.mask_id, shift=policy.shift).eval()


CACHED = [
    Decoding(12, 4, 12, prefix_cache=True),
    Decoding(12, 12, 6, 0.7, prefix_cache=True),
    Decoding(12, 6, 6, 1.0, entropy_order, 0.9, 0.1, dream_schedule, prefix_cache=True),
    Decoding(12, 6, 12, 0.7, threshold=0.5, prefix_cache=True),
]


@pytest.mark.parametrize("decoding", CACHED, ids=range(len(CACHED)))
@pytest.mark.parametrize("lora", [False, True], ids=["", "LoRA"])
@pytest.mark.parametrize("prompts", [some_prompts(5), padded(5), some_prompts(5, 1)], ids=["", "padded", "one token"])
def test_prefix_cache_is_what_it_says(policy, decoding, lora, prompts):
    """Logits reach 25; the two ways agree to their rounding to float32. The full decoding goes another way."""
    policy, keys = (with_lora(policy) if lora else policy).double(), keys_of(10, 5)
    assert policy.selective
    stale = Stale(policy)
    ours = generate(stale, prompts, keys, decoding)
    assert max(stale.errors) < 1e-5
    without = Decoding(**{**vars(decoding), "prefix_cache": False})
    if prompts.ids.shape[1] > 1:
        assert not torch.equal(ours, generate(policy, prompts, keys, without))


def test_prefix_cache_is_exact_in_a_network_of_one_layer(policy):
    """There, keys and values depend on nothing but their own token."""
    from espo_lightning import new_policy

    base = new_policy(hidden_size=32, layers=1, heads=2, intermediate_size=48, seed=1)
    base.model.lm_head.weight.data.mul_(20)
    base.model.model.layers[0].self_attn.o_proj.weight.data.mul_(20)
    single = Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=policy.shift).eval()
    prompts, keys = padded(16), keys_of(11, 16)
    for decoding in CACHED:
        without = Decoding(**{**vars(decoding), "prefix_cache": False})
        ours = generate(single, prompts, keys, decoding)
        assert torch.equal(ours, generate(single, prompts, keys, without))


def test_later_passes_compute_only_what_follows_the_prefix(policy):
    widths = []
    hook = policy.model.model.embed_tokens.register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1]))
    generate(policy, some_prompts(3), keys_of(12, 3), Decoding(12, 4, 12, prefix_cache=True))
    hook.remove()
    assert widths == [17 if step % 4 == 0 else 12 - step // 4 * 4 + policy.shift for step in range(12)]


def test_gradient_checkpointing_does_not_drop_the_cache():
    """transformers' checkpointed layers ignore a cache in train mode, the only mode in which they checkpoint."""
    from espo_lightning.policies.load import _checkpoint_layers

    policy, prompts, keys = peaky_policy(3), some_prompts(4), keys_of(13, 4)
    expected = generate(policy, prompts, keys, CACHED[0])
    _checkpoint_layers(policy)
    policy.train()
    assert torch.equal(generate(policy, prompts, keys, CACHED[0]), expected)
    assert all(module.training for module in policy.modules())


def test_a_network_with_code_of_its_own_has_no_prefix_cache():
    policy = peaky_policy(3)
    policy = Policy(policy.model, policy.tokenizer, mask_id=policy.mask_id, whole_last_layer=True)
    with pytest.raises(ValueError, match="prefix_cache needs a Llama, Qwen2 or Qwen3 network"):
        generate(policy, some_prompts(1), keys_of(1, 1), CACHED[0])


def test_one_name_is_enough_on_the_command_line(capsys):
    import yaml

    from espo_lightning import fit as command

    names = {"order": "entropy_order", "schedule": "dream_schedule"}
    flags = [f"--model.decoding.{key}=espo_lightning.{name}" for key, name in names.items()]
    flags += ["--model.decoding.threshold=null", "--model.decoding.top_p=0.9", "--model.decoding.early_stop=true"]
    with pytest.raises(SystemExit) as done:
        command.main([*flags, "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["decoding"]["init_args"]
    assert {key: printed[key].rsplit(".", 1)[1] for key in names} == names
    assert (printed["top_p"], printed["early_stop"]) == (0.9, True)


def test_padding_does_not_matter_to_a_cached_prefix(policy):
    """The same prompt, bare and behind four pads, with the same key."""
    prompts, keys = some_prompts(4), keys_of(14, 4)
    ids, mask = F.pad(prompts.ids, (4, 0)), F.pad(torch.ones_like(prompts.ids, dtype=torch.bool), (4, 0))
    bare = generate(policy, prompts, keys, CACHED[3])
    assert torch.equal(generate(policy, Prompts(ids, mask), keys, CACHED[3]), bare)
