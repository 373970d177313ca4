"""Weighted likelihoods: the score of a completion times its advantage, with no ratio, clip or penalty."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from espo_lightning.objectives.objective import Objective, Scores, Statistics, alike


def total(scores: Scores, log_probs: Tensor, advantages: Tensor) -> Tensor:
    """The likelihood's own score of log-probabilities [M, B, L], in nats per sequence [B].

    The advantages are not looked at; other scores, such as `Sandwich`, do.
    """
    return (scores.weight * log_probs).sum(-1).mean(0)


@dataclass(frozen=True)
class Weighted(Objective):
    """losses = -A S: wd1 (arXiv:2507.08838), with `softmax_difference`; SPG (arXiv:2510.09541), with `Sandwich`.

    Args:
        score: S, (scores, log-probabilities [M, B, L], advantages [B]) -> [B]: `total`, or a `Sandwich`.
        count: how much a completion counts: `alike` (wd1) or `by_length` (SPG).
    """

    score: Callable = total  # its signature unnamed, so that the command line takes callable objects too
    count: Callable[[Tensor], Tensor] = alike
    old = False

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        value = self.score(scores, scores.new, advantages)
        return -advantages * value, {"weighted_score": value.detach()}
