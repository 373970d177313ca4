"""Truncated importance weights, and the Hamming ball: SEPO (arXiv:2502.01384), in the form that its theory has.

Restricted to the neighbours of a finished text, SEPO's policy gradient is that of a *local* likelihood,

    E_{x ~ old}[ clip(w) A grad S(x) ],   w = exp(S - S_old), detached,

with S = log p(x | x and its neighbours). Each position its own neighbourhood, that is the pseudo-likelihood
`OneMasked`; all together, `hamming_ball`. A weight at its bound keeps its gradient, where `PolicyGradient`'s clip would
drop it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.objectives.kl import Estimator, Penalty
from espo_lightning.objectives.objective import Scores
from espo_lightning.objectives.weighted import total


@dataclass(frozen=True)
class TruncatedRatio:
    """One ratio w = exp(S - S_old) per sequence, with value clip(w) and gradient clip(w) grad S; U = 1.

    It truncates itself: give the objective ``clip_range: .inf``.

    Args:
        clip: eps of clip(w, 1 - eps, 1 + eps).
        score: S, (scores, log-probabilities [M, B, L], advantages) -> [B] nats: `total`, or `hamming_ball`.

    Raises:
        ValueError: a clip outside (0, 1).
    """

    clip: float = 0.2
    score: Callable = total  # its signature unnamed, so that the command line takes callable objects too

    def __post_init__(self):
        if not 0 < self.clip < 1:
            raise ValueError(f"TruncatedRatio.clip must lie between 0 and 1, got {self.clip}")

    def __call__(self, scores: Scores) -> tuple[Tensor, Tensor]:
        value = self.score(scores, scores.new, None)
        log_weight = (value - self.score(scores, scores.old, None)).detach()
        truncated = log_weight.clamp(math.log1p(-self.clip), math.log1p(self.clip))
        log_ratio = (truncated + value - value.detach()).unsqueeze(-1)
        return log_ratio, torch.ones_like(log_ratio)


def truncated_ratio(scores: Scores, clip: float = 0.2) -> tuple[Tensor, Tensor]:
    """`TruncatedRatio` of the likelihood's own score, as a plain function of `Scores`.

    Args:
        scores: of B completions.
        clip: how far the ratio may be from 1.

    Returns:
        Log-ratios [B, 1] and weights [B, 1].
    """
    return TruncatedRatio(clip)(scores)


def hamming_ball(scores: Scores, log_probs: Tensor, advantages: Tensor | None = None) -> Tensor:
    """log p(x | x and all texts that differ from it in one token) = -log(1 - L + sum_i 1 / p_i): [M, B, L] -> [B] nats.

    p_i = p(x_i | all others), on `OneMasked`; with m of L positions the sum is L / m times theirs, and the logarithm
    biased. Computed by logsumexp.
    """
    length = log_probs.shape[-1]
    inverse = torch.where(scores.scored, scores.weight.log() - log_probs, -math.inf)
    log_sum = inverse.movedim(0, 1).flatten(1).logsumexp(-1) - math.log(len(log_probs))
    return -(log_sum + torch.log1p((1 - length) * (-log_sum).exp()))


def ball_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of `hamming_ball` instead of the likelihood's score, undivided.

    Arguments and results are those of `sequence_kl`.
    """
    return kl((hamming_ball(scores, scores.new) - hamming_ball(scores, to)).unsqueeze(0)), 1.0
