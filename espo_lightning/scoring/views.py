"""Scores on partly hidden views that are no likelihoods: coupled-GRPO's, UniGRPO's, SPG's and SEPO's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.keys import fold_in, random_bits, uniform
from espo_lightning.ranges import check_counts
from espo_lightning.scoring.likelihood import Likelihood, Seen, SeenLikelihood
from espo_lightning.scoring.masks import Masks, block_view_masks, random_view_masks, token_view_masks


def check_interval(low: float, high: float) -> None:
    """Raises ValueError unless low < high lie within (0, 1)."""
    if not 0 < low < high < 1:
        raise ValueError(f"low and high must be chances with 0 < low < high < 1, got {low} and {high}")


@dataclass(frozen=True)
class TokenViews(SeenLikelihood):
    """Every token in three views: all hidden, a random part, the complement (DiffuCoder, arXiv:2506.20639).

    A score of tokens, not of the sequence: its mean is 1.5 times an average of three views.

    Args:
        low, high: the interval of r, the chance to hide a position in the second view.

    Raises:
        ValueError: unless 0 < low < high < 1.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self):
        check_interval(self.low, self.high)

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        return token_view_masks(keys, seen.valid, low=self.low, high=self.high)


@dataclass(frozen=True)
class RandomViews(SeenLikelihood):
    """Random views whose hidden tokens are scored: UniGRPO as in dLLM-RL (arXiv:2509.06949) or as MMaDA describes it.

    Args:
        draws: views per completion (M).
        low, high: the interval of t, the chance to hide a token.
        rising: t rises evenly over the updates of a rollout, from a start in the interval to 1 (MMaDA,
            arXiv:2505.15809), instead of being drawn for every view.

    Raises:
        ValueError: no draw, or not 0 < low < high < 1.
    """

    draws: int = 1
    low: float = 0.1
    high: float = 0.9
    rising: bool = False

    def __post_init__(self):
        check_interval(self.low, self.high)
        check_counts(1, draws=self.draws)

    @property
    def independent_draws(self) -> int:
        return self.draws

    def check(self, policy, length: int, updates: int = 1) -> None:
        super().check(policy, length, updates)
        if self.rising and updates < 2:
            raise ValueError("likelihood.rising needs updates >= 2: the chance rises from one update to the next")

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        draw = torch.arange(self.draws, device=keys.device).unsqueeze(-1)
        keys = fold_in(fold_in(keys, -9), draw)  # [M, B]
        start = fold_in(fold_in(seen.keys, -10), draw) if self.rising else fold_in(keys, -10)
        level = self.low + (self.high - self.low) * uniform(start, 1).squeeze(-1)
        if self.rising:
            level = level + (1 - level) * seen.update / max(1, seen.updates - 1)
        return random_view_masks(keys, seen.valid, level)


@dataclass(frozen=True)
class BlockViews(SeenLikelihood):
    """Part of one block and all later ones, after a little noise: the views of SPG (arXiv:2510.09541) and StableDRL.

    The weights make the score nats per sequence, but not an ELBO: what is scored far behind the block sees no context.

    Args:
        draws: views per completion (M).
        block: tokens of a block; it divides the canvas.
        noise: chance to hide a token of the prompt or of an earlier block.

    Raises:
        ValueError: no draw, no block, or a noise outside [0, 1).
    """

    draws: int = 2
    block: int = 32
    noise: float = 0.15

    def __post_init__(self):
        check_counts(1, draws=self.draws, block=self.block)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be a chance from 0 to below 1, got {self.noise}")

    @property
    def independent_draws(self) -> int:
        return self.draws

    def check(self, policy, length: int, updates: int = 1) -> None:
        super().check(policy, length, updates)
        if length % self.block:
            raise ValueError(
                f"likelihood.block {self.block} does not divide the canvas: decoding.length is {length}; set "
                "likelihood.block to a divisor of it"
            )

    def masks(self, keys: Tensor, seen: Seen) -> Masks:
        return block_view_masks(keys, seen.valid, seen.prompt, self.draws, block=self.block, noise=self.noise)


@dataclass(frozen=True)
class OneMasked(Likelihood):
    """The pseudo-likelihood sum_i log p(y_i | x, all other tokens): one hidden position each (SEPO, arXiv:2502.01384).

    The k = 1 level of the ELBO, times L. Its expected gradient is 0 under a law that its conditionals agree with, and a
    sample of positions estimates it without bias.

    Args:
        draws: positions per completion, without replacement; null = all L, one forward each.

    Raises:
        ValueError: no draw.
    """

    draws: int | None = 16

    def __post_init__(self):
        if self.draws is not None:
            check_counts(1, draws=self.draws)

    @property
    def random(self) -> bool:
        return self.draws is not None

    def check(self, policy, length: int, updates: int = 1) -> None:
        super().check(policy, length, updates)
        if self.draws is not None and self.draws > length:
            raise ValueError(
                f"likelihood.draws is {self.draws}, but decoding.length, of which positions are drawn without "
                f"replacement, is {length}: lower it, or set it to null for all positions"
            )

    def draw(self, keys: Tensor, length: int) -> Masks:
        position = torch.arange(length, device=keys.device).expand(len(keys), -1)
        if self.draws is not None:
            position = random_bits(fold_in(keys, -12), length).argsort(-1)[:, : self.draws]
        hidden = position.T.unsqueeze(-1) == torch.arange(length, device=keys.device)  # [M, B, L]
        return Masks(hidden, length * hidden.float(), False)
