"""Causal checkpoints as diffusion policies: what changes, what does not, and that sft then teaches them to denoise."""

import json
from functools import partial

import pytest
import torch
from checkpoint_cases import tokens
from checkpoints import SIZE, VOCABULARY, random_model, write, write_tokenizer
from conftest import Letters, fit, small_module
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from espo_lightning import ELBO, Decoding, LoRA, generate, load_policy, new_policy, sft
from espo_lightning.keys import fold_in
from espo_lightning.policies.load import attends_forward
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

CASES = {  # the tokenizer has a mask token; needs a row; has a spare one
    "own mask": (LlamaConfig, VOCABULARY, "", {}),
    "one more row": (LlamaConfig, VOCABULARY, "mask_token", {}),
    "one more row, tied": (Qwen2Config, VOCABULARY, "mask_token", {"tie_word_embeddings": True}),
    "spare row": (Qwen2Config, VOCABULARY + 8, "mask_token", {}),
}


@pytest.fixture(params=CASES)
def causal(request, tmp_path):
    """A causal checkpoint folder and whether it must be given a mask token."""
    config, rows, without, changes = CASES[request.param]
    folder = tmp_path / "causal"
    with torch.random.fork_rng(devices=[]):
        random_model(config(**SIZE | {"vocab_size": rows}, num_key_value_heads=2, **changes)).save_pretrained(folder)
    write_tokenizer(folder, without=without)
    return folder, bool(without)


def logits(policy, ids: torch.Tensor) -> torch.Tensor:
    """What follows every token, [N, T, V]."""
    select = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)
    select[:, 0] = False
    with torch.no_grad():
        return policy(ids, None, select, lambda x: x).view(*ids.shape, -1)


def test_a_causal_checkpoint_becomes_a_diffusion_policy_and_stays_one(causal, tmp_path):
    folder, new = causal
    before, policy = load_policy(folder), load_policy(folder, denoise=True)
    assert before.causal
    assert before.tokenizer.mask_token_id == (None if new else policy.mask_id)  # loading it alters nothing on disk
    assert (policy.causal, policy.shift) == (False, 1)
    assert policy.mask_id == policy.tokenizer.mask_token_id == (VOCABULARY if new else 2)
    assert attends_forward(policy)
    assert not policy.training
    for name, old in before.model.state_dict().items():
        weight, mask = policy.model.state_dict()[name], policy.mask_id
        if new and weight.shape[0] > VOCABULARY:
            assert torch.equal(weight[:mask], old[:mask])
            assert torch.equal(weight[mask + 1 :], old[mask + 1 :])
            torch.testing.assert_close(weight[mask], old[:mask].mean(0))
        else:
            assert torch.equal(weight, old)
    tied = policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert tied == before.config.tie_word_embeddings
    one = tokens(3, 1)  # with a single token there is nothing to look ahead to: it predicts the next one as before
    torch.testing.assert_close(logits(policy, one)[..., :VOCABULARY], logits(before, one)[..., :VOCABULARY])
    policy.save(tmp_path / "out")
    again, ids = load_policy(tmp_path / "out"), tokens(2, 7)
    assert (again.causal, again.shift, again.mask_id) == (False, 1, policy.mask_id)
    assert torch.equal(logits(again, ids), logits(policy, ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, logits(policy, ids))
    assert again.tokenizer("w1 w2")["input_ids"] == before.tokenizer("w1 w2")["input_ids"]
    completion = generate(again, again.encode(["w1", "w2 w3"]), torch.arange(2), Decoding(8, 4, 4))
    assert not (completion == again.mask_id).any()


def test_a_mask_word_that_the_vocabulary_has_already_keeps_its_row(tmp_path):
    with torch.random.fork_rng(devices=[]):
        random_model(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, without="mask_token")
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w9"', '"<|mask|>"'))
    policy = load_policy(tmp_path, denoise=True)
    assert policy.mask_id == 13
    assert torch.equal(policy.model.lm_head.weight, load_policy(tmp_path).model.lm_head.weight)


def test_sft_teaches_it_to_denoise(tmp_path):
    """From a causal policy that never saw the letters to one that fills a canvas of masks with them, and RL goes on."""
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True).save(tmp_path / "causal")
    policy = load_policy(tmp_path / "causal", denoise=True)
    module = SFTModule(policy, length=4, likelihood=ELBO(), optimizer=partial(torch.optim.Adam, lr=1e-2))
    fit(module, 60)
    policy.save(tmp_path / "diffusion")
    policy = load_policy(tmp_path / "diffusion")
    prompts = policy.encode([Letters().problem("train", 0, i).prompt for i in range(3)])
    completion = generate(policy, prompts, fold_in(0, torch.arange(3)), Decoding(4, 4, 4).greedy)
    assert policy.decode(completion) == ["aaaa"] * 3
    fit(small_module(policy), 1)


def test_from_the_command_line(tmp_path):
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True).save(tmp_path / "causal")
    sft.main([
        f"--run_dir={tmp_path / 'run'}", "--data.batches=1", "--data.batch_size=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--model.policy=espo_lightning.load_policy",
        f"--model.policy.path={tmp_path / 'causal'}", "--model.policy.denoise=true",
    ])  # fmt: skip
    assert load_policy(tmp_path / "run" / "policy").shift == 1
    config = json.loads((tmp_path / "run" / "policy" / "config.json").read_text())
    assert (config["is_causal"], config["logits_shift"], config["mask_token_id"]) == (False, 1, 2)


def test_refusals(tmp_path):
    with torch.random.fork_rng(devices=[]):
        for kind in ("llama", "llada"):
            write(tmp_path / kind, kind)
    with pytest.raises(ValueError, match="this one denoises already: drop it"):
        load_policy(tmp_path / "llada", denoise=True)
    with pytest.raises(ValueError, match="changes the base, which an adapter does not store"):
        load_policy(tmp_path / "llama", denoise=True, lora=LoRA(rank=2))
    load_policy(tmp_path / "llama", lora=LoRA(rank=2)).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="changes the base, which an adapter does not store"):
        load_policy(tmp_path / "adapter", denoise=True)
