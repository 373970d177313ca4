"""Two bounds of a log-likelihood from M partly hidden views, and which of them a completion is scored by.

SPG (arXiv:2510.09541): maximise a lower bound where a completion is better than its group, minimise an upper bound
where it is worse. All in nats per *token*: |y| tokens, of which draw t scores k_t.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.objectives.objective import Scores


def lower_bound(scores: Scores, log_probs: Tensor) -> Tensor:
    """mean_t (1 / k_t) sum of the scored log-probabilities: [M, B, L] -> [B], nats per token."""
    return (log_probs * scores.scored).sum(-1).div(scores.scored.sum(-1).clamp(min=1)).mean(0)


def upper_bound(scores: Scores, log_probs: Tensor, power: float) -> Tensor:
    """(1 / power) mean_i log mean_t 1{t scores i} p_i^power |y| / k_t: [M, B, L] -> [B], nats per token.

    The mean is over positions that some draw scores. Computed by logsumexp, so that no token, however improbable,
    leaves the bound; as the logarithm of a mean of M draws it is biased for small M.
    """
    scored, ever = scores.scored, scores.scored.any(0)
    share = scores.length.to(log_probs.dtype) / scored.sum(-1).clamp(min=1)  # |y| / k_t, [M, B]
    terms = power * log_probs + share.log().unsqueeze(-1)
    # where no draw scores a position every term is -inf, whose gradient is NaN: put 0 there, and leave it out
    terms = terms.masked_fill(~scored, -math.inf).masked_fill(~ever, 0.0)
    log_mean = terms.logsumexp(0) - math.log(len(terms))
    return (log_mean * ever).sum(-1) / ever.sum(-1).clamp(min=1) / power


@dataclass(frozen=True)
class Sandwich:
    """The lower bound where A > 0, a mixture with the upper one elsewhere; in nats per token.

    Args:
        beta: the power of the upper bound (the paper's beta; 1.5, for Sudoku 1.0).
        mix: weight of the upper bound where A <= 0: 1 = the bound alone, 0 = the lower one for all.

    Raises:
        ValueError: a power that is not positive, or a mixture outside [0, 1].
    """

    beta: float = 1.5
    mix: float = 0.5

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"Sandwich.beta must be positive, got {self.beta}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"Sandwich.mix must lie between 0 (lower bound) and 1 (upper bound), got {self.mix}")

    def __call__(self, scores: Scores, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """Scores [B] from log-probabilities [M, B, L] and advantages [B]."""
        lower, upper = lower_bound(scores, log_probs), upper_bound(scores, log_probs, self.beta)
        return torch.where(advantages > 0, lower, self.mix * upper + (1 - self.mix) * lower)


def sandwich(scores: Scores, log_probs: Tensor, advantages: Tensor) -> Tensor:
    """`Sandwich` with SPG's settings for mathematics, as a plain function: a power of 1.5, an even mixture."""
    return Sandwich()(scores, log_probs, advantages)
