"""Checkpoints in the original formats of LLaDA, Dream, Llama, Qwen2 and Qwen3, small and random."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import EOS, GOLDEN, MASK, PAD, VOCABULARY, write, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from espo_lightning import ESPOModule
from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.export import export, main
from espo_lightning.policies.files import resolve
from espo_lightning.policies.load import attends_forward, load_policy
from espo_lightning.policies.lora import LoRA
from espo_lightning.policies.policy import Prompts
from espo_lightning.policies.reference import AdapterOff, FrozenReference, make_reference
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.scoring.score import score
from espo_lightning.training.strategies import copy_weights

MASKED = ["llada", "llada_gqa_sharded", "llada_tied", "dream", "llama_masked", "qwen3_masked"]
CAUSAL = ["llama", "qwen2", "qwen3"]
SMALL = LoRA(rank=4, alpha=8)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in MASKED + CAUSAL:
        write(root / kind, kind)
    return root


@pytest.fixture
def llada(checkpoints, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints / "llada_gqa_sharded", tmp_path / "ckpt"))


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def logits(policy, ids, attention=None) -> torch.Tensor:
    """Logits [N, T - shift, V]: entry i predicts token i + shift."""
    select = torch.ones_like(ids, dtype=torch.bool)
    select[:, : policy.shift] = False
    with torch.no_grad():
        return policy(ids, attention, select, lambda x: x).view(len(ids), -1, VOCABULARY)


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def scores(policy, prompts=None, completion=None, rows=slice(None)) -> torch.Tensor:
    prompts = prompts or Prompts(tokens(3, 5), None)
    completion = tokens(3, 6, seed=1) if completion is None else completion
    masks = ELBO(draws=2).draw(torch.arange(3), 6)
    with torch.no_grad():
        return score(
            policy, prompts, completion, type(masks)(*(x[:, rows] if torch.is_tensor(x) else x for x in masks))
        )


def state(policy) -> dict:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


# ---- what is loaded -------------------------------------------------------------------------------------------------


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


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKED + CAUSAL)
def test_saved_policy_opens_here_and_in_transformers(checkpoints, tmp_path, kind):
    policy, ids = load_policy(checkpoints / kind), tokens(2, 7)
    policy.save(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert (again.mask_id, again.shift, again.causal) == (policy.mask_id, policy.shift, policy.causal)
    assert torch.equal(logits(again, ids), logits(policy, ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        full = theirs(ids).logits
    assert torch.equal(full[:, : ids.shape[1] - policy.shift], logits(policy, ids))
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert again.encode(["w1 w2"]).ids.tolist() == policy.encode(["w1 w2"]).ids.tolist()


@pytest.mark.parametrize("kind", ["llada", "llada_gqa_sharded", "llada_tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llada_export_is_the_original_bit_for_bit(checkpoints, tmp_path, kind, dtype):
    original = Path(shutil.copytree(checkpoints / kind, tmp_path / "original"))
    for file in original.glob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    load_policy(original, dtype="auto").save(tmp_path / "hf")  # through our own folder, which must forget nothing
    for n, source in enumerate([original, tmp_path / "hf"]):
        export(str(source), str(tmp_path / f"out{n}"))
        weights = {k: v for file in original.glob("*.safetensors") for k, v in load_file(file).items()}
        written = load_file(tmp_path / f"out{n}" / "model.safetensors")
        assert written.keys() == weights.keys()
        assert all(torch.equal(written[k], weights[k]) and written[k].dtype == dtype for k in weights)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / f"out{n}")]
        assert configs[0] == configs[1]


def test_export_of_a_policy_that_never_was_llada(checkpoints, tmp_path, capsys):
    export(str(checkpoints / "llama_masked"), str(tmp_path / "llada"), "llada")
    again = load_policy(tmp_path / "llada")
    assert json.loads((tmp_path / "llada" / "config.json").read_text())["model_type"] == "llada"
    assert torch.equal(scores(again), scores(load_policy(checkpoints / "llama_masked")))
    for kind in ("dream", "llama", "qwen3_masked"):
        with pytest.raises(ValueError, match="--format hf"):
            export(str(checkpoints / kind), str(tmp_path / kind), "llada")
        assert not (tmp_path / kind).exists()
    main(["--policy", str(checkpoints / "dream"), "--output", str(tmp_path / "hf"), "--format", "hf"])
    assert torch.equal(scores(load_policy(tmp_path / "hf")), scores(load_policy(checkpoints / "dream")))
    assert capsys.readouterr().out.count("\n") == 1


def test_export_cli_errors_are_one_message_and_exit_2(checkpoints, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main(["--policy", str(checkpoints / "llada"), "--output", str(tmp_path / "full")])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    *usage, error = printed.err.splitlines()
    assert error.startswith("error: ")
    assert "is not empty" in error
    assert all(line.startswith(("usage: ", "tip: ")) for line in usage)
    assert [x.name for x in (tmp_path / "full").iterdir()] == ["precious"]


def test_export_cli_errors_in_process(checkpoints, tmp_path, capsys):
    for argv, message in [
        (["--policy", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")], "does not exist"),
        (["--policy", str(checkpoints / "llada"), "--output", str(tmp_path / "out"), "--format", "gguf"], "gguf"),
        (["--policy", str(checkpoints / "llada")], "output"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


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


# ---- remote code ----------------------------------------------------------------------------------------------------

REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

class OtherConfig(LlamaConfig):
    model_type = "other"

class OtherModel(LlamaForCausalLM):
    config_class = OtherConfig

    def __init__(self, config):
        super().__init__(config)
        {change}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("self.config.is_causal = False", None),
        ("pass", "attends backwards only"),
        ("self.inner = self.model; del self.model", "laid out like LlamaForCausalLM"),
        ("raise RuntimeError('old code')", "old code"),
    ],
)
def test_remote_code_only_on_request_and_only_if_it_attends_in_both_directions(checkpoints, tmp_path, change, message):
    folder = Path(shutil.copytree(checkpoints / "llama_masked", tmp_path / "other"))
    auto_map = {"AutoConfig": "modeling_other.OtherConfig", "AutoModelForCausalLM": "modeling_other.OtherModel"}
    edit(folder / "config.json", model_type="other", auto_map=auto_map, is_causal="absent")
    (folder / "modeling_other.py").write_text(REMOTE.format(change=change))
    with pytest.raises(ValueError, match=r"unknown model_type 'other'.*llada, Dream.*trust_remote_code"):
        load_policy(folder)
    if message:
        with pytest.raises(ValueError, match=message):
            load_policy(folder, trust_remote_code=True)
    else:
        policy = load_policy(folder, trust_remote_code=True)
        assert (policy.mask_id, policy.shift, policy.causal) == (MASK, 0, False)
        assert torch.equal(scores(policy), scores(load_policy(checkpoints / "llama_masked")))


# ---- hub ids and bad input ------------------------------------------------------------------------------------------


def test_hub_ids_are_downloaded_and_local_paths_never_are(checkpoints, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404 not found\nsecond line")
        return str(checkpoints / "llada")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    policy = load_policy("owner/name")
    assert policy.model.name_or_path == "owner/name"
    assert [name for name, _ in asked] == ["owner/name"]
    assert {"*.json", "*.safetensors"} <= set(asked[0][1])
    assert "*.py" not in asked[0][1]
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder.*404 not found$"):
        resolve("nobody/nothing")
    asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("/no/where", "./a", "../a/b", "~/nowhere-at-all", "runs/typo", "a/b/c", "name", "a/", "file"):
        with pytest.raises(
            FileNotFoundError, match=r"(does not exist|is a file): expected a checkpoint folder"
        ) as error:
            resolve(path)
        assert path in str(error.value)
    assert not asked


def shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def change_weights(folder: Path, change) -> None:
    weights = load_file(shard(folder))
    change(weights)
    save_file(weights, shard(folder))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got list"),
        (lambda f: edit(f / "config.json", d_model="absent"), ValueError, "lacks 'd_model'"),
        (lambda f: edit(f / "config.json", model_type="gpt2"), ValueError, "unknown model_type 'gpt2'.*llada, Dream"),
        (lambda f: edit(f / "config.json", model_type="absent"), ValueError, "unknown model_type None"),
        (lambda f: edit(f / "config.json", alibi=True), ValueError, "no Llama.*alibi"),
        (lambda f: edit(f / "config.json", n_layers=3), ValueError, r"missing model\.transformer\.blocks\.2"),
        (lambda f: edit(f / "config.json", n_layers=1), ValueError, r"unexpected model\.transformer\.blocks\.1"),
        (lambda f: edit(f / "config.json", embedding_size=99), ValueError, r"wte\.weight is \[64, 32\].*\[99, 32\]"),
        (lambda f: shard(f).unlink(), FileNotFoundError, "lacks model-00001-of-00002.safetensors"),
        (lambda f: shard(f).write_bytes(b"junk"), ValueError, "model-00001-of-00002.safetensors is damaged"),
        (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), ValueError, "is damaged"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), FileNotFoundError, "lacks model.safetensors: copy"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ValueError, "has no weight_map"),
        (lambda f: change_weights(f, lambda w: w.update(extra=torch.ones(1))), ValueError, "unexpected extra"),
        (lambda f: change_weights(f, lambda w: w.pop(next(iter(w)))), ValueError, r"missing model\.transformer"),
        (
            lambda f: change_weights(f, lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})),
            ValueError,
            "torch.int8, where config.json needs floats",
        ),
        (lambda f: write_tokenizer(f, without="eos_token"), ValueError, "no end-of-text token"),
        (
            lambda f: [(f / "chat_template.jinja").unlink(), write_tokenizer(f, without="chat_template")],
            ValueError,
            "no chat template",
        ),
        (lambda f: write_tokenizer(f, extra=5), ValueError, "do not belong together: token id 68.*64 rows"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "tokenizer of .* cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), ValueError, "tokenizer of .* cannot be read"),
        (
            lambda f: [write_tokenizer(f, without="mask_token"), edit(f / "config.json", mask_token_id="absent")],
            ValueError,
            "no mask token: set mask_token_id",
        ),
        (lambda f: edit(f / "config.json", mask_token_id=64), ValueError, "token id 64"),
    ],
)
def test_bad_checkpoints_say_what_is_wrong(llada, damage, error, message):
    damage(llada)
    with pytest.raises(error, match=message):
        load_policy(llada)


def test_bad_arguments_say_what_is_wrong(checkpoints, tmp_path):
    llada = checkpoints / "llada"
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto, got 'fp8'"):
        load_policy(llada, dtype="fp8")
    with pytest.raises(ValueError, match="attention='magic'"):
        load_policy(llada, attention="magic")
    with pytest.raises(ValueError, match=r"target_modules \['query'\].*choose from.*'q_proj'"):
        load_policy(llada, lora=LoRA(rank=2, target_modules=("q_proj", "query")))
    for bad in ({"rank": 0}, {"alpha": 0}, {"target_modules": ()}):
        with pytest.raises(ValueError, match="LoRA needs"):
            LoRA(**bad)
    copy = Path(shutil.copytree(checkpoints / "llama_masked", tmp_path / "copy"))
    for shift in (2, "absent"):
        edit(copy / "config.json", logits_shift=shift)
        with pytest.raises(ValueError, match="logits_shift must be 0"):
            load_policy(copy)


def test_bad_adapters_say_what_is_wrong(checkpoints, tmp_path):
    load_policy(checkpoints / "llada", lora=SMALL).save(tmp_path / "good")

    def damaged(name: str, **changes) -> Path:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / name))
        edit(folder / "adapter_config.json", **changes)
        return folder

    with pytest.raises(ValueError, match="already is a LoRA adapter"):
        load_policy(tmp_path / "good", lora=SMALL)
    with pytest.raises(ValueError, match=r"does not fit its base .*llada_gqa"):
        load_policy(damaged("gqa", base_model_name_or_path=str(checkpoints / "llada_gqa_sharded")))
    with pytest.raises(ValueError, match="does not fit its base"):
        load_policy(damaged("rank", r=5))
    with pytest.raises(FileNotFoundError, match=r"base of the adapter .* is gone \(/no/where"):
        load_policy(damaged("gone", base_model_name_or_path="/no/where"))
    with pytest.raises(ValueError, match="set base_model_name_or_path"):
        load_policy(damaged("none", base_model_name_or_path=None))
    folder = damaged("no_weights")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        load_policy(folder)
    folder = damaged("junk")
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not fit its base"):
        load_policy(folder)
