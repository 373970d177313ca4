"""Masked language models of transformers as policies: BERT, RoBERTa, XLM-R, CamemBERT, ModernBERT, EuroBERT, ESM.

`MaskedLM` is the whole hook of a network that is laid out in another way than Llama, and an example of it: where its
network, its head and its layers are, and where its positions begin behind padding on the left.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from espo_lightning.policies.layout import nothing_hidden
from espo_lightning.policies.policy import Policy

MASKED_LMS = ("bert", "roberta", "xlm-roberta", "camembert", "modernbert", "eurobert", "esm")
CHAT_TEMPLATE = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ sep_token }}{% endfor %}"


class MaskedLM(Policy):
    """A policy of a ``...ForMaskedLM`` class, which attends in all directions and predicts token i from state i."""

    @property
    def network(self) -> nn.Module:
        return self.language_model.base_model

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        lm = self.language_model
        if hasattr(lm, "decoder"):  # ModernBERT
            return nn.Sequential(lm.head, lm.decoder)
        return lm.cls if hasattr(lm, "cls") else lm.lm_head  # BERT; RoBERTa, EuroBERT, ESM

    @property
    def layers(self) -> nn.ModuleList:
        return max((m for m in self.network.modules() if isinstance(m, nn.ModuleList)), key=len)

    @property
    def positions(self) -> float:
        return super().positions if self._table is None else self._table.num_embeddings - first_of(self._table)

    def check_tokens(self, count: int) -> None:
        if count > self.positions:
            raise ValueError(f"prompt and canvas have {count} tokens, but the network {self.positions} positions")

    @property
    def _table(self) -> nn.Embedding | None:
        """Of absolute positions."""
        return getattr(getattr(self.network, "embeddings", None), "position_embeddings", None)

    def states(self, ids: Tensor, attention: Tensor | None, rows: Tensor, **network: Any) -> Tensor:
        keys = torch.ones_like(ids) if attention is None else attention.long()
        positions = {}
        if self._table is not None:  # absolute: count real tokens
            positions["position_ids"] = (keys.cumsum(1) - 1).clamp(min=0) + first_of(self._table)
        seen = keys if attention is None else _in_windows(self, keys)
        return self.network(ids, attention_mask=seen, **positions).last_hidden_state.flatten(0, 1)[rows]


def load_masked_lm(folder: Path, dtype: torch.dtype | None, attention: str) -> MaskedLM:
    """A masked LM of a folder, without dropout; see `load_policy`.

    Where the tokenizer has no end-of-text token, the separator is it, and a missing chat template is the contents of
    the turns, with a separator after each.

    Raises:
        ValueError: weights or tokenizer that cannot be read, or do not fit.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    try:
        config = AutoConfig.from_pretrained(folder)
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # eval and train mode are one function
        with torch.random.fork_rng(devices=[]):
            model, report = AutoModelForMaskedLM.from_pretrained(
                folder, config=config, dtype=dtype or "auto", attn_implementation=attention, output_loading_info=True
            )
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"no masked LM can be made of {folder} with attention={attention!r}: {reason}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:6])
        raise ValueError(f"the weights in {folder} do not fit its config.json: missing {missing}")
    tokenizer = _complete_tokenizer(folder)
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(f"tokenizer and weights of {folder} do not belong together: token id {largest}, {rows} rows")
    damaged = [name for name, p in model.named_parameters() if not all(x.isfinite() for x in p.detach().aminmax())]
    if damaged:
        raise ValueError(f"the weights in {folder} hold NaN or infinity as {model.dtype}: {', '.join(damaged[:6])}")
    model.config.mask_token_id = tokenizer.mask_token_id  # what it says is a default of its class (EuroBERT)
    return MaskedLM(model, tokenizer, mask_id=tokenizer.mask_token_id)


def first_of(table: nn.Embedding) -> int:
    """The first row that is a position: RoBERTa's begin after its padding's."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _in_windows(policy: MaskedLM, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """Keys [N, T] as the network takes them: for the windows of ModernBERT, whose padding may see only padding, masks
    that eager attention can take the softmax of."""
    if policy.config.model_type != "modernbert" or policy.attention_kernel != "eager":
        return keys
    from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

    shape = keys.unsqueeze(-1).to(policy.model.dtype)  # of which the masks take sizes and type
    of = {"config": policy.config, "inputs_embeds": shape, "attention_mask": keys}
    made = {
        "full_attention": create_bidirectional_mask(**of),
        "sliding_attention": create_bidirectional_sliding_window_mask(**of),
    }
    return {kind: mask if mask is None else nothing_hidden(mask) for kind, mask in made.items()}  # None: all are keys


def _complete_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer of {folder} cannot be read: {reason}") from error
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    for name in ("mask", "pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f"the tokenizer of {folder} has no {name} token: set it in tokenizer_config.json")
    return tokenizer
