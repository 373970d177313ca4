"""Advantages: from the rewards of a group to what each of its completions deserves. [Q, G] -> [Q, G].

Whether all rewards of a group are equal is decided on the rewards, here and nowhere else: then every advantage is
exactly 0, although the mean of equal floats may differ from them in the last bit.
"""

import torch
from torch import Tensor


def equal_groups(rewards: Tensor) -> Tensor:
    """Whether all rewards of a group are the same: [Q, G] -> bool [Q]."""
    return (rewards == rewards[:, :1]).all(-1)


def mean_centred(rewards: Tensor) -> Tensor:
    """The reward minus the mean reward of the whole group: [Q, G] -> [Q, G].

    This is the text of arXiv:2512.03759, and d1's code. A group of equal rewards gets exactly 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred.masked_fill(equal_groups(rewards).unsqueeze(-1), 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """The reward minus the mean reward of the group's other completions, which is G / (G - 1) times (r - mean).

    [Q, G] -> [Q, G]. This is ESPO's code, and the default.
    """
    group = rewards.shape[-1]
    return mean_centred(rewards) * (group / (group - 1))


def standardised(rewards: Tensor) -> Tensor:
    """GRPO's advantage (arXiv:2402.03300): (r - mean) / (sample standard deviation + 1e-4), [Q, G] -> [Q, G]."""
    return mean_centred(rewards) / (rewards.std(-1, keepdim=True) + 1e-4)


def z_score(rewards: Tensor) -> Tensor:
    """dLLM-RL's advantage (arXiv:2509.06949): (r - mean) / population standard deviation, [Q, G] -> [Q, G].

    A group of equal rewards gets 0.
    """
    equal = equal_groups(rewards).unsqueeze(-1)
    return mean_centred(rewards) / rewards.std(-1, correction=0, keepdim=True).masked_fill(equal, 1.0)


def softmax_difference(rewards: Tensor) -> Tensor:
    """wd1's weights (arXiv:2507.08838): G (softmax(A) - softmax(-A)) with A = r - mean, [Q, G] -> [Q, G].

    The weights of a group sum to 0.
    """
    centred = mean_centred(rewards)
    difference = torch.softmax(centred, -1) - torch.softmax(-centred, -1)
    return rewards.shape[-1] * difference
