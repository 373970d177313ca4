"""Small policies from scratch: LLaDA's architecture, or a causal Llama, with a character tokenizer."""

from typing import TYPE_CHECKING, Literal

import torch

from espo_lightning.policies.formats import layout_keys
from espo_lightning.policies.layout import Layout
from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character: 66 tokens for digits, arithmetic, small letters and the chat's special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<mask>", "<unk>", "<system>", "<user>", "<assistant>"]
    characters = "0123456789+-*/()=,.:;<>?!'\"[]|_ \nabcdefghijklmnopqrstuvwxyz"
    vocabulary = [*special, *characters]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_policy(
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int = 256,
    seed: int = 0,
    causal: bool = False,
    whole_last_layer: bool = False,
    block: int | None = None,
    origin: Literal["global", "response"] = "global",
) -> Policy:
    """A small masked diffusion LM of LLaDA's architecture with random weights and `character_tokenizer`.

    Args:
        hidden_size: width d.
        layers: transformer layers.
        heads: attention heads.
        intermediate_size: width of the gated MLP.
        seed: of the weights; no global generator is touched.
        causal: an autoregressive Llama of the same size and weights instead, for controlled comparisons.
        whole_last_layer: no `selective_layer`: slower, and sums are taken in another order. bundled:sudoku was made so.
        block, origin: block-causal attention instead of full, see `Layout`.

    Raises:
        ValueError: a number out of range, or a width that the heads cannot share.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_counts(1, hidden_size=hidden_size, layers=layers, heads=heads, intermediate_size=intermediate_size)
    check_counts(0, seed=seed)
    if hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size must be a multiple of twice the heads, as positions turn pairs of numbers; got {hidden_size} "
            f"and {heads} heads"
        )
    tokenizer = character_tokenizer()
    layout = Layout(block, origin, causal)
    masked = {"is_causal": False, "mask_token_id": tokenizer.mask_token_id, "logits_shift": 0}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **({} if causal else masked | layout_keys(layout)),
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator; leave it as it was
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, config.initializer_range, generator=generator)
    facts = {"mask_id": None, "shift": 1} if causal else {"mask_id": tokenizer.mask_token_id}
    return Policy(model, tokenizer, causal=causal, layout=layout, whole_last_layer=whole_last_layer, **facts)
