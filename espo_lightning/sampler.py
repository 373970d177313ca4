"""Decoding: from prompts to completions by iterated unmasking. Everything random is keyed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.masking import fold_in, uniform


def sample_tokens(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """One token per row from softmax(logits / temperature) by inverse CDF; argmax at temperature 0.

    Args:
        logits: float32 [n, V]; a token with logit -inf is never drawn.
        u: uniforms [n] in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits / temperature, -1).cumsum(-1)
    total = cdf[:, -1:]
    # strictly below the total, so that the first entry above it always has a positive probability
    point = torch.minimum(u.float().unsqueeze(-1) * total, total * (1 - 2**-23))
    return torch.searchsorted(cdf, point, right=True).squeeze(-1)


def low_confidence(logits: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """LLaDA's order: commit the proposals with the highest log-probability at temperature 1. [n, V], [n] -> [n]."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def random_order(logits: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Commit uniformly random positions: with one token a step, the decoder that the ELBO is a bound for."""
    return u.float()


class Decoder(ABC):
    """How completions are decoded, and of which policies. length: canvas width L. temperature: 0 is greedy."""

    length: int
    temperature: float

    @property
    def greedy(self) -> "Decoder":
        """The same at temperature 0."""
        return replace(self, temperature=0.0)

    @abstractmethod
    def check(self, policy) -> None:
        """Raise a ValueError if the policy cannot be decoded this way."""

    @abstractmethod
    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        """Token ids [B, L] of completions with int64 keys [B]; each depends on its key and its prompt only.

        Args:
            agree: "does any process still need a step?", asked before every step whose need depends on the data, so
                that all processes of a sharded policy run equally many forwards.
        """


@dataclass(frozen=True)
class Decoding(Decoder):
    """How a diffusion policy's completions are decoded.

    Args:
        length: canvas width L in tokens, a multiple of ``block_length``.
        block_length: tokens per block; blocks are filled from the left.
        steps: denoising steps for the whole canvas, a multiple of the number of blocks; steps = length commits
            one token a step.
        temperature: of the proposed tokens; 0 is greedy.
        order: which proposals a step commits first.

    Raises:
        ValueError: lengths or steps that do not divide.
    """

    length: int = 16
    block_length: int = 16
    steps: int = 16
    temperature: float = 1.0
    order: Callable[[Tensor, Tensor, Tensor], Tensor] = low_confidence

    def __post_init__(self):
        if min(self.length, self.block_length) < 1 or self.length % self.block_length:
            raise ValueError(f"length {self.length} is not a multiple of block_length {self.block_length}, from 1 up")
        blocks = self.length // self.block_length
        if self.steps % blocks or not blocks <= self.steps <= self.length:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {blocks} (length {self.length} / block_length "
                f"{self.block_length}), between {blocks} and {self.length}; got {self.steps}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")

    def check(self, policy) -> None:
        if policy.mask_id is None:
            raise ValueError(
                "the policy is a causal model, which cannot denoise: use decoding=AutoregressiveDecoding (with "
                "likelihood=Autoregressive), or make it a diffusion policy by sft (load_policy with denoise: true)"
            )

    def generate(self, policy, prompts, keys: Tensor, agree: Callable[[bool], bool] = lambda more: more) -> Tensor:
        return generate(policy, prompts, keys, self)

    @property
    def commits(self) -> list[list[int]]:
        """Tokens committed by each step of each block: as even as possible, the remainder first (LLaDA's schedule)."""
        blocks = self.length // self.block_length
        base, extra = divmod(self.block_length, self.steps // blocks)
        return [[base + (step < extra) for step in range(self.steps // blocks)]] * blocks


@torch.no_grad()
def generate(policy, prompts, keys: Tensor, decoding: Decoding) -> Tensor:
    """Semi-autoregressive masked diffusion decoding (LLaDA's sampler).

    The canvas of mask tokens is filled block by block from the left. Each step proposes a token for every
    masked position of the active block and commits those that come first in ``decoding.order``. A completion
    depends on its key and its prompt only, not on its batch-mates.

    Args:
        policy: a `Policy`, or any callable like it with a ``mask_id``.
        prompts: `Prompts` of B rows and width P.
        keys: int64 [B], the randomness of each completion.

    Returns:
        Token ids [B, L] without a mask token.
    """
    batch, width = prompts.ids.shape
    length = decoding.length

    def propose(logits: Tensor, u_token: Tensor, u_order: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.index_fill(-1, mask_token, float("-inf"))  # neither drawn nor part of a confidence
        tokens = sample_tokens(logits, decoding.temperature, u_token)
        return tokens, decoding.order(logits, tokens, u_order)

    canvas = torch.cat([prompts.ids, prompts.ids.new_full((batch, length), policy.mask_id)], 1)
    attention, mask_token = prompts.attention(length), canvas.new_tensor(policy.mask_id)
    select = torch.zeros_like(canvas, dtype=torch.bool)  # masked positions of the active block
    step = 0
    for block, commits in enumerate(decoding.commits):
        start = width + block * decoding.block_length
        select[:, start : start + decoding.block_length] = True
        for commit in commits:
            positions = select.nonzero()[:, 1].view(batch, -1)  # [B, m]
            noise = uniform(fold_in(keys, step), 2 * length).view(batch, 2, length)
            u_token, u_order = noise.gather(2, (positions - width).unsqueeze(1).expand(-1, 2, -1)).unbind(1)
            tokens, priority = policy(canvas, attention, select, propose, u_token.flatten(), u_order.flatten())
            chosen = priority.view(batch, -1).topk(commit, sorted=False).indices
            positions = positions.gather(1, chosen)
            canvas.scatter_(1, positions, tokens.view(batch, -1).gather(1, chosen))
            select.scatter_(1, positions, False)
            step += 1
    return canvas[:, width:]
