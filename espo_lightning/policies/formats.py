"""Formats: what a config.json says a checkpoint is, and LLaDA's names and config in both directions.

    model_type             is_causal   read as                            mask token   shift
    llada                  any         Llama, full attention              yes          0
    Dream                  any         Qwen2, full attention              yes          1
    sdar                   any         Qwen3, block-causal attention      yes          0
    a2d-llama, -qwen2, -3  any         Llama, Qwen2, Qwen3, either        yes          0
    llama, qwen2, qwen3    false       the same class, either             yes          its ``logits_shift``
    llama, qwen2, qwen3    otherwise   the same class, causal attention   none         1

Masked models get ``is_causal`` False, ``mask_token_id`` and ``logits_shift`` in their config, so that what is saved
opens as what it was, here and in transformers. The own config of LLaDA, Dream, SDAR (TraDo's too) and Tiny-A2D is kept
in ``original_config``. Every key of a config.json is honoured, or refused, or known to change nothing: see
`config_keys`.

Block-causal attention is what ``block_size`` (tokens) and ``block_origin`` (``global``, the default, or ``response``)
say; no ``block_size`` is full attention, which for SDAR is an error. See `Layout`. Tiny-A2D's mdlm and bd3lm have one
config, which does not say which of them it is: `load_policy` with ``block`` opens a bd3lm.
"""

import inspect
from typing import Any

from espo_lightning.policies.config_keys import BLOCK, DROPPED, FIXED, OWN, check_keys, check_network
from espo_lightning.policies.layout import FULL, Layout

FAMILIES = ("llama", "qwen2", "qwen3")
BLOCKS = {"sdar": "qwen3", "a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"}  # and whose tensors
FORMATS = ("llada", "Dream", "dream", *BLOCKS, *FAMILIES)
UNSUPPORTED = {
    "llada2_moe": "LLaDA2, a mixture of experts",
    "sdar_moe": "SDAR's mixture of experts",
    "Fast_dLLM_Qwen": "Fast-dLLM v2, whose logits are shifted across blocks",
}

LLADA_BLOCK = {  # parameters of a block: LLaDA's name -> Llama's
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
LLADA_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA_CONFIG = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "embedding_size": "vocab_size",  # rows of the embedding; LLaDA's own vocab_size may be smaller
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
    "mask_token_id": "mask_token_id",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
}
LLADA_FIXED = {  # what makes LLaDA a Llama; where a config says otherwise, it is another network
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "layer_norm_with_affine": True,
    "rope_full_precision": True,
    "block_group_size": 1,
    "embedding_layer_norm": False,
    "clip_qkv": None,
}
LLADA_DERIVED = {"mlp_ratio", "multi_query_attention", "rope_theta", "vocab_size"}


def make_config(raw: dict) -> Any:
    """The transformers config of a checkpoint whose config.json is ``raw``.

    Raises:
        ValueError: another network than the formats, a key that is missing, unknown, or of a wrong value.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return _config(raw)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}") from error
    except (TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json has a value of the wrong kind: {reason}") from error


def _config(raw: dict) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, Qwen2Config

    kind = raw.get("model_type")
    if kind in UNSUPPORTED:
        raise ValueError(
            f"model_type {kind} is {UNSUPPORTED[kind]}: not supported, with or without its own code; "
            "docs/block_policies.md says what it would need. Block-causal checkpoints of SDAR, TraDo and Tiny-A2D are"
        )
    if kind not in FORMATS:
        raise ValueError(
            f"unknown model_type {kind!r} in config.json: expected one of {', '.join(FORMATS)}; "
            "or set trust_remote_code to run the checkpoint's own code"
        )
    if kind == "llada":
        tied = (
            {"tie_word_embeddings": raw["weight_tying"]} if "weight_tying" in raw else {}
        )  # transformers adds its own
        check_keys(raw, LLADA_CONFIG.keys() | LLADA_DERIVED, LLADA_FIXED | tied)
        derived = {
            "n_kv_heads": 1 if raw.get("multi_query_attention") else raw["n_heads"],
            "mlp_hidden_size": int(raw.get("mlp_ratio", 4) * raw["d_model"]),
            "embedding_size": raw["vocab_size"],
            **dict.fromkeys(("mask_token_id", "pad_token_id", "eos_token_id")),
        }
        full = derived | {key: value for key, value in raw.items() if value is not None}
        return LlamaConfig(
            **{ours: full[theirs] for theirs, ours in LLADA_CONFIG.items()},
            rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
            bos_token_id=None,
            is_causal=False,
            logits_shift=0,
            original_config=raw,
        )
    config_class = Qwen2Config if kind in ("Dream", "dream") else CONFIG_MAPPING[BLOCKS.get(kind, kind)]
    fields = inspect.signature(config_class).parameters.keys() - FIXED.keys()
    # Qwen2's linear layers of attention have biases in any case, and its heads may be of any size
    more = {"attention_bias": True} if config_class is Qwen2Config else {}
    own, fixed = _own_keys(raw)
    check_keys(raw, {*fields, *own, "rope_theta", "rope_scaling", "head_dim"}, FIXED | more | fixed)
    said = {key: value for key, value in raw.items() if key not in DROPPED and (key != "head_dim" or value)}
    if kind not in FAMILIES:
        family = {k: v for k, v in said.items() if k not in ("model_type", "architectures", "auto_map")}
        ours = {"is_causal": False, "logits_shift": 0 if kind in BLOCKS else 1, "original_config": raw}
        config = config_class(**family | ours)
    elif said.get("is_causal") is False and said.get("logits_shift") not in (0, 1):
        raise ValueError(
            "config.json has is_causal: false, so logits_shift must be 0 (hidden state i predicts token i) "
            f"or 1 (hidden state i-1 does), got {said.get('logits_shift')!r}"
        )
    else:
        config = AutoConfig.for_model(**said)
    check_network(config)
    return config


def _own_keys(raw: dict) -> tuple[set[str], dict[str, Any]]:
    """Which keys beside its family's are read, and which at one value only, see `check_keys`."""
    if raw["model_type"] in BLOCKS:
        return {*OWN, *BLOCK}, {"is_causal": False, "logits_shift": 0}
    denoises = raw["model_type"] not in FAMILIES or raw.get("is_causal") is False
    return {*OWN, *BLOCK} if denoises else {*OWN}, {}


