"""What a task is: problems drawn from (seed, index), each with its own verifier. Standard library only."""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

Messages = list[dict[str, str]]
Verdict = dict[str, float]  # "reward", which RL maximises, and the task's own metrics


class Problem(NamedTuple):
    """One problem. Pickles, so that verifiers can run in other processes.

    prompt: one user turn, or a list of chat messages.
    verify: completion text -> `Verdict`. Pure, silent and total: no text makes it raise, print or hang.
    answer: a demonstration for supervised training.
    """

    prompt: str | Messages
    verify: Callable[[str], Verdict]
    answer: str


class Task(ABC):
    """A stream of problems."""

    @property
    def chance(self) -> dict[str, float]:
        """What a policy that knows only the form of an answer scores, per metric; empty if that is not known."""
        return {}

    @abstractmethod
    def problem(self, split: str, seed: int, index: int) -> Problem:
        """Problem ``index`` of an endless stream; a function of its arguments only. split: "train" or "test"."""


def rng(*key: int | str) -> random.Random:
    """A local generator that depends on the key only (strings are seeded by their bytes, not by ``hash``)."""
    return random.Random("/".join(map(str, key)))


def answer_part(text: str) -> str:
    """What stands after the last ``<answer>``, up to ``</answer>`` or the end; the whole text if there is no tag."""
    starts = [match.end() for match in re.finditer("<answer>", text, re.IGNORECASE | re.ASCII)]
    if not starts:
        return text
    end = re.compile("</answer>", re.IGNORECASE | re.ASCII).search(text, starts[-1])
    return text[starts[-1] : end.start() if end else None]
