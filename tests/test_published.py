"""Checkpoints say what they are: every key of a config.json, special tokens, positions, and text that stays text."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import EOS, MASK, VOCABULARY, write, write_tokenizer
from conftest import Letters, fit, small_module
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from espo_lightning import Decoding, LoRA, evaluate, load_policy, new_policy
from espo_lightning import fit as fit_program
from espo_lightning.keys import fold_in
from espo_lightning.lab.network import read_network
from espo_lightning.policies.config_keys import FIXED, HARMLESS, IGNORED, positions
from espo_lightning.policies.formats import LLADA_CONFIG, LLADA_DERIVED, LLADA_FIXED, layout_of, make_config
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.text import plain_tokens, prompt_tokens
from espo_lightning.training.supervised import SFTModule, encode_answers

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
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
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
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    for kind in ("llada", "dream", "qwen2", "llama_masked"):
        write(root / kind, kind)
    return root


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A LLaDA that a test may damage."""
    return Path(shutil.copytree(checkpoints / "llada", tmp_path / "llada"))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


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


# ---- config and tokenizer mean the same tokens ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 9}, r"mask_token_id=9, but its tokenizer's mask token is '<mask>', id 2"),
        ({"eos_token_id": 9}, r"eos_token_id=9, but its tokenizer ends texts with '<eos>', id 1"),
        ({"eos_token_id": [9, 10]}, r"eos_token_id=\[9, 10\], but its tokenizer ends texts with '<eos>', id 1"),
        ({"eos_token_id": [EOS, 64]}, r"eos_token_id=64.*64 rows"),
        ({"eos_token_id": -1}, r"eos_token_id=-1, which is no token id"),
        ({"mask_token_id": 64}, r"mask_token_id=64.*64 rows"),
        ({"mask_token_id": -1}, r"mask_token_id=-1, which is no token id"),
        ({"mask_token_id": "2"}, r"mask_token_id='2', which is no token id|config\.json"),
    ],
)
def test_tokens_on_which_config_and_tokenizer_disagree_are_both_named(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("other", ["eos", "unk", "bos"])
def test_a_mask_token_is_no_other_token(folder, other):
    ids = {"eos": "<eos>", "unk": "<unk>", "bos": "w9"}
    edit(folder / "tokenizer_config.json", mask_token=ids[other], bos_token="w9")
    edit(folder / "config.json", mask_token_id="absent")
    with pytest.raises(ValueError, match="could not tell them apart"):
        load_policy(folder)


def test_several_ends_and_a_mask_that_only_the_config_names_are_fine(folder):
    edit(folder / "config.json", eos_token_id=[EOS, 40])
    assert load_policy(folder).eos_ids == {EOS, 40}
    write_tokenizer(folder, without="mask_token")
    assert load_policy(folder).mask_id == MASK


# ---- adapters bring their own text ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(checkpoints, tmp_path):
    load_policy(checkpoints / "llada", lora=LoRA(rank=2, alpha=2)).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_tokenizer_and_the_template_of_an_adapter_win(adapter, checkpoints):
    base = load_policy(checkpoints / "llada").encode(["w3"]).ids.tolist()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base
    (adapter / "chat_template.jinja").write_text("w7 {{ messages[0]['content'] }} w8")
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == [[11, 7, 12]]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the template alone
        (adapter / name).unlink()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == [[11, 7, 12]]
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "w1{{ messages[0]['content'] }}"}))
    assert load_policy(adapter).encode([" w3"]).ids.tolist() == [[5, 7]]
    (adapter / "tokenizer_config.json").unlink()  # no text of its own: the base's
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base


def test_an_adapters_tokenizer_without_a_template_takes_the_bases(adapter, checkpoints):
    (adapter / "chat_template.jinja").unlink()
    base = load_policy(checkpoints / "llada").encode(["w3"]).ids.tolist()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base


def test_an_adapters_tokenizer_must_fit_its_base(adapter):
    write_tokenizer(adapter, extra=5)
    with pytest.raises(ValueError, match=r"do not belong together: token id 68.*64 rows"):
        load_policy(adapter)
    write_tokenizer(adapter)
    edit(adapter / "tokenizer_config.json", mask_token="w5")
    with pytest.raises(ValueError, match=r"mask_token_id=2, but its tokenizer's mask token is 'w5', id 9"):
        load_policy(adapter)
    write_tokenizer(adapter)
    edit(adapter / "tokenizer_config.json", eos_token="w5")
    with pytest.raises(ValueError, match=r"eos_token_id=1, but its tokenizer ends texts with 'w5', id 9"):
        load_policy(adapter)


# ---- positions -----------------------------------------------------------------------------------------------------


def test_no_more_tokens_than_positions(checkpoints):
    policy = load_policy(checkpoints / "llada")
    assert policy.positions == 128
    ids = torch.full((1, 128), 5)
    select = torch.zeros(1, 128, dtype=torch.bool)
    select[0, -1] = True
    policy(ids, None, select, lambda x: x)
    prompts = policy.encode([" ".join(["w3"] * 120)])
    keys = fold_in(0, torch.arange(1))
    with pytest.raises(ValueError, match=r"129 tokens together.*max_position_embeddings=128: lower max_prompt_length"):
        Decoding(8, 8, 8).generate(policy, prompts, keys)
    Decoding(7, 7, 7).generate(policy, prompts, keys)


