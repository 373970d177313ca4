"""Every key of a config.json, those of published checkpoints as they stand there."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY
from published_cases import LLAMA32, QWEN25, checkpoints_fixture, edit, folder_fixture  # noqa: F401

from espo_lightning import load_policy, new_policy
from espo_lightning.lab.network import read_network
from espo_lightning.policies.config_keys import FIXED, HARMLESS, IGNORED, positions
from espo_lightning.policies.formats import LLADA_CONFIG, LLADA_DERIVED, LLADA_FIXED, layout_of, make_config
from espo_lightning.policies.layout import Layout

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- every key of a config.json: those of published checkpoints, as they stand there -------------------------------


LLADA_8B = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
DREAM_7B = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
SDAR_17B = QWEN3 | {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4, "fuse_cross_entropy": True,
    "debug": False, "ep_size": 1, "micro_forward": False, "skip_checkpoint": False, "tie_word_embeddings": False,
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
}  # fmt: skip
A2D_QWEN3 = QWEN3 | {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
A2D_QWEN2 = QWEN25 | {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2"}
A2D_LLAMA = LLAMA32 | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"}
BLOCK_CAUSAL = {"SDAR": SDAR_17B, "3": A2D_QWEN3, "2": A2D_QWEN2, "a2d-llama": A2D_LLAMA}
PUBLISHED = {
    "LLaDA-8B": (LLADA_8B, 8_015_581_184), "Dream-7B": (DREAM_7B, 7_615_616_512), "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "Llama-3.2-1B": (LLAMA32, 1_235_814_400), "SmolLM2-135M": (SMOLLM2, 134_515_008),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PUBLISHED, "Qwen3-0.6B"])
def test_published_configs_are_read_whole(name, tmp_path):
    raw, parameters = PUBLISHED.get(name, (QWEN3, None))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    network = read_network(str(tmp_path))
    if parameters is not None:  # as their authors count them
        assert network.parameters == parameters
    config = make_config(raw)
    assert positions(config) == raw.get("max_sequence_length", raw.get("max_position_embeddings"))
    assert config.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert config.rope_parameters["rope_type"] == (raw.get("rope_scaling") or {}).get("rope_type", "default")


OTHER = {  # what would make another network, or an unread one
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "clip_qkv": 8.0,
    "partial_rotary_factor": 0.5,
    "head_dim": 64,
    "sliding_window": 128,
    "attention_bias": True,
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "logit_scale": 0.0625,
    "final_logit_softcapping": 30.0,
    "embedding_multiplier": 12.0,
    "num_experts": 8,
    "rope_interleaved": True,
    "use_mrope": True,
    "layer_types": ["sliding_attention"] * 2,
    "anything_else": 0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("key", OTHER)
def test_llada_says_nothing_that_is_not_read(key):
    with pytest.raises(ValueError, match=rf"config\.json says .*{key}"):
        make_config(LLADA_8B | {key: OTHER[key]})
    make_config(LLADA_8B | {key: None})  # which says nothing


@pytest.mark.parametrize("key", sorted(LLADA_FIXED))
def test_llada_is_a_llama_at_one_value_of_each_of_these(key):
    value = LLADA_FIXED[key]
    other = not value if isinstance(value, bool) else 2 if value in (1, None) else "other"
    with pytest.raises(ValueError, match=rf"is no Llama.*{key}"):
        make_config(LLADA_8B | {key: other})


@pytest.mark.parametrize(
    "raw",
    [DREAM_7B, QWEN25, QWEN3, LLAMA32, SMOLLM2, *BLOCK_CAUSAL.values()],
    ids=["Dream", "2", "3", "llama", "SmolLM2", *BLOCK_CAUSAL],
)
def test_the_others_say_nothing_that_is_not_read(raw):
    for key in ("clip_qkv", "logit_scale", "num_experts", "quantization_config", "anything_else", "use_mrope"):
        with pytest.raises(ValueError, match=rf"config\.json says .*{key}"):
            make_config(raw | {key: OTHER.get(key)})
    for key, value in FIXED.items():
        other = not value if isinstance(value, bool) else 0.5
        with pytest.raises(ValueError, match=rf"is no Llama or Qwen.*{key}"):
            make_config(raw | {key: other})
    for rope in ({"rope_type": "longrope", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.5}):
        with pytest.raises((ValueError, KeyError)):
            make_config(raw | {"rope_scaling": rope})
    if "llama" not in raw["model_type"]:
        windows = ["sliding_attention"] * raw["num_hidden_layers"]
        with pytest.raises(ValueError, match="only full attention"):
            make_config(raw | {"layer_types": windows})


@pytest.mark.parametrize("raw", BLOCK_CAUSAL.values(), ids=BLOCK_CAUSAL)
def test_block_causal_configs_are_read_whole(raw):
    config = make_config(raw)
    assert (config.original_config, config.is_causal, config.logits_shift) == (raw, False, 0)
    assert layout_of(config) == Layout(raw.get("block_size"))
    assert positions(config) == raw["max_position_embeddings"]
    assert layout_of(make_config(raw | {"block_size": 8, "block_origin": "response"})) == Layout(8, "response")
    make_config(raw | {"is_causal": False, "logits_shift": 0})
    for key, value in {"is_causal": True, "logits_shift": 1}.items():
        with pytest.raises(ValueError, match=rf"config\.json says .*{key}"):
            make_config(raw | {key: value})


@pytest.mark.parametrize("raw", [QWEN25, QWEN3, LLAMA32], ids=["2", "3", "llama"])
def test_blocks_are_read_where_they_mean_something(raw):
    masked = raw | {"is_causal": False, "logits_shift": 0}
    assert layout_of(make_config(masked | {"block_size": 4})) == Layout(4)
    with pytest.raises(ValueError, match="block_origin 'response', but not how many tokens"):
        layout_of(make_config(masked | {"block_origin": "response"}))
    for key, value in {"block_size": 4, "block_origin": "global"}.items():  # of what writes from left to right
        with pytest.raises(ValueError, match=rf"config\.json says .*{key}"):
            make_config(raw | {key: value})


def test_llada_has_no_blocks():
    with pytest.raises(ValueError, match=r"config\.json says .*block_size"):
        make_config(LLADA_8B | {"block_size": 4})


def test_qwen2_has_biases_in_any_case():
    make_config(DREAM_7B | {"attention_bias": True, "head_dim": None})
    with pytest.raises(ValueError, match="attention_bias"):
        make_config(DREAM_7B | {"attention_bias": False})


def logits(policy) -> torch.Tensor:
    ids = torch.randint(4, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    select = torch.ones(2, 6, dtype=torch.bool)
    select[:, 0] = False
    with torch.no_grad():
        return policy(ids, None, select, lambda x: x)


@pytest.mark.parametrize("kind", ["llada", "dream", "llama_masked"])
def test_harmless_keys_change_no_number(kind, checkpoints, tmp_path):
    assert all(why and keys for why, keys in HARMLESS.items())
    assert not IGNORED & (FIXED.keys() | LLADA_FIXED.keys() | LLADA_DERIVED)
    assert {"pad_token_id"} == IGNORED & LLADA_CONFIG.keys()
    values = {"attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5, "return_dict": False}
    values |= {"output_hidden_states": True, "output_attentions": True, "torchscript": True, "use_cache": True}
    values |= {"torch_dtype": "float16", "bos_token_id": 5, "pad_token_id": 3, "precision": "amp_bf16"}
    values |= {"temperature": 0.1, "top_p": 0.5, "chunk_size_feed_forward": 2, "initializer_range": 0.9}
    values |= {"transformers.js_config": {}, "unsloth_version": "1", "init_std": 9.0, "alibi_bias_max": 1.0}
    assert values.keys() <= IGNORED
    changed = Path(shutil.copytree(checkpoints / kind, tmp_path / "changed"))
    edit(changed / "config.json", **values)
    assert torch.equal(logits(load_policy(changed)), logits(load_policy(checkpoints / kind)))


def test_the_document_says_why_keys_are_harmless():
    text = " ".join((Path(__file__).parents[1] / "docs" / "bad_input.md").read_text().split())
    for words in ("names, versions and where code lies", "`bos_token_id` and `pad_token_id`", "the attention kernel"):
        assert words in text
    for key in ("alibi", "rope_scaling", "clip_qkv", "max_position_embeddings", "eos_token_id"):
        assert f"`{key}`" in text


@pytest.mark.parametrize("wrong", [{"n_layers": "2"}, {"d_model": 32.5}, {"n_heads": None}, {"rms_norm_eps": "x"}])
def test_values_of_the_wrong_type_are_one_message(folder, wrong):
    edit(folder / "config.json", **wrong)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(folder)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    with torch.no_grad():
        policy.model.model.norm.weight[3] = 1e6
    policy.save(tmp_path / "large")
    load_policy(tmp_path / "large")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity as torch\.float16"):
        load_policy(tmp_path / "large", dtype="float16")
    with torch.no_grad():
        policy.model.model.norm.weight[3] = math.nan
    policy.save(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity"):
        load_policy(tmp_path / "nan")
