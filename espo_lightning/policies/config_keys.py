"""Every key of a config.json: honoured, at the one value that is implemented, harmless for a reason, or refused.

A checkpoint that says something which nobody reads is another network than its author's, silently. Null says nothing.
"""

from typing import Any

HARMLESS = {  # why -> keys that change no number here
    "names, versions and where code lies": (
        "_name_or_path", "name_or_path", "architectures", "auto_map", "model_type", "original_config", "params",
        "transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config",
        "tokenizer_class", "framework", "finetuning_task", "task_specific_params", "prefix",
    ),
    "the dtype is an argument of load_policy": ("torch_dtype", "dtype", "precision", "use_bfloat16"),
    "the attention kernel is an argument of load_policy": (
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "flash_attention",
    ),
    "there is no dropout, in training neither": (
        "attention_dropout", "embedding_dropout", "residual_dropout", "hidden_dropout", "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ),
    "weights are read, not drawn": (
        "init_cutoff_factor", "init_device", "init_fn", "init_std", "initializer_range",
    ),
    "what a forward pass returns and caches is asked for in every call": (
        "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_cache",
    ),
    "the same numbers, computed otherwise": (
        "chunk_size_feed_forward", "debug", "ep_size", "fuse_cross_entropy", "micro_forward", "pretraining_tp",
        "skip_checkpoint", "use_deepep",
    ),
    "of classifiers and encoders": ("id2label", "label2id", "num_labels", "problem_type", "is_decoder"),
    "of generate of transformers; decoding is set here": (
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature",
        "tf_legacy_loss", "top_k", "top_p", "typical_p",
    ),
    "the chat template says what a prompt begins with, and padding is never attended to": (
        "bos_token_id", "pad_token_id",
    ),
    "of ALiBi and of norms that are switched off": ("alibi_bias_max", "attention_layer_norm_with_affine"),
}  # fmt: skip
IGNORED = frozenset(key for keys in HARMLESS.values() for key in keys)

FIXED = {  # of Llama and Qwen: implemented at this value only
    "add_cross_attention": False,
    "clip_qkv": None,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "qk_layernorm": False,
    "quantization_config": None,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
DROPPED = ("output_attentions", "output_hidden_states", "return_dict", "torchscript")  # else transformers obeys them
OWN = ("is_causal", "logits_shift", "mask_token_id")  # this library's
BLOCK = ("block_size", "block_origin")  # of block-causal attention
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def check_keys(raw: dict, honoured: set[str], fixed: dict[str, Any]) -> None:
    """Refuse a config.json that says something which would not be read.

    Args:
        raw: its content.
        honoured: the keys that are read.
        fixed: keys that are implemented at one value only.

    Raises:
        ValueError: naming the keys and their values.
    """
    said = {key: value for key, value in raw.items() if value is not None}
    odd = {key: said[key] for key, value in fixed.items() if key in said and said[key] != value}
    if odd:
        needed = {key: fixed[key] for key in odd}
        raise ValueError(
            f"this checkpoint is no Llama or Qwen as they are implemented here: config.json says {odd}, and needed is "
            f"{needed}, or no such key"
        )
    unknown = {key: said[key] for key in said.keys() - honoured - fixed.keys() - IGNORED}
    if unknown:
        raise ValueError(
            f"config.json says {dict(sorted(unknown.items()))}, which nothing here reads: the network may be another "
            "one than its author's. Remove what is known to change nothing, or set trust_remote_code for its own code"
        )


def check_network(config: Any) -> None:
    """Refuse what transformers would do, and this library cannot do exactly.

    Raises:
        ValueError: sliding windows, or rotary positions of a kind that depends on the width of a batch.
    """
    windows = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if windows:
        raise ValueError(f"config.json has layers of {windows}: only full attention is possible")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"config.json has the rotary positions {rope}: possible are {', '.join(ROPE_TYPES)}, of whole heads"
        )


def positions(config: Any) -> float:
    """How many positions, of prompt and canvas together, a network was made for; inf if its config does not say."""
    largest = getattr(config, "max_position_embeddings", None)
    if largest is None:
        return float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "yarn"):
        return largest
    extended = rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", largest)
    return max(largest, int(extended))
