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
    """Advantage against the mean of the whole group; the text of arXiv:2512.03759, and d1's code."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred.masked_fill(equal_groups(rewards).unsqueeze(-1), 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """ESPO's code: advantage against the mean of the others, G/(G-1) (r - mean)."""
    group = rewards.shape[-1]
    return mean_centred(rewards) * (group / (group - 1))


def standardised(rewards: Tensor) -> Tensor:
    """GRPO's advantage (arXiv:2402.03300), (r - mean) / (sample standard deviation + 1e-4)."""
    return mean_centred(rewards) / (rewards.std(-1, keepdim=True) + 1e-4)


def z_score(rewards: Tensor) -> Tensor:
    """dLLM-RL's advantage (arXiv:2509.06949), (r - mean) / population standard deviation; 0 in a group of equals."""
    equal = equal_groups(rewards).unsqueeze(-1)
    return mean_centred(rewards) / rewards.std(-1, correction=0, keepdim=True).masked_fill(equal, 1.0)


def softmax_difference(rewards: Tensor) -> Tensor:
    """wd1's weights (arXiv:2507.08838), G (softmax(A) - softmax(-A)) with A = r - mean; they sum to 0."""
    centred = mean_centred(rewards)
    difference = torch.softmax(centred, -1) - torch.softmax(-centred, -1)
    return rewards.shape[-1] * difference
