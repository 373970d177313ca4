"""The seam of every method: from scores and advantages to one loss per completion.

    losses, statistics = objective(scores, advantages, group)

A method is a mask law (`espo_lightning.scoring`), an advantage, and an objective. The trainer prepares what the
objective asks for and knows no method by name: it averages the losses, weighed by ``count``, over all completions of
all processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of B completions of L tokens on M mask draws, all on the same masks.

    Args:
        new: [M, B, L] nats, under the policy, with its graph; 0 where a position is not scored.
        old: [M, B, L], under the policy that decoded them; None if the objective does not ask for it.
        ref: [M, B, L], under the reference; None likewise.
        weight: [M, B, L], the likelihood's; 0 = not scored. A completion's score, in nats per sequence, is
            ``terms.sum(-1).mean(0)``.
        length: int64 [B], tokens up to and including the first end-of-text token.
    """

    new: Tensor
    old: Tensor | None
    ref: Tensor | None
    weight: Tensor
    length: Tensor

    @property
    def scored(self) -> Tensor:
        """Which positions a draw scores: bool [M, B, L]."""
        return self.weight != 0

    @cached_property
    def terms(self) -> Tensor:
        """Weighted log-probabilities under the policy: [M, B, L]."""
        with torch.enable_grad():  # it is kept, and the first to ask may be a statistic
            return self.weight * self.new

    def delta(self, to: Tensor) -> Tensor:
        """Weighted log-ratio of every position to other log-probabilities: [M, B, L] -> [M, B, L]."""
        return self.terms - self.weight * to


def alike(length: Tensor) -> Tensor:
    """Every completion counts alike in the loss: lengths [B] -> ones [B]."""
    return torch.ones_like(length, dtype=torch.float32)


def by_length(length: Tensor) -> Tensor:
    """A completion counts by its tokens, so that the loss is one mean over all tokens: lengths [B] -> [B]."""
    return length.float()


Statistics = dict[str, Tensor]  # name -> one value per completion [B], detached; logged as train/NAME


class Objective(ABC):
    """What is maximised. Subclasses are frozen dataclasses.

    Attributes:
        count: lengths [B] -> how much each completion counts, up to a common factor; `alike` or `by_length`.
        old: whether it compares with the policy that decoded.
        reference: whether it compares with a reference, which is then made and scored.
        groups: whether the completions of a prompt meet in a loss, so that they must come together.
        idle: whether completions with advantage 0 have no gradient, so that groups with equal rewards may be left out.
    """

    count: Callable[[Tensor], Tensor] = staticmethod(alike)
    old: bool = True
    reference: bool = False
    groups: bool = False
    idle: bool = True

    @abstractmethod
    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        """Losses [B] to be minimised, each a function of its own scores (with ``groups``: of its group's).

        Args:
            scores: of B completions, those of a prompt side by side.
            advantages: [B].
            group: completions of a prompt, if ``groups``.
        """

    def check(self, likelihood: Any, decoding: Any) -> None:  # noqa: B027
        """Raise a ValueError if the objective cannot use a likelihood's scores of what a decoder makes."""
