"""KL estimators, and where they are applied.

An *estimator* is a function of log-ratios of M draws: [M, ...] -> [...]. A *place* says which log-ratios these are, and
what the penalty is divided by: (scores, estimator, log-probabilities to compare with) -> (nats [B], divisor [B] or
number), nats per sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from espo_lightning.objectives.objective import Scores

Estimator = Callable[[Tensor], Tensor]
Penalty = tuple[Tensor, Tensor | float]


def k1(delta: Tensor) -> Tensor:
    """The log-ratio itself, averaged over the draws: [M, ...] -> [...] nats.

    Its expected gradient is 0 for exact likelihoods, so that it is no penalty.
    """
    return delta.mean(0)


def k1_score(delta: Tensor) -> Tensor:
    """The authors' "k1", which adds a score-function term to the log-ratio: [M, ...] -> [...] nats.

    Its value is delta, and its gradient (1 + delta) grad S.
    """
    d = delta.mean(0)
    return d + (d - d.detach()) * d.detach()


def k2(delta: Tensor) -> Tensor:
    """Half the squared log-ratio, Eq. 10 of arXiv:2512.03759: [M, ...] -> [...] nats.

    The draws are averaged before squaring, so that half the variance of their mean inflates the value; `k2_u` has
    none of it.
    """
    return 0.5 * delta.mean(0).square()


def k2_u(delta: Tensor) -> Tensor:
    """k2 without the mask noise, the mean product of two different draws: [M, ...] -> [...] nats.

    The draws must be independent. The value may be negative.

    Raises:
        ValueError: there is a single draw.
    """
    draws = len(delta)
    if draws < 2:
        raise ValueError(f"k2_u needs at least 2 independent mask draws, got {draws}: raise the likelihood's draws")
    return 0.5 * (delta.sum(0).square() - delta.square().sum(0)) / (draws * (draws - 1))


def k2_each(delta: Tensor) -> Tensor:
    """Half the mean of the squares of single draws (GDSD, arXiv:2605.29398): [M, ...] -> [...] nats.

    The whole variance of the masks inflates it.
    """
    return 0.5 * delta.square().mean(0)


def k3(delta: Tensor) -> Tensor:
    """exp(-delta) - 1 + delta, with the draws averaged into delta: [M, ...] -> [...] nats.

    On exact likelihoods its expected gradient is that of KL(reference || policy).
    """
    d = delta.mean(0)
    return torch.exp(-d) - 1 + d


def sequence_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of whole sequences, divided by the canvas L as in ESPO's code (Eq. 10 has no 1/L).

    Like every place of a penalty, it takes `Scores`, an estimator such as `k2`, and the log-probabilities [M, B, L] to
    compare with, and returns nats per sequence [B] and what they are divided by.
    """
    return kl(scores.delta(to).sum(-1)), scores.new.shape[-1]


def undivided_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of whole sequences, undivided: Eq. 10 as it is printed, and GDPO (arXiv:2510.08554).

    Arguments and results are those of `sequence_kl`.
    """
    return kl(scores.delta(to).sum(-1)), 1.0


def token_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of every scored token's mean over the draws, divided by their number (d1, arXiv:2504.12216).

    Arguments and results are those of `sequence_kl`.
    """
    scored = scores.scored.any(0)
    nats = (kl(scores.delta(to)) * scored).sum(-1)
    return nats, scored.sum(-1).clamp(min=1)


def view_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of every scored token of every draw, summed and averaged over draws (dLLM-RL, arXiv:2509.06949).

    Arguments and results are those of `sequence_kl`.
    """
    every = kl(torch.where(scores.scored, scores.new - to, 0.0).unsqueeze(0))
    return (every * scores.scored).sum(-1).mean(0), 1.0


def step_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of the sum over the tokens that a draw scores, divided by their number (EGSPO, arXiv:2603.12554).

    It is averaged over the draws. Arguments and results are those of `sequence_kl`.
    """
    scored = scores.scored
    every = kl(torch.where(scored, scores.new - to, 0.0).sum(-1).unsqueeze(0))
    return (every / scored.sum(-1).clamp(min=1)).mean(0), 1.0


def trace_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """The penalty of every scored token of every draw, times its ratio to the old policy (AGRPO, arXiv:2510.04019).

    It is multiplied by the likelihood's weight, summed, averaged over the draws, and divided by the canvas L. Arguments
    and results are those of `sequence_kl`.
    """
    every = kl(torch.where(scores.scored, scores.new - to, 0.0).unsqueeze(0))
    ratio = torch.where(scores.scored, scores.new - scores.old, 0.0).exp()
    return (scores.weight * every * ratio).sum(-1).mean(0), scores.new.shape[-1]
