"""Balance: a policy's log-ratio to a reference is to equal its reward in nats, up to a constant of the prompt.

The policy that maximises E[r] - kappa KL(policy || reference) is pi* = reference exp(r / kappa) / Z, so that

    residual = log(policy / reference) - A / kappa  [nats per sequence]        loss = kappa / (2 L) residual^2

is 0 for it with A = r - kappa log Z. With the mean over a prompt's group in the place of log Z (the VarGrad estimator,
Richter et al. 2020, arXiv:2010.10436) nothing has to be learnt for a prompt. On-policy, its expected gradient is that
of 1/L (kappa KL - E[r]); with kappa / (2 L) learning rates compare with those of `PolicyGradient` with beta = kappa.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from espo_lightning.objectives.kl import k2, k2_each, k2_u
from espo_lightning.objectives.objective import Objective, Scores, Statistics, alike


@dataclass(frozen=True)
class Balance(Objective):
    """Relative trajectory balance on an exact path likelihood; TraFL, RSPO and GDSD on ELBOs.

    Args:
        temperature: kappa, reward per nat: the target is proportional to reference exp(r / kappa).
        to_old: balance against the policy that decoded (GDSD) instead of a reference.
        centre: subtract the group's mean of the residual, scaled by sqrt(G / (G - 1)), so that its square estimates a
            variance without bias; false = advantages as they are.
        clip_range: the log-ratio is clamped to ln(1 -+ eps) nats per sequence, beyond which it has no gradient (GDSD).
        square: how half the square is taken of M draws: `k2`, of their mean; `k2_u`, the product of different
            independent draws, without the mask noise; `k2_each`, of each (GDSD).
        kl: estimator of an additional penalty against the reference, and of what is logged as its KL.
        beta: coefficient of that penalty, divided by L; 0 = none.
        count: how much a completion counts.

    Raises:
        ValueError: a temperature that is not positive, a negative clip_range or beta.
    """

    temperature: float = 1.0
    to_old: bool = False
    centre: bool = True
    clip_range: float = math.inf
    square: Callable[[Tensor], Tensor] = k2
    kl: Callable[[Tensor], Tensor] = k2
    beta: float = 0.0
    count: Callable[[Tensor], Tensor] = alike
    idle = False  # equal rewards still have a residual

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Balance.temperature must be positive, reward per nat; got {self.temperature}")
        if not self.clip_range >= 0:
            raise ValueError(f"clip_range must be 0 or positive (inf: no clipping), got {self.clip_range}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be 0 (no penalty) or positive, got {self.beta}")

    @property
    def old(self) -> bool:
        return self.to_old

    @property
    def reference(self) -> bool:
        return self.beta > 0 or not self.to_old

    @property
    def groups(self) -> bool:
        return self.centre

    def check(self, likelihood: Any, decoding: Any) -> None:
        noisy = [name for name, on in (("square", True), ("kl", self.beta > 0)) if on and getattr(self, name) is k2_u]
        if noisy and likelihood.independent_draws < 2:
            raise ValueError(f"{noisy[0]}=k2_u needs independent mask draws: set likelihood.draws >= 2")
        if not likelihood.traced:
            return
        if not likelihood.exact or self.square is k2_each:
            raise ValueError(
                "Balance squares the log-ratio of a whole trajectory: sampled or merged steps, or the square of each, "
                "would put their noise or their bias into the square; set likelihood=Trajectory with draws: null and "
                "merge: 1, and square=k2"
            )
        if not decoding.order_free:
            raise ValueError(
                "Balance compares whole trajectories, but the order of this decoding depends on the policy, and so "
                "does its share of the log-ratio, which may be infinite: set decoding.order to random_order or "
                "left_to_right"
            )

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        length = scores.new.shape[-1]
        ratio = scores.delta(scores.old if self.to_old else scores.ref).sum(-1)  # [M, B] nats per sequence
        low = math.log1p(-self.clip_range) if self.clip_range < 1 else -math.inf
        high = math.log1p(self.clip_range)
        residual = ratio.clamp(low, high) - advantages / self.temperature
        if self.centre:
            residual = centred(residual, group)
        half = self.square(residual)
        losses = self.temperature / length * half
        statistics = {"residual": 2 * half.detach()}  # nats^2
        if self.to_old:
            statistics["log_ratio"] = ratio.detach().mean(0)
            statistics |= {"clip_low": (ratio < low).float().mean(0), "clip_high": (ratio > high).float().mean(0)}
        if self.reference:
            nats = self.kl(scores.delta(scores.ref).sum(-1))
            statistics["kl"] = nats.detach()
            if self.beta:
                losses = losses + self.beta / length * nats
        return losses, statistics


def centred(residual: Tensor, group: int) -> Tensor:
    """[M, B] less its mean over every group, times sqrt(G / (G - 1)): the square is then the unbiased variance."""
    grouped = residual.unflatten(-1, (-1, group))
    return (grouped - grouped.mean(-1, keepdim=True)).flatten(-2) * math.sqrt(group / (group - 1))
