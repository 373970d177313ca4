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


def pairs(split: str) -> list[tuple[int, int]]:
    """The (start, target) of a split: "test" has every fourth one of each target, and "train" the others."""
    every = [(start, target) for start in range(10) for target in range(10)]
    return [(start, target) for start, target in every if ((start + 3 * target) % 4 == 0) == (split == "test")]


def verify(start: int, target: int, steps: int, every: int, reward: str, text: str) -> Verdict:
    """Score a chain such as "+8*6": so many keys, each with the digit that follows, white space between or not.

    Anything else is no chain and gets 0. step: the share of digits that are right given the one before, so that one
    slip costs one step. target: the share of the digits due to be the target that are. exact: all of both. The reward
    is "exact", or "step": the share of all these demands that are met.
    """
    chain = re.sub(r"\s", "", text)
    if not re.fullmatch(f"(?:[-+*][0-9]){{{steps}}}", chain):
        return {"reward": 0.0, "exact": 0.0, "step": 0.0, "target": 0.0}
    digits = [start, *map(int, chain[1::2])]
    right = sum(KEYS[key](before) == after for key, before, after in zip(chain[::2], digits, digits[1:]))
    due = digits[every::every]
    hit = due.count(target)
    exact = float(right == steps and hit == len(due))
    graded = exact if reward == "exact" else (right + hit) / (steps + len(due))
    return {"reward": graded, "exact": exact, "step": right / steps, "target": hit / len(due)}


def draw_chain(start: int, target: int, steps: int, every: int, draw: Random) -> str:
    """Right steps by keys at random, of the ways that lead to the target whenever it is due."""
    chain = ""
    while len(chain) < 2 * steps:
        digit, stretch = int(chain[-1]) if chain else start, ""
        for _ in range(every):
            key = draw.choice(tuple(KEYS))
            digit = KEYS[key](digit)
            stretch += f"{key}{digit}"
        chain += stretch if digit == target else ""
    return chain


def bent_chain(start: int, target: int, steps: int, every: int) -> str:
    """A bad habit: add 1, whatever the target, and write the target where it is due, whatever the sum."""
    digit, chain = start, ""
    for number in range(1, steps + 1):
        digit = target if number % every == 0 else KEYS["+"](digit)
        chain += f"+{digit}"
    return chain


@dataclass(frozen=True)
class Chain(Task):
    """From a digit to a target, and back to it again and again: + adds 1, - takes 1 away, * doubles, modulo 10.

    After every key the digit is written that it leads to, and every so many steps it must be the target. Any keys that
    do this will do. An answer has two tokens a step, so that 8, 16, 32, 64 and 128 steps are canvases of 16, 32, 64,
    128 and 256 tokens, with the same 30 facts to know, and ever more that must all be right.

    Args:
        steps: how many, a multiple of ``every``.
        every: after so many steps the digit must be the target; 4 lead from any digit to any other.
        reward: "exact" (all or nothing) or "step" (the share of right steps and of due digits that are the target).
        right: share of right demonstrations for supervised training. The others add 1 in every step, and write the
            target where it is due, right or not.

    Of the 100 pairs of digits 26 are the test split, in which each digit starts and is a target two or three times.
    """

    steps: int = 64
    every: int = 4
    reward: Literal["exact", "step"] = "exact"
    right: float = 1.0

    def __post_init__(self):
        check_counts(4, steps=self.steps, every=self.every)
        if self.steps % self.every:
            raise ValueError(f"steps must be a multiple of every ({self.every}), got {self.steps}")
        if not 0 <= self.right <= 1:
            raise ValueError(f"right is a share between 0 and 1, got {self.right}")

    def problem(self, split: str, seed: int, index: int) -> Problem:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        draw = rng("chain", split, seed, index, self.steps)
        start, target = draw.choice(pairs(split))
        asked = (start, target, self.steps, self.every)
        answer = draw_chain(*asked, draw) if draw.random() < self.right else bent_chain(*asked)
        return Problem(f"{start}>{target}", partial(verify, *asked, self.reward), answer)
