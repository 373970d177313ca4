"""Policies: language models on transformers' own Llama, Qwen2 and Qwen3, seen through one small interface.

LLaDA is Llama without the causal mask; Dream is Qwen2 without it, and hidden state i-1 predicts token i.
What a checkpoint is, is read from its config and tokenizer, never from its name.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espo_lightning.policies.config_keys import positions
from espo_lightning.policies.layout import CAUSAL, FULL, Layout, bias, causally
from espo_lightning.policies.prefix import Prefix, apply_head, selectable, selective_layer
from espo_lightning.policies.prompts import Prompts
from espo_lightning.policies.text import Messages, plain_tokens, prompt_tokens, tell_unknown
from espo_lightning.ranges import check_counts

CARD = (
    "LoRA adapters of the base model named above, trained with espo_lightning. `espo_lightning.load_policy` opens this "
    "folder on its base; `python -m espo_lightning.export --policy=THIS --output=FOLDER` merges them into it.\n"
)


class Policy(nn.Module):
    """A language model, its tokenizer, and the one forward pass that sampler and scorer share.

    Args:
        model: a causal-LM class of transformers with a Llama-like layout.
        tokenizer: with pad and eos tokens, and a mask token unless ``causal``.
        mask_id: the mask token; None for causal models.
        shift: 1 if hidden state i-1 predicts token i (Dream, causal LMs), 0 if hidden state i does (LLaDA).
        causal: whether attention looks backwards only.
        layout: who attends to whom, if not `FULL` or, for causal models, `CAUSAL`.
        whole_last_layer: run the last layer's MLP everywhere, not only where a token is predicted (`selective_layer`).

    Raises:
        ValueError: another shift, a negative mask_id, or blocks with a shift or where attention cannot be told of them.
    """

    sharded = False  # by a strategy

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        mask_id: int | None,
        shift: int = 0,
        causal: bool = False,
        layout: Layout | None = None,
        whole_last_layer: bool = False,
    ):
        super().__init__()
        check_counts(0, mask_id=mask_id)
        if shift not in (0, 1):
            raise ValueError(f"shift must be 0 (hidden state i predicts token i) or 1 (state i-1 does), got {shift}")
        self.model, self.tokenizer = model, tokenizer
        self.mask_id, self.shift, self.causal = mask_id, shift, causal
        self.layout = layout or (CAUSAL if causal else FULL)
        self._check_layout()
        self.told_unknown = False
        last = self.layers[-1] if len(self.layers) else None
        self.selective = selectable(last) and not whole_last_layer
        if self.selective:
            last.forward = MethodType(selective_layer, last)

    def _check_layout(self) -> None:
        if self.causal != self.layout.causal:
            raise ValueError(f"a policy with causal={self.causal} cannot have {self.layout}")
        if self.layout.block is None:
            return
        if self.shift:
            raise ValueError(
                f"{self.layout} needs logits_shift 0: with a shift, the first token of a block is predicted by the "
                "last state of the block before, which never sees the block"
            )
        if self.attention_kernel not in ("sdpa", "eager"):
            raise ValueError(f"{self.layout} needs attention sdpa or eager, got {self.attention_kernel}")

    @property
    def attention_kernel(self) -> str:
        """Transformers' name of how attention is computed: sdpa, eager, flash_attention_2, ..."""
        return self.config._attn_implementation

    @property
    def config(self):
        """The network's configuration, as transformers has it."""
        return self.model.config

    @property
    def positions(self) -> float:
        """How many tokens prompt and completion may have together; inf where the model does not say."""
        return positions(getattr(self.model, "config", None))

    def check_canvas(self, length: int) -> None:
        """Raise a ValueError if a canvas of ``length`` tokens leaves no room for a prompt."""
        if length >= self.positions:
            raise ValueError(
                f"a canvas of length {length} leaves no room for a prompt: config.json of the policy says "
                f"max_position_embeddings={self.positions}; lower the length"
            )

    def check_tokens(self, count: int) -> None:
        """Raise a ValueError if prompt and completion have more than `positions` tokens."""
        if count > self.positions:
            raise ValueError(
                f"prompt and completion have {count} tokens together, and config.json says "
                f"max_position_embeddings={self.positions}: lower max_prompt_length or the length of the canvas"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_adapters(self) -> bool:
        """Whether the model is a peft model, whose adapters can be switched off."""
        return hasattr(self.model, "disable_adapter")

    @property
    def resumes(self) -> bool:
        """Whether a pass that is differentiated may go on from the keys and values of another one, see `prefix`.

        Not where layers are recomputed, which then ignore them, or sharded, as a backward pass that enters a layer by
        its keys only finds no weights there.
        """
        return self.selective and not self.sharded and not (self.training and self._recomputes)

    @property
    def _recomputes(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return getattr(self.network, "gradient_checkpointing", False)  # transformers' own word for it

    @property
    def language_model(self) -> nn.Module:
        """The transformers model, with ``.model`` (the network) and ``.lm_head``; under peft, the one inside."""
        return self.model.get_base_model() if self.has_adapters else self.model

    # ---- the hook of other networks: what stands between token ids and logits ----------------------------------------

    @property
    def network(self) -> nn.Module:
        """From token ids to hidden states."""
        return self.language_model.model

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """From hidden states [n, d] to logits [n, V]."""
        return self.language_model.lm_head

    @property
    def layers(self) -> nn.ModuleList | list:
        """What strategies shard, one by one; an empty list = nothing of the kind."""
        return getattr(getattr(self.language_model, "model", None), "layers", [])

    def states(self, ids: Tensor, attention: Tensor | None, rows: Tensor, **network: Any) -> Tensor:
        """Hidden states [n, d] at the rows [n] of the flattened ids [N, T].

        Args:
            attention: as in `forward`.
            network: ``use_cache``, and where they are given ``past_key_values`` and ``position_ids``.
        """
        network["attention_mask"] = self._bias(attention, ids.shape[1])
        if self.selective:
            return self.network(ids, rows=rows, **network).last_hidden_state
        return self.network(ids, **network).last_hidden_state.flatten(0, 1)[rows]

    # ------------------------------------------------------------------------------------------------------------------

    def tokens(self, prompts: list[str | Messages]) -> list[list[int]]:
        """Token ids of chat-templated prompts, each as long as it is. A string is one user turn.

        What a prompt says stays text, see `text`. Once, a prompt that the tokenizer can hardly read is told.

        Raises:
            ValueError: the template puts a mask token into a prompt.
        """
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        rows = prompt_tokens(self.tokenizer, turns)
        if masked := [str(prompt)[:60] for prompt, row in zip(prompts, rows) if self.mask_id in row]:
            raise ValueError(f"the chat template makes the mask token of the prompt that starts {masked[0]!r}")
        self.told_unknown = self.told_unknown or tell_unknown(self.tokenizer, rows, prompts, "prompt")
        return rows

    def answer_tokens(self, answers: list[str]) -> list[list[int]]:
        """Token ids of answers to learn from, none of them special. Once, one with unknown tokens is told."""
        rows = plain_tokens(self.tokenizer, answers)
        self.told_unknown = self.told_unknown or tell_unknown(self.tokenizer, rows, answers, "answer", share=0.0)
        return rows

    def encode(self, prompts: list[str | Messages], max_length: int | None = None) -> Prompts:
        """`tokens`, left-padded to one width.

        Raises:
            ValueError: a prompt is longer than ``max_length`` tokens; nothing is ever truncated silently.
        """
        rows = self.tokens(prompts)
        width = max(map(len, rows))
        if max_length is not None and width > max_length:
            worst = max(range(len(rows)), key=lambda i: len(rows[i]))
            raise ValueError(
                f"a prompt has {width} tokens, more than max_prompt_length={max_length}: raise it, or drop "
                f"the problem that starts {str(prompts[worst])[:60]!r}"
            )
        ids = [[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])
        return Prompts(torch.tensor(ids, device=self.device), None if mask.all() else mask.to(self.device))

    def decode(self, completion: Tensor) -> list[str]:
        """Text of each completion [B, L] up to its first end-of-text token, without special tokens."""
        completion = completion.cpu()  # at once
        return [
            self.tokenizer.decode(row[:n], skip_special_tokens=True)
            for row, n in zip(completion.tolist(), self.lengths(completion).tolist())
        ]

    def lengths(self, completion: Tensor) -> Tensor:
        """Tokens before the first end-of-text token: [B, L] -> [B]."""
        ends = torch.zeros_like(completion, dtype=torch.bool)
        for token in self.eos_ids:  # one after the other: nothing is sent to the device
            ends |= completion == token
        return torch.where(ends.any(-1), ends.int().argmax(-1), completion.shape[-1])

    @property
    def eos_id(self) -> int:
        """The end-of-text token that fills a canvas after its text, here and in supervised training."""
        return self.tokenizer.eos_token_id

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text: the tokenizer's and those that the config names."""
        named = self.config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return {i for i in [*named, self.tokenizer.eos_token_id] if i is not None}

    def forward(
        self,
        ids: Tensor,
        attention: Tensor | None,
        select: Tensor,
        reduce: Callable[..., Any],
        *columns: Tensor,
        prefix: "Prefix | None" = None,
        positions: Tensor | None = None,
    ) -> Any:
        """Run the network and the head on the selected positions only.

        Args:
            ids: int64 [N, T].
            attention: bool [N, T], True = attend to this key; None = to all. bool [N or 1, T, T], row i = whom position
                i attends to, which a block-causal policy always needs; see `Prompts.seen_by`. With a prefix, the rows
                of what it knows may be left out, and None is for a pass whose positions see it all and each other.
            select: bool [N, T], n True entries: the *predicted* positions (the shift is undone here), so never the
                first if there is a shift. Then it may be [N, T + 1], as the token after the last is predicted too.
            reduce: (float32 logits [c, V], *columns [c]) -> a tensor or tuple of tensors [c], called on
                chunks, so that the logits of all positions never exist at once.
            columns: tensors [n], one entry per selected position in row-major order; without any, n is waited for.
            prefix: what `Policy.prefix` made: what it knows of ``ids`` is not computed again.
            positions: int64 [N or 1, T], places of the tokens, which are not checked here; None = 0, 1, .. T - 1.

        Returns:
            What ``reduce`` returns, for all n positions.

        Raises:
            ValueError: more tokens than the network was made for, or a block-causal policy was not told who sees whom.
        """
        self.check_tokens(ids.shape[1] if positions is None else 0)
        if self.layout.block is not None and (prefix is None if attention is None else attention.ndim == 2):
            raise ValueError(f"this policy has {self.layout}: pass attention=prompts.seen_by(policy, length)")
        network = {"use_cache": prefix is not None}
        if positions is not None:
            network["position_ids"] = positions
        if prefix is not None:
            part, network["past_key_values"] = prefix.computed, prefix.cache
            ids, select = ids[:, part], select[:, part]
            if positions is not None:
                network["position_ids"] = positions[:, part]
            if attention is not None and attention.ndim == 3:
                attention = attention[:, -ids.shape[1] :]
        select = select[:, self.shift :]
        select = F.pad(select, (0, ids.shape[1] - select.shape[1]))
        selected = select.flatten()
        rows = torch.nonzero_static(selected, size=len(columns[0])) if columns else selected.nonzero()
        with nullcontext() if prefix is None else prefix.filled(self, self.training and self._recomputes):
            hidden = self.states(ids, attention, rows.squeeze(-1), **network)  # of the flattened states [N T, d]
        return apply_head(self.head, hidden, reduce, columns)

    def prefix(self, start: int | None = None, room: int | None = None, stop: int | None = None) -> "Prefix":
        """An empty store for the keys and values of what precedes position ``start``; None = of all that passes.

        room: positions of the longest pass, if none is differentiated; see `Prefix`.
        stop: with ``start``, also keep those of what follows position ``stop``; see `Prefix`.

        Raises:
            ValueError: a model of another family, whose own code may ignore it.
        """
        if not self.selective:
            raise ValueError(
                "prefix_cache needs a Llama, Qwen2 or Qwen3 network, without its own code or whole_last_layer: drop it"
            )
        # the hidden state before ``start`` is needed anew where it predicts
        return Prefix(None if start is None else start - self.shift, room, stop)

    def compile_network(self, backend: str) -> None:
        """torch.compile the layers in place (the head and its reductions stay eager); parameter names do not change.

        Raises:
            ValueError: an unknown backend.
        """
        if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise ValueError(f"compile must be one of {', '.join(known)}, got {backend!r}")
        self.network.compile(backend=backend, dynamic=True)

    def _bias(self, attention: Tensor | None, queries: int) -> Tensor | None:
        """The 4D additive mask [N, 1, 1 or T, T], the one form that SDPA and eager attention both read as it is.

        None means full attention, because ``config.is_causal`` is False. Causal models with SDPA, and other kernels
        (flash, flex), get the plain 2D mask.
        """
        kernel = self.attention_kernel
        if attention is None or kernel not in ("sdpa", "eager") or (self.causal and kernel == "sdpa"):
            return attention
        return bias(causally(attention, queries) if self.causal else attention, self.model.dtype)

    def save(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that `load_policy` opens: weights for transformers, or adapters alone for peft.

        Args:
            state_dict: the complete weights of this policy, where it holds only its part of them (see `strategies`).
        """
        # peft would otherwise ask the hub whether the embedding was resized
        arguments = {"save_embedding_layers": False} if self.has_adapters else {}
        if state_dict is not None:
            arguments["state_dict"] = {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.model.save_pretrained(folder, **arguments)
        self.tokenizer.save_pretrained(folder)
        if self.has_adapters:
            card = Path(folder) / "README.md"  # peft's has a hundred places to fill in below its first lines
            facts = card.read_text().split("---")[1]
            card.write_text(f"---{facts}---\n\n{CARD}")
