"""What a task is: problems drawn from (seed, index), each with its own verifier. Standard library only."""

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

Messages = list[dict[str, str]]
Verdict = dict[str, float]  # "reward", which RL maximises, and the task's own metrics


class VerifierUnavailable(OSError):
    """This host cannot run a verifier at all. No text causes it, so it ends a run instead of costing reward."""


class Problem(NamedTuple):
    """One problem. Pickles, so that verifiers can run in other processes.

    prompt: one user turn, or a list of chat messages.
    verify: completion text -> `Verdict`. Pure, silent and total: no text makes it raise, print or hang.
    answer: a demonstration for supervised training.
    """

    prompt: str | Messages
    verify: Callable[[str], Verdict]
    answer: str


def checked(verify: Callable[[str], Verdict], text: str) -> tuple[Verdict, str]:
    """The verdict as floats plus "failed", and why it failed, "" if it did not.

    A verifier that raises, or whose verdict has no reward or a value that is no finite number, costs one completion its
    reward (``{"failed": 1, "reward": 0}``) and nothing else.

    Raises:
        VerifierUnavailable: from the verifier.
    """
    try:
        verdict = {key: float(value) for key, value in verify(text).items()}
        wrong = [f"{key} is {value}" for key, value in verdict.items() if not math.isfinite(value)]
        cause = ", ".join(wrong) if "reward" in verdict else "its verdict has no reward"
    except VerifierUnavailable:
        raise
    except (Exception, SystemExit) as error:  # functions of users are not trusted to be total
        cause = f"{type(error).__name__}: {error}"
    return ({"failed": 1.0, "reward": 0.0}, cause) if cause else ({"failed": 0.0, **verdict}, "")


class Task(ABC):
    """A stream of problems."""

    @property
    def chance(self) -> dict[str, float]:
        """What a policy that knows only the form of an answer scores, per metric; empty if that is not known."""
        return {}

    def size(self, split: str) -> int | None:
        """How many different problems a split has; None if they are drawn without end."""
        return None

    def check_host(self) -> None:  # noqa: B027, as most verifiers run everywhere
        """Raise VerifierUnavailable if this host cannot run the verifiers; asked before a run starts."""

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
