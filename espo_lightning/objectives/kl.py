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
    """The log-ratio itself. Its expected gradient is 0 for exact likelihoods."""
    return delta.mean(0)


def k1_score(delta: Tensor) -> Tensor:
    """The authors' "k1": value delta, gradient (1 + delta) grad S, as they add a score-function term."""
    d = delta.mean(0)
    return d + (d - d.detach()) * d.detach()


def k2(delta: Tensor) -> Tensor:
    """Half the squared log-ratio, Eq. 10 of arXiv:2512.03759. Inflated by half the mask variance, see `k2_u`."""
    return 0.5 * delta.mean(0).square()


def k2_u(delta: Tensor) -> Tensor:
    """k2 without the mask noise: mean product of two different, independent draws; may be negative.

    Raises:
        ValueError: a single draw.
    """
    draws = len(delta)
    if draws < 2:
        raise ValueError(f"k2_u needs at least 2 independent mask draws, got {draws}: raise the likelihood's draws")
    return 0.5 * (delta.sum(0).square() - delta.square().sum(0)) / (draws * (draws - 1))


def k2_each(delta: Tensor) -> Tensor:
    """Half the mean of the squares of single draws: k2 inflated by the whole mask variance (GDSD, arXiv:2605.29398)."""
    return 0.5 * delta.square().mean(0)


def k3(delta: Tensor) -> Tensor:
    """exp(-delta) - 1 + delta; on exact likelihoods the gradient is that of KL(reference || policy)."""
    d = delta.mean(0)
    return torch.exp(-d) - 1 + d


def sequence_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of whole sequences, divided by the canvas L: ESPO's code (Eq. 10 has no 1/L)."""
    return kl(scores.delta(to).sum(-1)), scores.new.shape[-1]


def undivided_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of whole sequences, undivided: Eq. 10 as it is printed, and GDPO (arXiv:2510.08554)."""
    return kl(scores.delta(to).sum(-1)), 1.0


def token_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of every scored token's mean over the draws, divided by their number (d1, arXiv:2504.12216)."""
    scored = scores.scored.any(0)
    nats = (kl(scores.delta(to)) * scored).sum(-1)
    return nats, scored.sum(-1).clamp(min=1)


def view_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of every scored token of every draw: their sum, averaged over the draws (dLLM-RL, arXiv:2509.06949)."""
    every = kl(torch.where(scores.scored, scores.new - to, 0.0).unsqueeze(0))
    return (every * scores.scored).sum(-1).mean(0), 1.0


def step_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of the sum over the tokens that a draw scores, divided by their number, averaged over the draws (EGSPO,
    arXiv:2603.12554)."""
    scored = scores.scored
    every = kl(torch.where(scored, scores.new - to, 0.0).sum(-1).unsqueeze(0))
    return (every / scored.sum(-1).clamp(min=1)).mean(0), 1.0


def trace_kl(scores: Scores, kl: Estimator, to: Tensor) -> Penalty:
    """Of every scored token of every draw, times its ratio to the old policy and the likelihood's weight; summed,
    averaged over the draws, and divided by the canvas L (AGRPO, arXiv:2510.04019)."""
    every = kl(torch.where(scores.scored, scores.new - to, 0.0).unsqueeze(0))
    ratio = torch.where(scores.scored, scores.new - scores.old, 0.0).exp()
    return (scores.weight * every * ratio).sum(-1).mean(0), scores.new.shape[-1]
