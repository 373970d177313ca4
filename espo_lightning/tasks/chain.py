"""Chains of small sums that must all be right, each of them easy given the one before.

A step takes two tokens of the tiny policies, so that the canvas is as long as one likes, and a step no harder.
"""

import re
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Problem, Task, Verdict, rng

KEYS = {"+": lambda x: (x + 1) % 10, "-": lambda x: (x - 1) % 10, "*": lambda x: 2 * x % 10}


def verify(start: int, target: int, steps: int, reward: str, text: str) -> Verdict:
    """Score a chain such as "+8*6": so many keys, each with the digit that follows, white space between or not.

    Anything else is no chain and gets 0. step: the share of digits that are right given the one before, so that one
    slip costs one step. end: whether the last digit is the target. exact: all steps, and the end. The reward is
    "exact", or "step": the share of right steps, the end being one more.
    """
    chain = re.sub(r"\s", "", text)
    if not re.fullmatch(f"(?:[-+*][0-9]){{{steps}}}", chain):
        return {"reward": 0.0, "exact": 0.0, "step": 0.0, "end": 0.0}
    digits = [start, *map(int, chain[1::2])]
    right = sum(KEYS[key](before) == after for key, before, after in zip(chain[::2], digits, digits[1:]))
    end = digits[-1] == target
    exact = float(right == steps and end)
    graded = exact if reward == "exact" else (right + end) / (steps + 1)
    return {"reward": graded, "exact": exact, "step": right / steps, "end": float(end)}


def draw_chain(start: int, target: int, steps: int, slip: int | None, draw: Random) -> str:
    """Keys at random that lead to the target. slip: the step that counts one too many, None = none."""
    while True:
        digit, chain = start, ""
        for number in range(steps):
            key = draw.choice(tuple(KEYS))
            digit = (KEYS[key](digit) + (number == slip)) % 10
            chain += f"{key}{digit}"
        if digit == target:
            return chain


@dataclass(frozen=True)
class Chain(Task):
    """From one digit to another by so many keys: + adds 1, - takes 1 away, * doubles, and only the last digit stays.

    After every key the digit is written that it leads to. Any chain of right steps that ends at the target will do:
    about 3^steps / 10 of them. An answer has two tokens a step, so that 8, 16, 32, 64 and 128 steps are canvases of 16,
    32, 64, 128 and 256 tokens, with the same 30 facts to know, and in the demonstrations the same share of right
    chains.

    Args:
        steps: how many.
        reward: "exact" (all or nothing) or "step" (the share of right steps, the end being one more).
        right: share of right demonstrations for supervised training. In the others one step, any, counts one too many,
            and the rest follows from it.

    There are 100 pairs of digits; both splits have all of them.
    """

    steps: int = 64
    reward: Literal["exact", "step"] = "exact"
    right: float = 1.0

    def __post_init__(self):
        check_counts(8, steps=self.steps)  # from any digit to any other
        if not 0 <= self.right <= 1:
            raise ValueError(f"right is a share between 0 and 1, got {self.right}")

    def problem(self, split: str, seed: int, index: int) -> Problem:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        draw = rng("chain", split, seed, index, self.steps)
        start, target = draw.randrange(10), draw.randrange(10)
        slip = None if draw.random() < self.right else draw.randrange(self.steps)
        answer = draw_chain(start, target, self.steps, slip, draw)
        return Problem(f"{start}>{target}", partial(verify, start, target, self.steps, self.reward), answer)
