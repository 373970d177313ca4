"""Loading policies: from folders and hub ids.

What a checkpoint is, is read from its config.json (see `formats`) and its tokenizer, never from its name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from espo_lightning.policies.agreement import hear_generation, mask_token
from espo_lightning.policies.files import read_json, read_tensors, resolve
from espo_lightning.policies.formats import FORMATS, UNSUPPORTED, layout_of, llada_names, make_config
from espo_lightning.policies.from_causal import make_denoising, set_blocks
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.lora import LoRA, add_adapter, load_adapter
from espo_lightning.policies.masked_lm import MASKED_LMS, load_masked_lm
from espo_lightning.policies.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
    trust_remote_code: bool = False,
    denoise: bool = False,
    block: int | None = None,
    origin: Literal["global", "response"] = "global",
) -> Policy:
    """Load a policy. Memory peaks at one copy of the weights and one tensor.

    The policy is in eval mode; with ``gradient_checkpointing`` it is in train mode, the only one in which
    transformers checkpoints. The mode changes nothing else: there is no dropout in either.

    Args:
        path: a local folder, a hub id or ``bundled:NAME``, in one of the formats of `formats`, a masked LM of
            `masked_lm` (BERT, RoBERTa, ModernBERT, ...), or a peft LoRA adapter for one of them.
        dtype: of the weights: float32, bfloat16, float16, or auto (as stored). New adapters are float32.
        attention: transformers' kernel: sdpa, eager, flash_attention_2, ... Of bfloat16 weights on a CPU, eager trains
            1.7 times faster: sdpa's backward pass is slow there (benchmarks/NOTES.md).
        gradient_checkpointing: recompute every layer in the backward pass instead of keeping its activations.
        lora: adapters to add; everything else is then frozen.
        trust_remote_code: run the checkpoint's own code where its model_type is unknown. It must be laid out like Llama
            (``.model``, ``.lm_head``) and attend in both directions; its shift is ``logits_shift``, else 0.
        denoise: turn a causal checkpoint into a diffusion policy, for `sft` to train, see `make_denoising`.
        block: give a policy with full attention, or with ``denoise`` a causal one, block-causal attention with blocks
            of so many tokens, for `sft` to train; or say what the config does not (SDAR, Tiny-A2D's bd3lm).
        origin: where these blocks are counted from, see `Layout`.

    Raises:
        FileNotFoundError: no such folder, config or shard.
        ValueError: anything in them that does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = resolve(path, code=trust_remote_code)
    adapter = (folder / "adapter_config.json").is_file()
    if adapter or lora is not None:
        _check_adapted(denoise, block)
    if adapter:
        if lora is not None:
            raise ValueError(f"{path} already is a LoRA adapter: train it on without lora, or merge it first by export")
        base = base_of(folder)
        policy = load_policy(base, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
        _take_text(policy, folder, trust_remote_code)
        policy.model = load_adapter(policy.model, folder, base)
    else:
        layout = None if block is None else Layout(block, origin)
        policy = _load_base(folder, DTYPES[dtype], attention, trust_remote_code, denoise, layout)
        local = folder == Path(path).expanduser()
        policy.config._name_or_path = policy.model.name_or_path = str(folder.resolve() if local else path)  # for peft
        if lora is not None:
            policy.model = add_adapter(policy.model, lora)
    if gradient_checkpointing:
        _checkpoint_layers(policy)
    return policy.train(gradient_checkpointing)


def _load_base(
    folder: Path, dtype: torch.dtype | None, attention: str, code: bool, denoise: bool, layout: Layout | None
) -> Policy:
    """A masked LM or a language model, whichever the config says."""
    raw = read_json(folder, "config.json")
    if raw.get("model_type") not in MASKED_LMS:
        return _load_language_model(folder, raw, dtype, attention, code, denoise, layout)
    if denoise or layout is not None:
        raise ValueError(f"a masked LM ({raw['model_type']}) denoises, in one block: drop denoise and block")
    return load_masked_lm(folder, dtype, attention)


def _check_adapted(denoise: bool, block: int | None) -> None:
    """Refuse what an adapter's folder could not say again about its base."""
    if denoise:
        raise ValueError(
            "denoise: true changes the base, which an adapter does not store: save the denoising policy of the causal "
            "base as a folder of its own (sft does), and put adapters on that"
        )
    if block is not None:
        raise ValueError(
            "an adapter does not store block: set block_size (and block_origin) in config.json of its base, or put "
            "adapters on what sft saved"
        )


def attends_forward(policy: Policy) -> bool:
    """Whether the first logits depend on the last token, as they must in a model that denoises."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=policy.device)
    select = (torch.arange(4, device=policy.device) == policy.shift).expand(2, -1)
    with torch.no_grad():
        first, second = policy(ids, None, select, lambda logits: logits)
    return not torch.equal(first, second)


# ---- references -----------------------------------------------------------------------------------------------------


def _load_language_model(
    folder: Path,
    raw: dict,
    dtype: torch.dtype | None,
    attention: str,
    trust_remote_code: bool,
    denoise: bool,
    layout: Layout | None,
) -> Policy:
    """A policy of transformers' causal classes, turned into what `load_policy` was asked for."""
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    known = raw.get("model_type") in (*FORMATS, *UNSUPPORTED)
    load = _load_remote if trust_remote_code and not known else _load_known
    model = load(folder, raw, dtype, attention)
    hear_generation(model.config, folder)
    if denoise:
        make_denoising(model, tokenizer, shift=int(layout is None))
    if layout is not None:
        set_blocks(model.config, layout)
    return _make_policy(model, tokenizer, folder)


def _make_policy(model: nn.Module, tokenizer, folder: Path) -> Policy:
    """A policy of a model and a tokenizer, once they fit together."""
    config, rows = model.config, model.get_input_embeddings().num_embeddings
    causal = getattr(config, "is_causal", True) is not False
    mask_id = mask_token(config, tokenizer, rows, folder, causal=causal)
    if not causal:
        config.mask_token_id = mask_id
    shift = 1 if causal else config.logits_shift
    return Policy(model, tokenizer, mask_id=mask_id, shift=shift, causal=causal, layout=layout_of(config))


# ---- files ----------------------------------------------------------------------------------------------------------


TOKENIZERS = ("tokenizer.json", "merges.txt", "tokenizer.model", "vocab.txt")


def _load_tokenizer(folder: Path, trust_remote_code: bool, template: str | None = None):
    """The tokenizer with eos, pad and chat template. A tokenizer.json is taken as it is, whatever class wrote it.

    Args:
        template: taken if the folder has none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        elif (folder / "merges.txt").is_file():  # what Qwen2 and Dream publish
            tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer of {folder} cannot be read: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {folder} has no end-of-text token: set eos_token in tokenizer_config.json")
    tokenizer.chat_template = tokenizer.chat_template or template
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {folder} has no chat template: set chat_template in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---- models ---------------------------------------------------------------------------------------------------------


def _load_known(folder: Path, raw: dict, dtype: torch.dtype | None, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        config = make_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    config.attention_dropout = 0.0  # eval and train mode are one function
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"no model can be made of {folder} with attention={attention!r}: {reason}") from error
    with torch.device("cpu"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # made anew: its buffers are in no checkpoint
    model.model.embed_tokens.padding_idx = None  # else a pad token that is end-of-text too would never learn
    own = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    _fill(model, read_tensors(folder), llada_names(config) if raw["model_type"] == "llada" else own, folder, dtype)
    return model


def _fill(model: nn.Module, tensors: Iterator, names: dict[str, str], folder: Path, dtype: torch.dtype | None) -> None:
    """Give every parameter its tensor. names: the checkpoint's name of each -> the model's."""
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    tied = model.config.tie_word_embeddings
    missing, problems = dict.fromkeys(names), []
    for key, tensor in tensors:
        missing.pop(key, None)
        if key not in names:
            if not key.endswith("rotary_emb.inv_freq"):  # which old checkpoints carry and nothing needs
                problems.append(f"unexpected {key}")
        elif tensor.shape != shapes[names[key]] or not tensor.is_floating_point():
            came, needed = (list(tensor.shape), tensor.dtype), list(shapes[names[key]])
            problems.append(f"{key} is {came[0]} {came[1]}, where config.json needs floats {needed}")
        else:
            parent, _, leaf = names[key].rpartition(".")
            parameter = nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True))  # a copy: tensor maps the file
            if len(parameter) and not all(bound.isfinite() for bound in parameter.detach().aminmax()):
                problems.append(f"{key} holds NaN or infinity as {parameter.dtype}")
            setattr(model.get_submodule(parent), leaf, parameter)
    problems += [f"missing {key}" for key in missing if not (tied and names[key] == "lm_head.weight")]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:6])}{more}")
    if tied:
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        if not head.is_meta and not torch.equal(head, embedding):
            raise ValueError(f"config.json in {folder} ties the head to the embedding, but the weights of both differ")
        model.lm_head.weight = embedding


def _load_remote(folder: Path, raw: dict, dtype: torch.dtype | None, attention: str) -> nn.Module:
    import transformers

    name = "AutoModelForCausalLM" if "AutoModelForCausalLM" in raw.get("auto_map", {}) else "AutoModel"
    try:
        model = getattr(transformers, name).from_pretrained(
            folder, dtype=dtype or "auto", attn_implementation=attention, trust_remote_code=True
        )
        full = attends_forward(Policy(model, None, mask_id=None))
    except Exception as error:  # somebody else's code
        raise ValueError(
            f"the code of {folder} cannot be used, {type(error).__name__}: {error}. It must run under transformers "
            f"{transformers.__version__} and be laid out like LlamaForCausalLM (.model, .lm_head)"
        ) from error
    if not full:
        raise ValueError(
            f"the code of {folder} attends backwards only: its first logits ignore the last token, so it cannot "
            "denoise. Use a checkpoint whose code attends in both directions"
        )
    model.config.is_causal, model.config.logits_shift = False, raw.get("logits_shift", 0)
    return model


def _checkpoint_layers(policy: Policy) -> None:
    """Non-reentrant, because one loss may take several forward passes; without dropout no generator needs saving."""
    how = {"use_reentrant": False, "preserve_rng_state": False}
    lm = policy.model.get_base_model() if policy.has_adapters else policy.model
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:  # its name in older transformers
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


# ---- adapters -------------------------------------------------------------------------------------------------------


def _take_text(policy: Policy, folder: Path, trust_remote_code: bool) -> None:
    """An adapter's own tokenizer and chat template win over those of its base, as they are what it was trained with."""
    if any((folder / name).is_file() for name in TOKENIZERS):
        policy.tokenizer = _load_tokenizer(folder, trust_remote_code, policy.tokenizer.chat_template)
        mask = mask_token(
            policy.config,
            policy.tokenizer,
            policy.model.get_input_embeddings().num_embeddings,
            folder,
            causal=policy.causal,
        )
        if mask != policy.mask_id:
            raise ValueError(f"the tokenizer of {folder} has the mask token {mask}, its base {policy.mask_id}")
    elif (folder / "chat_template.jinja").is_file():
        policy.tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").is_file():
        own = read_json(folder, "tokenizer_config.json").get("chat_template")
        policy.tokenizer.chat_template = own or policy.tokenizer.chat_template


def base_of(folder: Path) -> str:
    base = read_json(folder, "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} does not say what it adapts: set base_model_name_or_path in adapter_config.json")
    try:
        resolve(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base of the adapter {folder} is gone ({error}): set base_model_name_or_path in adapter_config.json"
        ) from error
    return base
