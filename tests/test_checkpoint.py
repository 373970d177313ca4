"""What is loaded from the checkpoints of every family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import CAUSAL, MASKED, SMALL, checkpoints_fixture, edit, llada_fixture, logits, scores, tokens  # noqa: F401
from checkpoints import EOS, GOLDEN, MASK, PAD, VOCABULARY, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.policies.load import attends_forward, load_policy
from espo_lightning.policies.policy import Prompts


def test_golden_logits(tmp_path):
    write_tokenizer(tmp_path)
    shutil.copy(GOLDEN / "tiny.safetensors", tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "tiny.config.json", tmp_path / "config.json")
    golden = json.loads((GOLDEN / "tiny.logits.json").read_text())
    for attention in ("sdpa", "eager"):
        policy = load_policy(tmp_path, attention=attention)
        for ids, expected in ("ids", "logits"), ("masked_ids", "masked_logits"):
            torch.testing.assert_close(
                logits(policy, torch.tensor([golden[ids]]))[0], torch.tensor(golden[expected]), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("kind", MASKED + CAUSAL)
def test_facts_and_logits_of_every_format(checkpoints, kind):
    """Against transformers' own from_pretrained where it opens the format, and eager against SDPA."""
    rng = torch.get_rng_state()
    policy = load_policy(checkpoints / kind)
    assert torch.equal(torch.get_rng_state(), rng)
    expected = (None, 1, True) if kind in CAUSAL else (MASK, int(kind in ("dream", "qwen3_masked")), False)
    assert (policy.mask_id, policy.shift, policy.causal) == expected
    assert not policy.training
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert not any(x.is_meta for x in [*policy.parameters(), *policy.buffers()])
    assert policy.model.model.embed_tokens.padding_idx is None
    tied = policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert tied == (kind in ("llada_tied", "qwen2"))
    ids = tokens(2, 9)
    ours = logits(policy, ids)
    assert ours.std() > 0.1
    eager = load_policy(checkpoints / kind, attention="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager, ids), ours, atol=2e-5, rtol=0)
    if kind not in ("dream",) and not kind.startswith("llada"):
        theirs = AutoModelForCausalLM.from_pretrained(checkpoints / kind).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits[:, : ours.shape[1]], ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MASKED + CAUSAL)
def test_attention_is_full_or_causal(checkpoints, kind, attention):
    policy = load_policy(checkpoints / kind, attention=attention)
    ids = tokens(1, 8)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] - 3) % 60 + 4
    padded = torch.ones_like(ids, dtype=torch.bool)
    padded[0, 1] = False  # any hole makes an explicit mask
    for mask in (None, padded):
        moved = (logits(policy, ids, mask) - logits(policy, other, mask)).abs().amax(-1)[0]
        assert (moved[0] > 1e-3) == (kind in MASKED)
        if kind in CAUSAL:
            assert moved.max() == 0  # the last token is seen by nobody before it
    assert attends_forward(policy) == (kind in MASKED)


