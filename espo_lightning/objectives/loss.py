"""The ESPO objective beside its equations. Pure functions of tensors.

| arXiv:2512.03759                                   | here                            |
|----------------------------------------------------|---------------------------------|
| rho = exp((L_theta - L_old) / L)            (Eq. 8) | `sequence_ratio`                |
| min(rho A, clip(rho, 1-eps, 1+eps) A)       (Eq. 7) | `surrogate` in `espo_loss`      |
| 1/2 (L_theta - L_ref)^2                    (Eq. 10) | `k2`, `penalty` in `espo_loss`  |
| A_i = r_i - mean of the others' rewards             | `leave_one_out`                 |

Terms [M, B, L] are weighted log-probabilities: a completion's score, its ELBO in nats per sequence, is
their mean over the M mask draws of the sum over the L positions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def leave_one_out(rewards: Tensor) -> Tensor:
    """The authors' code: advantage against the others' mean, G/(G-1) (r - mean). [Q, G] -> [Q, G]."""
    group = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (group / (group - 1))


def mean_centred(rewards: Tensor) -> Tensor:
    """Advantage against the mean of the whole group: [Q, G] -> [Q, G]; the paper's text."""
    return rewards - rewards.mean(-1, keepdim=True)


def standardised(rewards: Tensor) -> Tensor:
    """GRPO's advantage, (r - mean) / (sample standard deviation + 1e-4): [Q, G] -> [Q, G]."""
    return mean_centred(rewards) / (rewards.std(-1, keepdim=True) + 1e-4)


def sequence_ratio(terms: Tensor, old: Tensor) -> Tensor:
    """ESPO's ratio, Eq. 8: exp of the ELBO difference per canvas position. [M, B, L] -> [B, 1]."""
    return (terms - old).mean((0, 2)).exp().unsqueeze(-1)


def token_ratio(terms: Tensor, old: Tensor) -> Tensor:
    """The GRPO-style ablation: a ratio for every position's own term. [M, B, L] -> [B, L]."""
    return (terms - old).mean(0).exp()


def k1(delta: Tensor) -> Tensor:
    """KL estimator: the log-ratio itself. Its expected gradient is 0 for exact likelihoods. [M, B] -> [B]."""
    return delta.mean(0)


def k1_score(delta: Tensor) -> Tensor:
    """The authors' "k1": value delta, gradient (1 + delta) grad S, as they add a score-function term. [M, B] -> [B]."""
    d = delta.mean(0)
    return d + (d - d.detach()) * d.detach()


def k2(delta: Tensor) -> Tensor:
    """Eq. 10, half the squared log-ratio. Inflated by half the mask variance, see `k2_u`. [M, B] -> [B]."""
    return 0.5 * delta.mean(0).square()


def k2_u(delta: Tensor) -> Tensor:
    """k2 without the mask noise: mean product of two different, independent draws; may be negative. [M, B] -> [B]."""
    draws = len(delta)
    if draws < 2:
        raise ValueError(f"k2_u needs at least 2 independent mask draws, got {draws}: raise the likelihood's draws")
    return 0.5 * (delta.sum(0).square() - delta.square().sum(0)) / (draws * (draws - 1))


def k3(delta: Tensor) -> Tensor:
    """exp(-delta) - 1 + delta; on exact likelihoods the gradient is that of KL(reference || policy). [M, B] -> [B]."""
    d = delta.mean(0)
    return torch.exp(-d) - 1 + d


class LossStatistics(NamedTuple):
    """What the loss saw, detached: per completion [B], except the clip fractions, which are per ratio."""

    log_ratio: Tensor  # [B] ELBO difference to old, nats per sequence, before the 1/L
    kl: Tensor  # [B] the chosen estimator, nats per sequence, before beta and 1/L
    clip_low: Tensor  # [B] share of ratios below 1 - eps
    clip_high: Tensor  # [B] share of ratios above 1 + eps


def espo_loss(
    terms: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    *,
    clip_range: float,
    beta: float,
    ratio: Callable[[Tensor, Tensor], Tensor] = sequence_ratio,
    kl: Callable[[Tensor], Tensor] = k2,
) -> tuple[Tensor, LossStatistics]:
    """ESPO, Eqs. 7, 8 and 10 of arXiv:2512.03759, to be minimised.

    The 1/L of the penalty is in the authors' code and not in Eq. 10; with it, and the 1/L inside the
    ratio, beta weighs a sequence-level KL in nats against rewards.

    Args:
        terms, old, ref: weighted log-probability terms [M, B, L] under the policy, the rollout's policy and
            the reference, all three on the same masks. ``ref`` may be None if beta is 0.
        advantages: [B].
        clip_range: eps of Eq. 7, or ``clip_range_of_nats``; inf switches clipping off.
        beta: coefficient of the KL penalty.
        ratio: `sequence_ratio`, `token_ratio`, or your own [M, B, L] -> [B, units].
        kl: `k1`, `k1_score`, `k2`, `k2_u`, `k3`, or your own [M, B] -> [B].

    Returns:
        The scalar loss, and `LossStatistics`.
    """
    r, a = ratio(terms, old), advantages.unsqueeze(-1)
    surrogate = torch.minimum(r * a, r.clamp(1 - clip_range, 1 + clip_range) * a).mean(-1)
    penalty = kl((terms - ref).sum(-1)) if beta else torch.zeros_like(advantages)
    loss = (beta * penalty / terms.shape[-1] - surrogate).mean()
    with torch.no_grad():
        statistics = LossStatistics(
            log_ratio=(terms - old).sum(-1).mean(0),
            kl=penalty.detach(),
            clip_low=(r < 1 - clip_range).float().mean(-1),
            clip_high=(r > 1 + clip_range).float().mean(-1),
        )
    return loss, statistics


def clip_range_of_nats(nats: float, length: int) -> float:
    """The eps of Eq. 7 that lets the ELBO rise by ``nats`` per sequence: eps = exp(nats / L) - 1."""
    return math.expm1(nats / length)


def nats_of_clip_range(clip_range: float, length: int) -> float:
    """How far the ELBO may rise before Eq. 7 clips, in nats per sequence: L ln(1 + eps)."""
    return length * math.log1p(clip_range)
