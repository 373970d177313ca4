"""The leaderboard as numbers and as a page: which learning rate is next, what is chosen, who differs. Pure.

An *entry* is what a method did: for every task its pilots, learning rate and final runs, as `espo_lightning.leaderboard`
makes them.
"""

import math
from collections.abc import Sequence
from statistics import mean, median, stdev

# two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def best(pilots: list[dict]) -> float:
    """The learning rate "lr" with the highest "score"; of equal ones the smallest."""
    return min(pilots, key=lambda pilot: (-pilot["score"], pilot["lr"]))["lr"]


def at_edge(pilots: list[dict]) -> bool:
    """Whether the best learning rate is the smallest or largest that was tried, so that a better one may lie beyond."""
    rates = [pilot["lr"] for pilot in pilots]
    return best(pilots) in (min(rates), max(rates))


def beyond(pilots: list[dict], factor: float) -> float:
    """The next learning rate outside a grid, on the side of its best one, with two digits."""
    lr, rates = best(pilots), [pilot["lr"] for pilot in pilots]
    return float(f"{lr * factor if lr == max(rates) else lr / factor:.2g}")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean of independent values, by Student's t.

    Raises:
        ValueError: fewer than 2 values, or more than `STUDENT` has quantiles for.
    """
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"an interval needs from 2 to {len(STUDENT) + 1} values, got {len(values)}")
    half = STUDENT[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half
