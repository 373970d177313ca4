"""Small checkpoints of random weights in the form in which their authors publish them."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, PAD, EOS, MASK = 64, 0, 1, 2
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": PAD,
}
LLADA = json.loads((GOLDEN / "tiny.config.json").read_text())
TO_LLADA = [  # independent of the library's table, in this order
    (r"^lm_head", "model.transformer.ff_out"),
    (r"^model\.norm", "model.transformer.ln_f"),
    (r"^model\.embed_tokens", "model.transformer.wte"),
    (r"^model\.layers", "model.transformer.blocks"),
    (r"self_attn\.o_proj", "attn_out"),
    (r"self_attn\.", ""),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ff_norm"),
    (r"mlp\.gate_proj", "ff_proj"),
    (r"mlp\.down_proj", "ff_out"),
    (r"mlp\.", ""),
]


def write_tokenizer(folder: Path, *, without: str = "", extra: int = 0) -> None:
    words = ["<pad>", "<eos>", "<mask>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4 + extra))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "unk_token": "<unk>"}
    special.pop(without, None)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if without != "chat_template":
        fast.chat_template = (
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"
        )
    fast.save_pretrained(folder)


def random_model(config) -> AutoModelForCausalLM:
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if "norm" in name else 0.2) + ("norm" in name))
    return model


def write_sharded(weights: dict, folder: Path) -> None:
    weight_map = {}
    for n, keys in enumerate([list(weights)[::2], list(weights)[1::2]], start=1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write(folder: Path, kind: str, layers: int = 2) -> Path:
    """A checkpoint of random weights in the form in which its authors publish it."""
    size = SIZE | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    if kind.startswith("llada"):
        kv, tied = (2, False) if "gqa" in kind else (4, kind == "llada_tied")
        model = random_model(LlamaConfig(**size, num_key_value_heads=kv, tie_word_embeddings=tied))
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for pattern, theirs in TO_LLADA:
            weights = {re.sub(pattern, theirs, key): tensor for key, tensor in weights.items()}
        (write_sharded if "sharded" in kind else lambda w, f: save_file(w, f / "model.safetensors"))(weights, folder)
        # the embedding may have more rows than vocab_size says, as in LLaDA-8B-Base
        config = LLADA | {"n_kv_heads": kv, "weight_tying": tied, "vocab_size": VOCABULARY - 1, "n_layers": layers}
        config |= {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "use_cache": False, "rope": True}
    else:
        classes = {"llama": LlamaConfig, "qwen3": Qwen3Config}
        tied = {"tie_word_embeddings": True} if kind == "qwen2" else {}
        head = {"head_dim": 16} if "qwen3" in kind else {}
        cls = classes.get(kind.removesuffix("_masked"), Qwen2Config)
        random_model(cls(**size, num_key_value_heads=2, **tied, **head)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if kind == "dream":
            config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK}
            config |= {"auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "rope_theta": 1e4, "rope_scaling": None}
            del config["rope_parameters"]
            shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
            keys = load_file(folder / "model-00001-of-00001.safetensors")
            assert any(key.endswith("q_proj.bias") for key in keys)
            index = {"weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        elif "masked" in kind:
            config |= {"is_causal": False, "mask_token_id": MASK, "logits_shift": int("qwen3" in kind)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def golden_folder(folder: Path, weights: str) -> Path:
    """The random weights of the authors' golden numbers, as a checkpoint in LLaDA's own format."""
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / weights, folder / "model.safetensors")
    shutil.copy(GOLDEN / "tiny.config.json", folder / "config.json")
    write_tokenizer(folder)
    return folder
