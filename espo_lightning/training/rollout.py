"""A rollout: what one training step decodes, and all that its updates need."""

from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.policies.policy import Prompts
from espo_lightning.scoring.masks import Masks
from espo_lightning.tasks.base import Verdict


class Rollout(NamedTuple):
    """B = Q prompts x G completions of L tokens, of which N <= B are trained on, with U sets of masks.

    Of these N, whole groups: prompts: `Prompts` [N, P]. completion: int64 [N, L]. length: int64 [N], tokens up to and
    including the first end-of-text token. masks: U `Masks` [M, N, L], or one if they are reused. old, ref: as many
    log-probabilities [M, N, L] float32; old[0] is None until the first update, whose own they equal; all are None if
    the objective does not ask for them. advantages, count: [N]. counted: the first so many have a gradient; the others
    only keep this process in step with one that has more.

    Of all: rewards: [Q, G]. decoded: int64 [B, L]. texts, verdicts: B each. idle: no completion of any process has a
    gradient.
    """

    prompts: Prompts
    completion: Tensor
    length: Tensor
    masks: list[Masks]
    old: list[Tensor | None]
    ref: list[Tensor | None]
    advantages: Tensor
    count: Tensor
    counted: int
    rewards: Tensor
    decoded: Tensor
    texts: list[str]
    verdicts: list[Verdict]
    idle: bool


def trained_rows(needed: Tensor, most: int, size: int) -> tuple[Tensor, int]:
    """Indices of the completions to train on, whole groups of ``size``, and how many of them have a gradient.

    Those that have come first. There are as many as on the process that needs most, so that collectives match, and at
    least one group, so that the optimizer always takes its step. The surplus has advantage 0.

    Args:
        needed: bool [Q], groups with a gradient.
        most: the largest number of them on any process.
    """
    groups = needed.int().argsort(descending=True, stable=True)[: max(most, 1)]
    rows = (groups.unsqueeze(-1) * size + torch.arange(size, device=groups.device)).flatten()
    return rows, int(needed.sum()) * size


def chunks(n: int, size: int | None) -> list[slice]:
    """The micro-batches of ``n`` completions, ``size`` at a time; None = all at once."""
    step = size or max(n, 1)
    return [slice(start, start + step) for start in range(0, n, step)]
