"""Choosing settings by pilots: a walk over a grid until the best is surrounded, and a choice that refuses an edge.

A *setting* is a tuple of values, such as a learning rate and a clip width; None is no limit at all (no clip), the
natural end of its values, beyond which there is nothing. Pure.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

Setting = tuple[float | None, ...]


class EdgeChoice(ValueError):
    """The best setting is the smallest or largest that was tried: a better one may lie beyond, so it is no choice."""


def best(scores: Mapping[Setting, float]) -> Setting:
    """The setting with the highest score, of equal ones the first in the mapping."""
    return max(scores, key=scores.__getitem__)


def open_sides(scores: Mapping[Setting, float]) -> list[tuple[int, int]]:
    """On which sides of the best setting nothing was tried: the index of the value, and -1 (smaller) or 1 (larger).

    A neighbour differs in that value only. Above None there is nothing to try.
    """
    top = best(scores)
    others = [s for s in scores if s != top]
    return [
        (axis, side)
        for axis, value in enumerate(top)
        for side in (-1, 1)
        if not (side == 1 and value is None)
        and not any(
            _height(s[axis]) * side > _height(value) * side
            for s in others
            if s[:axis] + s[axis + 1 :] == top[:axis] + top[axis + 1 :]
        )
    ]


def choose(scores: Mapping[Setting, float], names: Sequence[str]) -> Setting:
    """The best setting, if settings on every side of it were tried and are no better.

    Args:
        scores: of every setting that was tried.
        names: of the values of a setting, for the message.

    Raises:
        EdgeChoice: naming the value and what to try.
    """
    top = best(scores)
    for axis, side in open_sides(scores):
        tried, other = ("largest", "larger") if side == 1 else ("smallest", "smaller")
        raise EdgeChoice(
            f"{names[axis]} {top[axis]!r} is the {tried} that was tried with what else is best: a better one may lie "
            f"beyond, so try a {other} one"
        )
    return top


def beside(scores: Mapping[Setting, float], ladders: Sequence[Sequence[float | None]]) -> list[Setting]:
    """The settings to try next: one rung further on every open side of the best setting, where a ladder has one."""
    top = best(scores)
    rungs = [(axis, ladders[axis].index(top[axis]) + side) for axis, side in open_sides(scores)]
    return [
        (*top[:axis], ladders[axis][rung], *top[axis + 1 :]) for axis, rung in rungs if 0 <= rung < len(ladders[axis])
    ]


def walk(
    arms: Iterable[Hashable],
    ladders: Sequence[Sequence[float | None]],
    measure: Callable[[list[tuple]], Mapping[tuple, float]],
    start: Mapping[Hashable, Setting] | None = None,
) -> dict[Hashable, dict[Setting, float]]:
    """Scores of the settings that every arm was tried with, by one rule for all.

    It starts in the middle of every ladder, or where it is told to, tries the neighbours of the best setting on all
    sides, and goes on from the best of all, until none that was not tried is beside it.

    Args:
        arms: names.
        ladders: for every value of a setting what may be tried, ascending, None last.
        measure: the scores of some (arm, setting).
        start: every arm's first setting; None = the middle of the ladders.
    """
    middle = tuple(ladder[len(ladder) // 2] for ladder in ladders)
    found: dict[Hashable, dict[Setting, float]] = {arm: {} for arm in arms}
    wanted = [(arm, start[arm] if start else middle) for arm in found]
    while wanted:
        for (arm, setting), score in measure(wanted).items():
            found[arm][setting] = score
        wanted = [(arm, setting) for arm, scores in found.items() for setting in beside(scores, ladders)]
    return found


def _height(value: float | None) -> float:
    return float("inf") if value is None else value