def test_a_canvas_beyond_the_positions_is_refused_before_anything_begins(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"a canvas of length 512 leaves no room for a prompt.*=512; lower the length"):
        small_module(decoding=Decoding(512, 512, 512))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        SFTModule(new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24), length=600)
    flags = ["--model.decoding.length=1024", "--model.decoding.steps=1024", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as error:
        fit_program.main(["--trainer.accelerator=cpu", *flags])
    assert error.value.code == 2
    assert "a canvas of length 1024" in capsys.readouterr().err
    flags = ["--decoding.length=512", "--decoding.steps=512", f"--output={tmp_path / 'run' / 'o.json'}"]
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--policy.path=bundled:sudoku", "--task=Sudoku", *flags])
    assert error.value.code == 2
    assert "a canvas of length 512 leaves no room" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extended_positions_count():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert positions(make_config(QWEN25 | {"rope_scaling": yarn})) == 131072
    assert positions(make_config(LLAMA32)) == 131072
    assert positions(make_config(QWEN25 | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})) == 32768


# ---- what a user writes stays text ---------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, as Qwen's and Dream's without merges, with their special tokens and an added word that is not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )
    fast.add_tokens(["<think>"])
    fast.chat_template = CHATML
    return fast


TOKENIZERS = {
    "characters": lambda: new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).tokenizer,
    "bytes": byte_tokenizer,
}


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spelt_special_tokens_are_text_in_prompts_and_answers(kind):
    tokenizer = TOKENIZERS[kind]()
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    names = [tokenizer.added_tokens_decoder[i].content for i in sorted(special)]
    plain = prompt_tokens(tokenizer, [[{"role": "user", "content": "abc"}]])[0]
    frame = [i for i in plain if i in special]  # the template's own
    assert frame
    for name in names:
        for text in (name, f"a {name} b", f"{name}{name}", f"({names[0]}{name})", f"\U000f0000{name}"):
            (row,) = prompt_tokens(tokenizer, [[{"role": "user", "content": text}]])
            assert [i for i in row if i in special] == frame, text
            (answer,) = plain_tokens(tokenizer, [text])
            assert not special & set(answer), text
            if kind == "bytes":
                assert tokenizer.decode(answer) == text
                assert text.strip() in tokenizer.decode([i for i in row if i not in special])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_texts_are_tokenised_as_they_were(kind):
    tokenizer = TOKENIZERS[kind]()
    texts = ["0401002010030310", "3,7,2=13", "a<b>c </s> [mask] < eos >", "x\n y", "", "<think> ok"]
    turns = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt_tokens(tokenizer, turns) == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in rendered]
    assert plain_tokens(tokenizer, texts) == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    mixed = [turns[0], [{"role": "user", "content": "<eos> <|im_end|>"}], *turns[1:]]  # among others, in their order
    rows = prompt_tokens(tokenizer, mixed)
    assert [rows[0], *rows[2:]] == prompt_tokens(tokenizer, turns)


def test_in_a_policy_and_in_supervised_training():
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    ids = policy.encode(["a<mask>b<eos><assistant>"]).ids
    assert not torch.isin(ids, torch.tensor([policy.mask_id, policy.eos_id])).any()
    assert policy.tokenizer.decode(ids[0, 1:-1]) == "a<mask>b<eos><assistant>"
    answer = encode_answers(policy, ["<eos>x"], 8)
    assert answer[0, :6].tolist() == [policy.tokenizer.get_vocab()[c] for c in "<eos>x"]
    assert policy.decode(answer) == ["<eos>x"]
    with pytest.raises(ValueError, match="makes the mask token of the prompt"):  # <{{ role }}>
        policy.encode([[{"role": "mask", "content": "a"}]])


# ---- a tokenizer that cannot read a prompt ---------------------------------------------------------------------------


def test_unknown_characters_are_told_once_with_their_share():
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    with pytest.warns(UserWarning, match=r"maps 40 % of the tokens of the prompt that starts 'ABc'.*<unk>.*'AB'"):
        policy.encode(["ABc"])  # of <user>, A, B, c, <assistant>
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.encode(["DEF"])
        new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).encode(["abc" * 9 + "A"])  # a small share
    other = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    with pytest.warns(UserWarning, match="of the tokens of the answer that starts 'abcD'"):
        other.answer_tokens(["abc", "abcD"])


class Capitals(Letters):
    def problem(self, split, seed, index):
        return super().problem(split, seed, index)._replace(prompt="HELLO")


def test_in_training_too():
    with pytest.warns(UserWarning, match="maps 71 % of the tokens of the prompt that starts 'HELLO'"):
        fit(small_module(), 1, task=Capitals())
