"""Schedules: how many proposals each denoising step of a block commits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from espo_lightning.ranges import check_counts


class Step(NamedTuple):
    """What a step commits: the ``count`` proposals with the highest priority, and every one that reaches ``bar``."""

    count: int
    bar: float = math.inf


def even_schedule(tokens: int, steps: int) -> list[Step]:
    """LLaDA's schedule: the steps of a block commit equally many tokens, and the first ones the remainder.

    Args:
        tokens: of the block.
        steps: of the block.

    Raises:
        ValueError: one of them is below 1.
    """
    check_counts(1, tokens=tokens, steps=steps)
    base, extra = divmod(tokens, steps)
    return [Step(base + (step < extra)) for step in range(steps)]


def _dream_ratios(steps: int) -> Tensor:
    """s/t of Dream's times t_0 = 1 > t_1 > .. > t_T = 0.001, for all steps but the last: [T - 1]."""
    times = torch.linspace(1, 1e-3, steps + 1)
    return times[1:-1] / times[:-2]


def dream_schedule(tokens: int, steps: int) -> list[Step]:
    """Dream's schedule: of m hidden positions, floor(m (1 - s/t)) between the times t and s, in the last step the rest.

    Early steps may commit nothing; they cost no forward pass here.

    Args:
        tokens: of the block.
        steps: of the block.

    Raises:
        ValueError: one of them is below 1.
    """
    check_counts(1, tokens=tokens, steps=steps)
    plan, hidden = [], tokens
    for ratio in _dream_ratios(steps):
        plan.append(Step(int(hidden * (1 - ratio))))
        hidden -= plan[-1].count
    return [*plan, Step(hidden)]


def origin_schedule(tokens: int, steps: int) -> list[Step]:
    """Dream's ``origin``, with `random_order`: each hidden position with chance 1 - s/t, in the last step the rest.

    Args:
        tokens: of the block.
        steps: of the block.

    Raises:
        ValueError: one of them is below 1.
    """
    check_counts(1, tokens=tokens, steps=steps)
    return [*(Step(0, bar) for bar in _dream_ratios(steps).tolist()), Step(tokens)]


def commit(hidden: Tensor, priority: Tensor, step: Step) -> Tensor:
    """Which hidden positions a step commits: bool [n, l], priorities [h] of the h True ones -> bool [n, l].

    Among equal priorities the left one comes first.
    """
    finite = torch.finfo(priority.dtype)
    scores = priority.new_full(hidden.shape, float("-inf"))
    scores.masked_scatter_(hidden, priority.clamp(finite.min, finite.max))  # above what is not hidden, below no bar
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return hidden & ((rank < step.count) | (scores >= step.bar))
