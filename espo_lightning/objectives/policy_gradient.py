"""The ESPO objective beside its equations; its ablations, GRPO, GSPO and their like are other arguments of it.

| arXiv:2512.03759                                   | here                                       |
|----------------------------------------------------|--------------------------------------------|
| rho = exp((L_theta - L_old) / L)            (Eq. 8) | `sequence_ratio`                           |
| min(rho A, clip(rho, 1-eps, 1+eps) A)       (Eq. 7) | `surrogate` in `PolicyGradient.__call__`   |
| 1/2 (L_theta - L_ref)^2                    (Eq. 10) | `k2`, `nats` in `PolicyGradient.__call__`  |
| A_i = r_i - mean of the others' rewards             | `leave_one_out`                            |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espo_lightning.objectives.kl import k2, k2_u, sequence_kl
from espo_lightning.objectives.objective import Objective, Scores, Statistics, alike
from espo_lightning.objectives.ratios import own_length_ratio, sequence_ratio, undivided_ratio


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The clipped policy gradient with a KL penalty: ESPO, Eqs. 7, 8 and 10 of arXiv:2512.03759.

    With the 1/L of the ratio and of the penalty, beta weighs a sequence-level KL in nats against rewards.

    Args:
        ratio: `sequence_ratio` (ESPO), `own_length_ratio`, `undivided_ratio`, `token_ratio`, `scored_token_ratio`,
            `view_ratio`, `trace_ratio`, `step_ratio`, `truncated_ratio`, or your own.
        clip_range: eps of Eq. 7, in the unit of the ratio; inf switches clipping off.
        clip_nats: the same in nats per sequence, L ln(1 + eps); it takes the place of ``clip_range``.
            Not with `own_length_ratio` or `undivided_ratio`, which do not divide by the canvas's L.
        clip_high: the upper eps, in the unit of the ratio, where it is another one; null = the same.
        kl: `k1`, `k1_score`, `k2`, `k2_u`, `k2_each`, `k3`, or your own estimator [M, ...] -> [...].
        kl_at: where it is applied: `sequence_kl` (ESPO), `undivided_kl`, `token_kl`, `view_kl`, `step_kl`, `trace_kl`.
        beta: coefficient of the penalty; 0 drops the reference altogether.
        to_old: penalise the distance to the policy that decoded instead of a reference.
        count: how much a completion counts: `alike` (ESPO) or `by_length`.

    Raises:
        ValueError: no clip, a clip in nats of a ratio that L does not divide, or a negative clip or beta.
    """

    ratio: Callable = sequence_ratio  # its signature unnamed, so that the command line takes callable objects too
    clip_range: float | None = 0.05
    clip_nats: float | None = None
    clip_high: float | None = None
    kl: Callable[[Tensor], Tensor] = k2
    kl_at: Callable[[Scores, Callable, Tensor], tuple[Tensor, Any]] = sequence_kl
    beta: float = 3e-3
    to_old: bool = False
    count: Callable[[Tensor], Tensor] = alike

    def __post_init__(self):
        if self.clip_range is None and self.clip_nats is None:
            raise ValueError("give clip_range or clip_nats; clip_range=inf switches clipping off")
        if self.clip_nats is not None and self.ratio in (own_length_ratio, undivided_ratio):
            raise ValueError(
                f"clip_nats is shared out over the L tokens of the canvas, by which ratio={self.ratio.__name__} does "
                "not divide: give clip_range, and clip_high, in the unit of the ratio"
            )
        for name in ("clip_range", "clip_nats", "clip_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or positive (inf: no clipping), got {value}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be 0 (no penalty) or positive, got {self.beta}")

    @property
    def reference(self) -> bool:
        return self.beta > 0 and not self.to_old

    @property
    def idle(self) -> bool:
        return self.beta == 0

    def check(self, likelihood: Any, decoding: Any) -> None:
        if self.kl is k2_u and self.beta and likelihood.independent_draws < 2:
            raise ValueError("kl=k2_u needs independent mask draws: set likelihood.draws >= 2 and stratified: false")

    def eps(self, length: int) -> float:
        """The eps of Eq. 7 for a canvas of ``length`` tokens."""
        return self.clip_range if self.clip_nats is None else clip_range_of_nats(self.clip_nats, length)

    def __call__(self, scores: Scores, advantages: Tensor, group: int) -> tuple[Tensor, Statistics]:
        eps, a = self.eps(scores.new.shape[-1]), advantages.unsqueeze(-1)
        high = eps if self.clip_high is None else self.clip_high
        log_ratio, weight = self.ratio(scores)  # [B, U]
        rho = bounded_exp(log_ratio)
        surrogate = torch.minimum(rho * a, rho.clamp(1 - eps, 1 + high) * a)
        nats, divisor = torch.zeros_like(advantages), 1.0
        if self.beta:
            nats, divisor = self.kl_at(scores, self.kl, scores.old if self.to_old else scores.ref)
        losses = self.beta * nats / divisor - (weight * surrogate).sum(-1)
        with torch.no_grad():
            statistics = {
                "log_ratio": scores.delta(scores.old).sum(-1).mean(0),  # nats per sequence, before the 1/L
                "kl": nats.detach(),  # nats per sequence, before beta and the divisor
                "clip_low": (weight * (rho < 1 - eps)).sum(-1),  # share of ratios
                "clip_high": (weight * (rho > 1 + high)).sum(-1),
            }
        return losses, statistics


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), its argument bounded so that neither it nor its gradient can be infinite: a clipped ratio has gradient 0,
    and 0 times infinity would be NaN."""
    bound = 0.9 * math.log(torch.finfo(x.dtype).max)
    return x.clamp(-bound, bound).exp()


def clip_range_of_nats(nats: float, length: int) -> float:
    """The eps of Eq. 7 that lets the ELBO rise by ``nats`` per sequence: eps = exp(nats / L) - 1."""
    return math.expm1(nats / length)


def nats_of_clip_range(clip_range: float, length: int) -> float:
    """How far the ELBO may rise before Eq. 7 clips, in nats per sequence: L ln(1 + eps)."""
    return length * math.log1p(clip_range)


class LossStatistics(NamedTuple):
    """What `espo_loss` saw, detached, per completion [B]; see `PolicyGradient.__call__`."""

    log_ratio: Tensor
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor


def espo_loss(
    terms: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    *,
    clip_range: float,
    beta: float,
    ratio: Callable[[Scores], tuple[Tensor, Tensor]] = sequence_ratio,
    kl: Callable[[Tensor], Tensor] = k2,
) -> tuple[Tensor, LossStatistics]:
    """`PolicyGradient` of one batch, on terms that carry their weights already.

    Args:
        terms, old, ref: weighted log-probabilities [M, B, L] under the policy, the rollout's policy and the reference,
            all on the same masks, as `espo_lightning.score` returns them. ``ref`` may be None if beta is 0.
        advantages: [B].
        clip_range, beta, ratio, kl: see `PolicyGradient`.

    Returns:
        The scalar loss to be minimised, and `LossStatistics`.
    """
    objective = PolicyGradient(ratio=ratio, clip_range=clip_range, kl=kl, beta=beta)
    length = torch.full_like(advantages, terms.shape[-1], dtype=torch.int64)
    losses, statistics = objective(Scores(terms, old, ref, torch.ones_like(terms), length), advantages, 1)
    return losses.mean(), LossStatistics(**statistics)
