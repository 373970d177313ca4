"""SDAR, TraDo and Tiny-A2D against networks written here from scratch; conversions; what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import EOS, MASK, PAD, VOCABULARY, write, write_tokenizer
from safetensors.torch import load_file, save_file

from espo_lightning import BlockDecoding, BlockELBO, LoRA, Prompts, load_policy, sft
from espo_lightning.export import export
from espo_lightning.lab.network import read_network
from espo_lightning.policies.layout import FULL, Layout

HIDDEN, LAYERS, HEADS, KV, HEAD, MLP, THETA, EPS = 32, 2, 4, 2, 16, 48, 5e4, 1e-6
KINDS = ("sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama")
SDAR = {  # the keys that its authors publish beside Qwen3's
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "architectures": ["SDARForCausalLM"],
    "attn_implementation": "flex_attention",
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "micro_forward": False,
    "skip_checkpoint": False,
    "use_deepep": False,
    "mask_token_id": MASK,
    "use_cache": True,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "sliding_window": None,
    "block_size": 4,
}
A2D = {"qwen3": "A2DQwen3LMHeadModel", "qwen2": "A2DQwen2LMHeadModel", "llama": "A2DLlamaLMHeadModel"}


def head_of(kind: str) -> int:
    return HIDDEN // HEADS if "qwen2" in kind else HEAD


def tied(kind: str) -> bool:
    return kind == "a2d-qwen2"


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that such a checkpoint holds, written down name by name."""
    head = head_of(kind)
    q, kv = HEADS * head, KV * head
    names = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied(kind):
        names["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        names |= {
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
            layer + "self_attn.q_proj.weight": (q, HIDDEN),
            layer + "self_attn.k_proj.weight": (kv, HIDDEN),
            layer + "self_attn.v_proj.weight": (kv, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, q),
            layer + "mlp.gate_proj.weight": (MLP, HIDDEN),
            layer + "mlp.up_proj.weight": (MLP, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, MLP),
        }
        if kind in ("sdar", "a2d-qwen3"):
            names |= {layer + "self_attn.q_norm.weight": (head,), layer + "self_attn.k_norm.weight": (head,)}
        if kind == "a2d-qwen2":
            names |= {layer + f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
    return names


def config_of(kind: str) -> dict:
    config = {
        "model_type": kind, "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": MLP, "hidden_act": "silu",
        "rms_norm_eps": EPS, "rope_theta": THETA, "rope_scaling": None, "max_position_embeddings": 128,
        "tie_word_embeddings": tied(kind), "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
        "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.02, "torch_dtype": "float32",
    }  # fmt: skip
    if "qwen2" not in kind:
        config["head_dim"] = HEAD
    else:
        del config["attention_bias"]
    return config | (SDAR if kind == "sdar" else {"architectures": [A2D[kind.removeprefix("a2d-")]]})


def checkpoint(folder: Path, kind: str, **changes) -> Path:
    """Random weights as the authors publish them; a change to None removes a key of config.json."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if "norm" in name else 0.3) + ("norm" in name)
        for name, shape in shapes(kind).items()
    }
    save_file(weights, folder / "model.safetensors")
    config = {
        key: value for key, value in (config_of(kind) | changes).items() if value is not None or key not in changes
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- the networks, from scratch -------------------------------------------------------------------------------------


def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0, 1, .. of [T, heads, d]: pairs (i, i + d/2) turn by position / theta^(2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x)).double()[:, None] / THETA ** (torch.arange(half).double() / half)
    cos, sin = (f(angle)[:, None] for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reference_logits(folder: Path, kind: str, ids: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """Of one sequence [T] in which i attends to j where sees[i, j]: [T, V], in float64."""
    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    x, size = w["model.embed_tokens.weight"][ids], head_of(kind)
    for n in range(LAYERS):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if k.startswith(f"model.layers.{n}.")}
        h = normalised(x, layer["input_layernorm.weight"])

        def project(name, h=h, layer=layer):
            out = h @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0)
            out = out.view(len(h), -1, size)
            norm = layer.get(f"self_attn.{name}_norm.weight")
            return out if norm is None else normalised(out, norm)

        q, k, v = rotated(project("q")), rotated(project("k")), project("v")
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~sees, -math.inf).softmax(-1), v).flatten(1)
        x = x + mixed @ layer["self_attn.o_proj.weight"].T
        h = normalised(x, layer["post_attention_layernorm.weight"])
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight"] if tied(kind) else w["lm_head.weight"]
    return normalised(x, w["model.norm.weight"]) @ head.T


def staircase(length: int, block: int | None) -> torch.Tensor:
    """bool [T, T]; None = everybody sees everybody."""
    if block is None:
        return torch.ones(length, length, dtype=torch.bool)
    number = torch.arange(length) // block
    return number[None, :] <= number[:, None]


def logits(policy, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    prompts = Prompts(ids[None, :prompt], None)
    sees = prompts.seen_by(policy, len(ids) - prompt)
    with torch.no_grad():
        return policy(ids[None], sees, torch.ones(1, len(ids), dtype=torch.bool), lambda x: x)


IDS = torch.randint(4, VOCABULARY, (19,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "block"), [("sdar", 4), *((kind, b) for kind in KINDS[1:] for b in (None, 4, 7))])
def test_logits_are_those_of_a_network_written_from_scratch(tmp_path, kind, block, attention):
    folder = checkpoint(tmp_path / "c", kind)
    policy = load_policy(folder, attention=attention, block=None if kind == "sdar" else block)
    assert policy.layout == (FULL if block is None else Layout(block, "global"))
    assert (policy.mask_id, policy.shift, policy.causal) == (MASK, 0, False)
    expected = reference_logits(folder, kind, IDS, staircase(len(IDS), block))
    for prompt in (0, 6, 8):
        torch.testing.assert_close(logits(policy, IDS, prompt).double(), expected, rtol=0, atol=2e-4)
    other = reference_logits(folder, kind, IDS, staircase(len(IDS), 5))
    assert (other - expected).abs().max() > 0.1


def test_config_json_may_say_the_blocks_of_a_bd3lm(tmp_path):
    folder = checkpoint(tmp_path / "c", "a2d-qwen3", block_size=8, block_origin="response")
    assert load_policy(folder).layout == Layout(8, "response")


def test_completions_are_those_of_the_network_written_from_scratch(tmp_path):
    """Greedy, one token a step, the most confident first: SDAR's static decoding with one token a step."""
    folder = checkpoint(tmp_path / "c", "sdar")
    policy, prompt, length = load_policy(folder), IDS[:6], 8
    canvas = torch.cat([prompt, torch.full((length,), MASK)])
    while (canvas == MASK).any():
        first = int((canvas == MASK).nonzero()[0])
        active = torch.arange(len(canvas)) // 4 == first // 4
        found = reference_logits(folder, "sdar", canvas, staircase(len(canvas), 4))
        found[:, MASK] = -math.inf
        confidence, token = found.softmax(-1).max(-1)
        best = int(confidence.masked_fill(~active | (canvas != MASK), -1).argmax())
        canvas[best] = token[best]
    ours = BlockDecoding(length, 4, length, 0.0).generate(policy, Prompts(prompt[None], None), torch.zeros(1).long())
    assert torch.equal(ours[0], canvas[6:])


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_original_bit_for_bit(tmp_path, kind):
    folder = checkpoint(tmp_path / "c", kind)
    export(str(folder), str(tmp_path / "out"))
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(before) == set(shapes(kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    added = {"block_origin": "global"} if kind == "sdar" else {}
    assert config == config_of(kind) | added
    assert torch.equal(logits(load_policy(tmp_path / "out"), IDS, 6), logits(load_policy(folder), IDS, 6))


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_opens_as_what_it_was(tmp_path, kind, block):
    policy = load_policy(checkpoint(tmp_path / "c", kind), block=block)
    policy.save(tmp_path / "saved")
    export(str(tmp_path / "c"), str(tmp_path / "hf"), "hf")
    again = load_policy(tmp_path / "saved")
    assert (again.layout, again.mask_id, again.shift) == (policy.layout, MASK, 0)
    assert torch.equal(logits(again, IDS, 6), logits(policy, IDS, 6))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] in ("qwen3", "qwen2", "llama")
    export(str(tmp_path / "saved"), str(tmp_path / "own"))
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (written["model_type"], written.get("block_size")) == (kind, policy.layout.block)
    assert load_policy(tmp_path / "own").layout == policy.layout


def test_adapters_on_a_block_policy_keep_its_blocks(tmp_path):
    folder = checkpoint(tmp_path / "c", "a2d-qwen3", block_size=4)
    policy = load_policy(folder, lora=LoRA(rank=2))
    policy.save(tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter")
    assert again.layout == policy.layout == Layout(4)
    assert torch.equal(logits(again, IDS, 6), logits(policy, IDS, 6))
    for path, arguments in ((folder, {"lora": LoRA(rank=2)}), (tmp_path / "adapter", {})):
        with pytest.raises(ValueError, match="an adapter does not store block: set block_size"):
            load_policy(path, block=4, **arguments)


# ---- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llada", "llama_masked"])
@pytest.mark.parametrize("origin", ["global", "response"])
def test_causal_and_full_checkpoints_become_block_causal(tmp_path, kind, origin):
    folder = write(tmp_path / "c", kind)
    causal = kind in ("llama", "qwen2", "qwen3")
    policy = load_policy(folder, denoise=causal, block=4, origin=origin)
    assert (policy.layout, policy.shift, policy.causal) == (Layout(4, origin), 0, False)
    policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert (again.layout, again.mask_id, again.shift) == (policy.layout, policy.mask_id, 0)
    assert torch.equal(logits(again, IDS, 6), logits(policy, IDS, 6))
    if kind == "llada":
        export(str(tmp_path / "saved"), str(tmp_path / "out"))  # LLaDA's format has no blocks
        assert load_policy(tmp_path / "out").layout == policy.layout
        with pytest.raises(ValueError, match="LLaDA's format cannot hold block-causal attention"):
            export(str(tmp_path / "saved"), str(tmp_path / "no"), "llada")


def test_sft_trains_a_converted_checkpoint(tmp_path):
    folder = write(tmp_path / "c", "llama")
    sft.main(
        [
            f"--run_dir={tmp_path / 'run'}", "--model.policy.class_path=espo_lightning.load_policy",
            f"--model.policy.path={folder}", "--model.policy.denoise=true", "--model.policy.block=4",
            "--model.likelihood.class_path=BlockELBO", "--model.likelihood.block=4", "--model.length=16",
            "--data.batches=2", "--data.batch_size=2", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    policy = load_policy(tmp_path / "run" / "policy")
    assert policy.layout == Layout(4, "global")
    BlockELBO(block=4).check(policy, 16)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "arguments", "message"),
    [
        ("sdar", {"block_size": None}, {}, "does not say how many tokens a block has: set block_size in it, or block"),
        ("sdar", {}, {"block": 8}, r"the checkpoint has \{'block_size': 4\}, but load_policy was told"),
        ("sdar", {"block_size": 0}, {}, "block must be a whole number of tokens from 1 up"),
        ("a2d-qwen3", {"block_size": "4"}, {}, "block must be a whole number of tokens from 1 up"),
        ("a2d-qwen3", {"block_size": 4, "block_origin": "prompt"}, {}, "block origin must be global or response"),
        ("a2d-qwen3", {}, {"block": 0}, "block must be a whole number of tokens from 1 up"),
        ("a2d-llama", {}, {"denoise": True}, "this one denoises already"),
        ("llada2_moe", {}, {}, "LLaDA2, a mixture of experts: not supported.*docs/block_policies.md"),
        ("llada2_moe", {}, {"trust_remote_code": True}, "LLaDA2, a mixture of experts: not supported"),
        ("Fast_dLLM_Qwen", {}, {}, "Fast-dLLM v2, whose logits are shifted.*docs/block_policies.md"),
        ("a2d-gpt2", {}, {}, "unknown model_type 'a2d-gpt2'"),
        ("sdar_moe", {}, {}, "SDAR's mixture of experts: not supported"),
    ],
)
def test_what_cannot_be_opened_is_one_message(tmp_path, kind, changes, arguments, message):
    known = kind if kind in KINDS else "sdar"
    folder = checkpoint(tmp_path / "c", known, **changes)
    if kind not in KINDS:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ValueError, match=message):
        load_policy(folder, **arguments)


def test_a_block_needs_a_denoiser_without_a_shift(tmp_path):
    with pytest.raises(ValueError, match="block is for denoising policies, and this checkpoint is causal"):
        load_policy(write(tmp_path / "llama", "llama"), block=4)
    with pytest.raises(ValueError, match="this checkpoint has logits_shift 1"):
        load_policy(write(tmp_path / "dream", "dream"), block=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_names_and_shapes_are_strict(tmp_path, kind, change):
    folder = checkpoint(tmp_path / "c", kind)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.layers.1.self_attn.k_proj.scale"] = torch.ones(3)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit its config.json: .*self_attn.k_proj"):
        load_policy(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_model_knows_their_shape(tmp_path, kind):
    folder = checkpoint(tmp_path / "c", kind)
    counted = sum(p.numel() for p in load_policy(folder).parameters())
    assert read_network(str(folder)).parameters == counted
