"""What a task is: problems drawn from (seed, index), each with its own verifier. Standard library only."""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

Messages = list[dict[str, str]]
Verdict = dict[str, float]  # "reward", which RL maximises, and the task's own metrics


class VerifierUnavailable(OSError):
    """This host cannot run a verifier at all. No text causes it, so it ends a run instead of costing reward."""


class Problem(NamedTuple):
    """One problem. Pickles, so that verifiers can run in other processes.

    Attributes:
        prompt: one user turn, or a list of chat messages.
        verify: completion text -> `Verdict`. Pure, silent and total: no text makes it raise, print or hang.
        answer: a demonstration for supervised training; empty if there is none.
        cluster: problems that share it are not independent of one another, such as puzzles of one solution; intervals
            are over clusters. Empty: problems of the same prompt share one.
    """

    prompt: str | Messages
    verify: Callable[[str], Verdict]
    answer: str
    cluster: str = ""

    def to(self, device: object) -> "Problem":
        """Itself: nothing is to be moved. Lightning would rebuild all that is in it, and refuses some verifiers."""
        return self


class Task(ABC):
    """A stream of problems."""

    DEMONSTRATION = "answer"  # what a message calls the part of a problem that supervised training learns

    @property
    def chance(self) -> dict[str, float]:
        """What a policy that knows only the form of an answer scores, per metric; empty if that is not known."""
        return {}

    def size(self, split: str) -> int | None:
        """How many different problems a split has; None if they are drawn without end."""
        return None

    def check_host(self) -> None:  # noqa: B027, as most verifiers run everywhere
        """Raise VerifierUnavailable if this host cannot run the verifiers; asked before a run starts."""

    def inspect(self, split: str) -> Iterator[tuple[str, Problem | Exception]]:
        """Every problem of a finite split with the place where it stands, or in its place why there is none.

        Nothing for a split that is drawn without end. Asked before a run starts, so that no row ends it in the middle.
        """
        for index in range(self.size(split) or 0):
            try:
                yield f"{split} problem {index}", self.problem(split, 0, index)
            except Exception as error:
                yield f"{split} problem {index}", error

    @abstractmethod
    def problem(self, split: str, seed: int, index: int) -> Problem:
        """Problem ``index`` of an endless stream; a function of its arguments only. split: "train" or "test"."""


def rng(*key: int | str) -> random.Random:
    """A local generator that depends on the key only (strings are seeded by their bytes, not by ``hash``)."""
    return random.Random("/".join(map(str, key)))


T = TypeVar("T")


class Distinct(Generic[T]):
    """The different values among draw(0), draw(1), ..., in that order, drawn when first needed.

    After ``patience`` draws in a row without anything new there are no more, and they come round again.

    Args:
        key: values of one key are the same.
    """

    def __init__(self, draw: Callable[[int], T], key: Callable[[T], Hashable] = lambda value: value, patience=1000):
        self.draw, self.key, self.patience = draw, key, patience
        self.values: list[T] = []
        self.seen: set[Hashable] = set()
        self.drawn = self.last_new = 0

    def __getitem__(self, index: int) -> T:
        while len(self.values) <= index and self.drawn - self.last_new <= self.patience:
            value = self.draw(self.drawn)
            self.drawn += 1
            if self.key(value) not in self.seen:
                self.seen.add(self.key(value))
                self.values.append(value)
                self.last_new = self.drawn
        return self.values[index % len(self.values)]


def answer_part(text: str) -> str:
    """What stands after the last ``<answer>``, up to ``</answer>`` or the end; the whole text if there is no tag."""
    starts = [match.end() for match in re.finditer("<answer>", text, re.IGNORECASE | re.ASCII)]
    if not starts:
        return text
    end = re.compile("</answer>", re.IGNORECASE | re.ASCII).search(text, starts[-1])
    return text[starts[-1] : end.start() if end else None]
