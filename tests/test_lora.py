"""Adapters, and the references beside them."""

import json

import pytest
import torch
from checkpoint_cases import (
    SMALL,
    checkpoints_fixture,  # noqa: F401
    edit,
    scores,
    tokens,
)
from safetensors.torch import load_file

from espo_lightning import ESPOModule
from espo_lightning.export import export
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.lora import LoRA
from espo_lightning.policies.reference import AdapterOff, FrozenReference, make_reference
from espo_lightning.training.strategies import copy_weights


def state(policy) -> dict:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


# ---- LoRA and references --------------------------------------------------------------------------------------------


def perturb(policy, seed=7) -> None:
    """Stand-in for training: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("kind", ["llada_gqa_sharded", "dream", "llama_masked", "qwen3_masked"])
def test_lora_life(checkpoints, tmp_path, kind):
    """No effect at first; adapters off = base; saved for peft and for us; merged by export."""
    from peft import PeftModel

    base = load_policy(checkpoints / kind)
    plain = scores(base)
    policy = load_policy(checkpoints / kind, lora=SMALL)
    assert {n.rpartition(".lora_")[2][0] for n, p in policy.named_parameters() if p.requires_grad} == {"A", "B"}
    assert torch.equal(scores(policy), plain)
    perturb(policy)
    trained = scores(policy)
    assert (trained - plain).abs().max() > 0.1
    reference = make_reference(policy)
    assert isinstance(reference, AdapterOff)
    assert torch.equal(scores(reference), plain)
    assert torch.equal(scores(policy), trained)
    assert all(p.requires_grad == ("lora_" in n) for n, p in policy.named_parameters())
    with pytest.raises(ValueError, match="reference_sync is not possible with adapters"):
        ESPOModule(policy, reference_sync=2)

    policy.save(tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in key for key in written)
    again = load_policy(tmp_path / "adapter")
    assert torch.equal(scores(again), trained)
    assert torch.equal(scores(make_reference(again)), plain)
    assert all(p.requires_grad == ("lora_" in n) for n, p in again.named_parameters())
    base.model = PeftModel.from_pretrained(base.model, tmp_path / "adapter")
    assert torch.equal(scores(base), trained)

    export(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = load_policy(tmp_path / "merged")
    assert not merged.has_adapters
    torch.testing.assert_close(scores(merged), trained, atol=1e-3, rtol=0)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    kept = json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"]
    assert kept == {"llada_gqa_sharded": "llada", "dream": "qwen2"}.get(kind, kind.removesuffix("_masked"))


def test_lora_initialisation_depends_on_its_seed_alone(checkpoints):
    rng, python = torch.get_rng_state(), __import__("random").getstate()
    first = state(load_policy(checkpoints / "llada", lora=SMALL))
    assert torch.equal(torch.get_rng_state(), rng)
    assert __import__("random").getstate() == python
    with torch.random.fork_rng():
        torch.rand(5)
        second = state(load_policy(checkpoints / "llada", lora=SMALL))
        other = state(load_policy(checkpoints / "llada", lora=LoRA(rank=4, alpha=8, seed=1)))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, other[name]) != ("lora_A" in name)
        if "lora_A" in name:  # uniform on +-1/sqrt(fan in)
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
        if "lora_B" in name:
            assert not tensor.any()


def test_lora_defaults_are_the_papers(checkpoints):
    policy = load_policy(checkpoints / "dream", lora=LoRA())
    config = policy.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 64, 0.0)
    layers = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in policy.named_parameters() if "lora_A" in n}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}


def test_adapters_trained_elsewhere_with_dropout_score_without_it(checkpoints, tmp_path):
    policy = load_policy(checkpoints / "llada", lora=SMALL)
    perturb(policy)
    policy.save(tmp_path)
    edit(tmp_path / "adapter_config.json", lora_dropout=0.5)
    again = load_policy(tmp_path, gradient_checkpointing=True)
    assert again.training
    assert torch.equal(scores(again), scores(policy))


def test_frozen_reference(checkpoints):
    policy = load_policy(checkpoints / "llada")
    reference = make_reference(policy)
    assert isinstance(reference, FrozenReference)
    before = scores(policy)
    ids, select = tokens(1, 4), torch.ones(1, 4, dtype=torch.bool)
    assert not reference(ids, None, select, lambda x: x).requires_grad
    perturb(policy)
    assert torch.equal(scores(reference), before)
    assert not any(p.requires_grad for p in reference.parameters())
    torch.nn.ModuleList([reference]).train()
    assert not any(module.training for module in reference.modules())
    copy_weights(reference.policy, policy)
    assert torch.equal(scores(reference), scores(policy))
    perturb(policy, seed=8)
    assert not torch.equal(scores(reference), scores(policy))