def layout_of(config: Any) -> Layout:
    """Who attends to whom in the network of a transformers config.

    Raises:
        ValueError: an SDAR or a ``block_origin`` without ``block_size``, or what `Layout` raises.
    """
    if getattr(config, "is_causal", True) is not False:
        return Layout(causal=True)
    block = getattr(config, "block_size", None)
    if block is None:
        if (getattr(config, "original_config", None) or {}).get("model_type") == "sdar":
            raise ValueError(
                "config.json of this SDAR does not say how many tokens a block has: set block_size in it, or block in "
                "load_policy (4 in the first releases of SDAR and TraDo; later ones have it in their name)"
            )
        if (origin := getattr(config, "block_origin", None)) is not None:
            raise ValueError(
                f"config.json says block_origin {origin!r}, but not how many tokens a block has: set block_size in it, "
                "or block in load_policy"
            )
        return FULL
    return Layout(block, getattr(config, "block_origin", None) or "global")


def layout_keys(layout: Layout) -> dict:
    """What `layout_of` reads a layout from, but for ``is_causal``."""
    return {} if layout.block is None else {"block_size": layout.block, "block_origin": layout.origin}


def came_in_blocks(config: Any) -> bool:
    """Whether the checkpoint came in the format of SDAR or Tiny-A2D."""
    return (getattr(config, "original_config", None) or {}).get("model_type") in BLOCKS


def own_config(config: Any) -> dict:
    """The config.json of SDAR or Tiny-A2D as it came, and the blocks, which it may not have said.

    Raises:
        ValueError: the model came in another format.
    """
    if not came_in_blocks(config):
        raise ValueError(f"format own is for what came as {', '.join(BLOCKS)}: use hf, or llada")
    return config.original_config | layout_keys(layout_of(config))


def llada_names(config: Any) -> dict[str, str]:
    """LLaDA's parameter names -> those of ``LlamaForCausalLM``."""
    blocks = {
        f"model.transformer.blocks.{n}.{theirs}.weight": f"model.layers.{n}.{ours}.weight"
        for n in range(config.num_hidden_layers)
        for theirs, ours in LLADA_BLOCK.items()
    }
    return blocks | {f"model.transformer.{theirs}.weight": f"{ours}.weight" for theirs, ours in LLADA_TOP.items()}


def was_llada(config: Any) -> bool:
    """Whether the checkpoint came in LLaDA's format."""
    return (getattr(config, "original_config", None) or {}).get("model_type") == "llada"


def llada_config(config: Any) -> dict:
    """The config.json of a masked Llama in LLaDA's format: the original one, or a new one if it never had one."""
    if (layout := layout_of(config)) != FULL:
        raise ValueError(f"LLaDA's format cannot hold {layout}: use --format hf")
    if was_llada(config):
        return config.original_config
    needs = {
        "model_type": "llama",
        "is_causal": False,
        "logits_shift": 0,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    odd = {key: getattr(config, key, None) for key, value in needs.items() if getattr(config, key, None) != value}
    if odd or config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"LLaDA's format cannot hold this model ({odd or config.rope_parameters}): use --format hf")
    llama = {theirs: getattr(config, ours) for theirs, ours in LLADA_CONFIG.items()}
    rest = {"vocab_size": config.vocab_size, "rope_theta": config.rope_parameters["rope_theta"]}
    return {"model_type": "llada", "architectures": ["LLaDAModelLM"]} | llama | rest | LLADA_FIXED
