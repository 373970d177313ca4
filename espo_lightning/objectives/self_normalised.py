"""Self-normalised importance sampling within a group: StableDRL (arXiv:2603.06743)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espo_lightning.objectives.objective import Objective, Scores, Statistics, alike
from espo_lightning.objectives.sandwich import lower_bound, sandwich


@dataclass(frozen=True)
class SelfNormalised(Objective):
    """losses = -w A S, with w = G softmax over the group of min(bound_new - bound_old, ln cap), detached.

    Args:
        score: S, (scores, log-probabilities [M, B, L], advantages [B]) -> [B]: `sandwich`, or a `Sandwich`.
        cap: the largest importance weight before normalisation.
        count: how much a completion counts.

    Raises:
        ValueError: a cap that is not positive.
    """

    score: Callable = sandwich  # its signature unnamed, so that the command line takes callable objects too
    cap: float = 5.0
    count: Callable[[Tensor], Tensor] = alike
    groups = True

    def __post_init__(self):
        if not self.cap > 0:
            raise ValueError(f"cap must be positive (inf: no cap), got {self.cap}")

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        log_weight = (lower_bound(scores, scores.new) - lower_bound(scores, scores.old)).detach()  # nats per token
        capped = log_weight.clamp(max=math.log(self.cap))
        weight = group * torch.softmax(capped.view(-1, group), -1).flatten()
        value = self.score(scores, scores.new, advantages)
        losses = -weight * advantages * value
        statistics = {
            "log_ratio": log_weight * scores.length,  # nats per sequence
            "clip_high": (log_weight > capped).to(value.dtype),
            "weighted_score": value.detach(),
        }
        return losses, statistics