def test_dream_predicts_token_i_from_hidden_state_i_minus_1(checkpoints):
    policy, ids = load_policy(checkpoints / "dream"), tokens(1, 7)
    with torch.no_grad():
        hidden = policy.model.model(ids).last_hidden_state
        select = torch.zeros_like(ids, dtype=torch.bool)
        select[0, [3, 6]] = True
        expected = policy.model.lm_head(hidden[0, [2, 5]])
        # the last layer's MLP runs on two rows instead of seven: other matmul kernels, so not bit for bit
        torch.testing.assert_close(policy(ids, None, select, lambda x: x), expected, rtol=1e-5, atol=1e-6)
    unshifted = load_policy(checkpoints / "llada")
    with torch.no_grad():
        hidden = unshifted.model.model(ids).last_hidden_state
        expected = unshifted.model.lm_head(hidden[0, [3, 6]])
        torch.testing.assert_close(unshifted(ids, None, select, lambda x: x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_ignore_padding_and_batch_mates(checkpoints, kind, attention):
    policy = load_policy(checkpoints / kind, attention=attention)
    ids, completion = tokens(3, 5), tokens(3, 6, seed=1)
    pads = [0, 2, 4]  # the rows' real prompts are their last 5 - n tokens
    mask = torch.arange(5) >= torch.tensor(pads)[:, None]
    together = scores(policy, Prompts(ids.where(mask, PAD), mask), completion)
    for i, n in enumerate(pads):
        alone = scores(policy, Prompts(ids[i : i + 1, n:], None), completion[i : i + 1], slice(i, i + 1))
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-4, rtol=0)
    other_pads = scores(policy, Prompts(ids.where(mask, EOS), mask), completion)
    assert torch.equal(other_pads, together)
    visible = scores(policy, Prompts(ids.where(mask, PAD), None), completion)
    assert (visible[:, 1:] - together[:, 1:]).abs().max() > 1e-2  # attending to the pads would have been seen


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("kind", ["llada", "dream", "llama"])
def test_flex_attention_is_full_or_causal_and_ignores_padding(checkpoints, kind):
    """The forward pass; torch has no backward pass of it on CPUs."""
    flex = load_policy(checkpoints / kind, attention="flex_attention").requires_grad_(False)
    ids = torch.randint(MASK + 1, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 24, dtype=torch.bool)
    real[0, :5], real[1, :11] = False, False
    for attention in (None, real):
        expected = logits(load_policy(checkpoints / kind), ids, attention)
        found, select = logits(flex, ids, attention), real[:, flex.shift :]
        torch.testing.assert_close(found[select], expected[select], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_logits_ignore_padding(checkpoints, kind):
    policy, ids = load_policy(checkpoints / kind), tokens(1, 6)
    mask = torch.arange(9)[None] >= 3
    padded = logits(policy, torch.cat([torch.full((1, 3), PAD), ids], 1), mask)
    torch.testing.assert_close(padded[:, 3:], logits(policy, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", MASKED)
def test_generate_keeps_prompts_and_ignores_batch_mates(checkpoints, kind):
    policy = load_policy(checkpoints / kind)
    prompts = policy.encode(["w1 w2 w3", "w7", "w9 w8"])
    before = prompts.ids.clone()
    how = Decoding(length=8, steps=4, block_length=4, temperature=1.0)
    completion = generate(policy, prompts, torch.arange(3), how)
    assert torch.equal(prompts.ids, before)
    assert not (completion == MASK).any()
    assert torch.equal(generate(policy, policy.encode(["w7"]), torch.tensor([1]), how)[0], completion[1])


def test_renamed_folder_scores_the_same(checkpoints, tmp_path):
    for kind, name in ("dream", "LLaDA-8B-Instruct"), ("llada", "Dream-v0"), ("qwen3_masked", "Llama-3"):
        copy = shutil.copytree(checkpoints / kind, tmp_path / name)
        assert torch.equal(scores(load_policy(copy)), scores(load_policy(checkpoints / kind)))


def test_bfloat16_scores_are_float32_and_close(checkpoints):
    for kind in ("llada", "dream"):
        policy = load_policy(checkpoints / kind, dtype="bfloat16")
        assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
        rounded, exact = scores(policy), scores(load_policy(checkpoints / kind))
        assert rounded.dtype == exact.dtype == torch.float32
        # the weights round by 2^-9, which moves a log-probability by a few percent of a nat
        assert 0 < ((rounded - exact).sum(-1).mean(0) / 6).abs().max() < 0.1
        inv_freq = policy.model.model.rotary_emb.inv_freq
        assert inv_freq.dtype == torch.float32
        assert torch.equal(inv_freq, load_policy(checkpoints / kind).model.model.rotary_emb.inv_freq)


def test_dtype_auto_keeps_what_is_stored(checkpoints, tmp_path):
    half = load_policy(checkpoints / "llada", dtype="bfloat16")
    half.save(tmp_path / "half")
    loaded = load_policy(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(scores(loaded), scores(half))


def test_mask_token_from_the_tokenizer_and_pad_from_eos(llada):
    edit(llada / "config.json", mask_token_id="absent", pad_token_id="absent")
    write_tokenizer(llada, without="pad_token")
    policy = load_policy(llada)
    assert policy.mask_id == policy.config.mask_token_id == MASK
    assert policy.tokenizer.pad_token_id == EOS


def test_dream_tokenizer_of_vocabulary_and_merges(checkpoints, tmp_path):
    """Dream publishes no tokenizer.json, and a tokenizer class of its own, which is Qwen2's."""
    folder = Path(shutil.copytree(checkpoints / "dream", tmp_path / "dream"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")} | {"ab": 27}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {i: token for i, token in enumerate(["<|endoftext|>", "<|im_end|>", "<|mask|>"], start=28)}
    added = {str(i): {"content": token, "special": True} for i, token in special.items()}
    config = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.X", None]}}
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    config |= {"added_tokens_decoder": added, "chat_template": "{{ messages[0]['content'] }}<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit(folder / "config.json", mask_token_id="absent")
    with pytest.raises(ValueError, match=r"eos_token_id=1, but its tokenizer ends texts with '<\|endoftext\|>', id 28"):
        load_policy(folder)  # id 1 is a "b" here
    edit(folder / "config.json", eos_token_id=28)
    policy = load_policy(folder)
    assert policy.mask_id == 30
    assert policy.encode(["ab cab"]).ids.tolist() == [[27, 26, 2, 27, 29]]
    policy.save(tmp_path / "out")
    assert load_policy(tmp_path / "out").encode(["ab cab"]).ids.tolist() == [[27, 26, 2, 27, 29]]


def test_weights_do_not_map_the_file(llada):
    policy = load_policy(llada)
    before = scores(policy)
    for shard in llada.glob("*.safetensors"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    assert torch.equal(scores(policy), before)


def test_old_rotary_buffers_and_redundant_tied_heads_are_accepted(checkpoints, tmp_path):
    copy = Path(shutil.copytree(checkpoints / "qwen2", tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copy / "model.safetensors")
    ids = tokens(1, 5)
    assert torch.equal(logits(load_policy(copy), ids), logits(load_policy(checkpoints / "qwen2"), ids))
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ValueError, match="ties the head"):
        load_policy(copy)


@pytest.mark.parametrize("lora", [None, SMALL])
@pytest.mark.parametrize("kind", ["llada", "dream", "qwen3"])
def test_gradient_checkpointing_gives_the_same_gradients(checkpoints, kind, lora):
    gradients = []
    for on in (False, True):
        policy = load_policy(checkpoints / kind, gradient_checkpointing=on, lora=lora)
        assert policy.training == on
        if lora:
            with torch.no_grad():  # off zero, where A would have no gradient
                for name, p in policy.named_parameters():
                    if "lora_B" in name:
                        p.fill_(0.01)
        runs = []
        policy.model.get_submodule(
            "base_model.model.model.layers.0.mlp" if lora else "model.layers.0.mlp"
        ).register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        ids = tokens(2, 8)
        policy(ids, None, torch.arange(8).expand(2, -1) > 3, lambda x: x.logsumexp(-1)).sum().backward()
        assert len(runs) == (2 if on else 1)
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(g.abs().max() > 0 for g in plain.values() if g.numel() > 32)
