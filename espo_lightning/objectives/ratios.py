"""Ratios: where a policy is compared with the one that decoded. Scores -> (log-ratios [B, U], weights [B, U]).

A completion has U ratios, one for each unit that is an action of its own: the whole sequence, its tokens, or the tokens
of each view. Weights sum to 1 over the units, unless it says otherwise.
"""

import torch
from torch import Tensor

from espo_lightning.objectives.objective import Scores


def sequence_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio per completion (ESPO, Eq. 8 of arXiv:2512.03759): the difference of two ELBOs, divided by L.

    Like every ratio, it takes `Scores` and returns log-ratios [B, U] and their weights [B, U] for the U actions of a
    completion; here U = 1.
    """
    log_ratio = scores.delta(scores.old).mean((0, 2)).unsqueeze(-1)
    return log_ratio, torch.ones_like(log_ratio)


def own_length_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio per completion, divided by its own tokens |y| instead of the canvas L (GSPO, arXiv:2507.18071).

    Scores -> (log-ratios [B, 1], weights [B, 1]). |y| counts the tokens up to and including the end of text, and the
    ELBO is that of the whole canvas. A token of a short completion counts more than one of a long completion.
    """
    log_ratio = (scores.delta(scores.old).sum(-1).mean(0) / scores.length).unsqueeze(-1)
    return log_ratio, torch.ones_like(log_ratio)


def undivided_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio per completion, not divided at all: how much more probable the whole of it is, by its ELBO.

    Scores -> (log-ratios [B, 1], weights [B, 1]), L times those of `sequence_ratio`. A clip is then in the unit of
    whole completions.
    """
    log_ratio = scores.delta(scores.old).sum(-1).mean(0).unsqueeze(-1)
    return log_ratio, torch.ones_like(log_ratio)


def token_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio for every position of the canvas, the GRPO-style ablation of arXiv:2512.03759.

    Scores -> (log-ratios [B, L], weights [B, L]), and every weight is 1/L. A position that is not scored has ratio
    1, and counts.
    """
    log_ratio = scores.delta(scores.old).mean(0)
    return log_ratio, torch.full_like(log_ratio, 1 / log_ratio.shape[-1])


def scored_token_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio for every scored token, with the draws averaged (d1, arXiv:2504.12216; DiffuCoder, 2506.20639).

    Scores -> (log-ratios [B, L], weights [B, L]), and the scored tokens of a completion count alike.
    """
    log_ratio, scored = scores.delta(scores.old).mean(0), scores.scored.any(0).to(scores.new.dtype)
    return log_ratio, scored / scored.sum(-1, keepdim=True).clamp(min=1)


def view_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio for every scored token of every draw, unweighted (UniGRPO in dLLM-RL, arXiv:2509.06949).

    Scores -> (log-ratios [B, M L], weights [B, M L]). Each draw counts 1/M, and each of its scored tokens alike.
    """
    log_ratio = torch.where(scores.scored, scores.new - scores.old, 0.0)
    scored = scores.scored.to(log_ratio.dtype)
    weight = scored / scored.sum(-1, keepdim=True).clamp(min=1) / len(scored)
    return log_ratio.movedim(0, 1).flatten(1), weight.movedim(0, 1).flatten(1)


def trace_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio for every scored token of every draw, with the likelihood's weight / (M L).

    Scores -> (log-ratios [B, M L], weights [B, M L]). On `Trajectory`, this is the sum over all tokens of a path, or
    the unbiased estimate of it from sampled steps, divided by the canvas L (AGRPO, arXiv:2510.04019, with the number of
    steps in the place of L). The weights sum to 1 in the mean.
    """
    log_ratio = torch.where(scores.scored, scores.new - scores.old, 0.0)
    weight = scores.weight / (len(log_ratio) * log_ratio.shape[-1])
    return log_ratio.movedim(0, 1).flatten(1), weight.movedim(0, 1).flatten(1)


def step_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """One ratio for all tokens together that a draw scores, divided by their number (EGSPO, arXiv:2603.12554).

    Scores -> (log-ratios [B, M], weights [B, M]), and a weight is 1 / (M times the number of tokens).
    """
    scored = scores.scored
    log_ratio = torch.where(scored, scores.new - scores.old, 0.0).sum(-1)
    tokens = scored.sum(-1)
    weight = (tokens > 0) / tokens.clamp(min=1) / len(log_ratio)
    return log_ratio.T, weight.T.to(log_ratio.dtype)
