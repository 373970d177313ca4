"""Orders: which proposals a denoising step commits first.

An order maps (logits [n, V], warped logits [n, V], proposed tokens [n], uniforms [n]) to priorities [n].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from espo_lightning.decoding.proposals import entropy
from espo_lightning.keys import real


def low_confidence(logits: Tensor, warped: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """LLaDA's order: the proposals with the highest log-probability at temperature 1 come first.

    Like every order, it maps logits [n, V] of n hidden positions, the same after temperature and top-p, the proposed
    tokens [n] and uniform random numbers [n] to priorities [n].
    """
    return -F.cross_entropy(logits, tokens, reduction="none")


def random_order(logits: Tensor, warped: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Uniformly random positions: with one token a step, the decoder that the ELBO is a bound for.

    Arguments and result are those of `low_confidence`.
    """
    return u.float()


def left_to_right(logits: Tensor, warped: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """The leftmost positions first: with one token a step, the autoregressive order on a canvas of masks (JustGRPO).

    All priorities are equal, and `commit` then takes the left one. Arguments and result are those of `low_confidence`.
    """
    return torch.zeros_like(u, dtype=torch.float32)


def entropy_order(logits: Tensor, warped: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Dream's ``entropy``: the positions of lowest entropy come first, after temperature and top-p.

    The priority is minus the entropy in nats. Arguments and result are those of `low_confidence`.
    """
    return -entropy(warped)


def margin_order(logits: Tensor, warped: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Dream's ``topk_margin``: the largest lead of the best token over the next comes first.

    It is measured in probabilities after temperature and top-p. Arguments and result are those of `low_confidence`.
    """
    first, second = warped.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def perturb(priority: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Dream's ``alg_temp``: the k first of what comes out are k draws without replacement with probabilities
    softmax(priority / temperature) (Gumbel top-k). [n], uniforms [n] -> [n]."""
    gumbel = -torch.log(-torch.log(u.to(real(u.device)).clamp(min=2.0**-54)))
    return priority / temperature + gumbel.to(priority.dtype)


POLICY_FREE = (random_order, left_to_right)  # orders that do not look at the policy
