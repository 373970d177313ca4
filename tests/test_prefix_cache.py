"""The prefix cache: what it computes, and what it saves."""

import pytest
import torch
import torch.nn.functional as F
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


class StalePrefix:
    """A second implementation beside the first, without a cache: their logits are compared in every pass.

    Within a block, the network reads the block's first canvas and, behind it, the present canvas from the prefix's
    end on. The first canvas attends to itself alone, the rest to the first canvas's prefix and to itself.
    """

    def __init__(self, policy: Policy):
        self.policy, self.mask_id, self.errors = policy, policy.mask_id, []

    def prefix(self, start: int):
        self.first, self.known, self.cache = None, start - self.policy.shift, self.policy.prefix(start)
        return self

    def keep(self, rows: torch.Tensor) -> None:
        self.first = self.first[rows]
        self.cache.keep(rows)

    def __call__(self, ids, attention, select, reduce, *columns, prefix):
        def compared(logits, *columns):
            self.errors.append((logits - self.logits(ids, attention, select)).abs().max().item())
            return reduce(logits, *columns)

        return self.policy(ids, attention, select, compared, *columns, prefix=self.cache)

    def logits(self, ids, attention, select):
        self.first = ids.clone() if self.first is None else self.first
        width, known = ids.shape[1], self.known
        real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
        keys = torch.cat([real, real[:, known:]], 1)[:, None]  # [N, 1, T + rest]
        old = torch.arange(keys.shape[-1]) < width
        frozen = torch.arange(keys.shape[-1]) < known
        seen = torch.where(old.unsqueeze(1), old, frozen | ~old) & keys  # [N, queries, keys]
        dtype = self.policy.model.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
        positions = torch.cat([torch.arange(width), torch.arange(known, width)])[None]
        both = torch.cat([self.first, ids[:, known:]], 1)
        logits = self.policy.model(both, attention_mask=bias, position_ids=positions).logits[:, width:]
        row, position = select[:, known:].nonzero(as_tuple=True)
        return logits[row, position - self.policy.shift]


def padded(rows: int, width: int = 6) -> Prompts:
    prompts = some_prompts(rows, width)
    return Prompts(prompts.ids, torch.arange(width) >= torch.arange(rows).unsqueeze(1) % 4)


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
    stale = StalePrefix(policy)
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
