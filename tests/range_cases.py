"""Ranges of numbers with the nonsense outside of them, and the numbers that a class or function takes."""

import inspect
import math
from collections.abc import Callable
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints


class Whole(NamedTuple):
    """A whole number from ``least`` up."""

    least: int
    most: int = 2**63 - 1

    @property
    def nonsense(self) -> list[float]:
        return [self.least - 1, min(-1, self.least - 1), -(2**40), self.most + 1, 2.5, math.nan, math.inf, -math.inf]


class Real(NamedTuple):
    """A number of an interval."""

    interval: str

    @property
    def nonsense(self) -> list[float]:
        low, high = map(float, self.interval[1:-1].split(","))
        edges = [x for x, bracket in ((low, self.interval[0]), (high, self.interval[-1])) if bracket in "()"]
        beyond = [math.nextafter(low, -math.inf), low - 1, math.nextafter(high, math.inf), high + 1]
        return [math.nan, *edges, *(x for x in beyond if not low <= x <= high)]


SEED, SHARE, ONE, NONE = Whole(0), Real("[0, 1]"), Whole(1), Whole(0)


def numbers_of(made: Callable) -> set[str]:
    """The parameters of a class or function that are annotated as numbers, or as containers of numbers."""
    function = made.__init__ if inspect.isclass(made) else made
    hints = get_type_hints(function)

    def holds_number(hint: Any) -> bool:
        if hint in (int, float):
            return True
        if get_origin(hint) in (Union, UnionType, tuple, list, dict):
            return any(map(holds_number, get_args(hint)))
        return False

    return {name for name in inspect.signature(function).parameters if holds_number(hints.get(name))}
