"""What numbers show: a statement holds, or its opposite does, or neither is shown.

One rule for every finding of the notebooks. A statement about more than the runs at hand needs a 95 % interval that
excludes its opposite, "yes", or itself, "no"; else the answer is "not shown". Pure.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

YES, NO, NOT_SHOWN = "yes", "no", "not shown"
ANSWERS = (YES, NO, NOT_SHOWN)
Interval = tuple[float, float]

# two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> Interval:
    """A 95 % interval of the mean of independent values, such as one per seed, by Student's t.

    Raises:
        ValueError: fewer than 2 values, or more than `STUDENT` has quantiles for.
    """
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"an interval needs from 2 to {len(STUDENT) + 1} values, got {len(values)}")
    half = STUDENT[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """A 95 % interval of the mean of a - b, whose values belong together: the same seed, the same puzzle.

    Raises:
        ValueError: different lengths, or see `interval`.
    """
    return interval([x - y for x, y in zip(a, b, strict=True)])


def jackknife(statistic: Callable[[Sequence], float], rows: Sequence) -> Interval:
    """A 95 % interval of a statistic of independent rows, such as one per seed, from what it is without each of them.

    Tukey's pseudo-values, as if they were independent values of the statistic.
    """
    n, whole = len(rows), statistic(rows)
    without = [statistic([row for j, row in enumerate(rows) if j != i]) for i in range(n)]
    return interval([n * whole - (n - 1) * value for value in without])


def correlation_interval(rho: float, pairs: int) -> Interval:
    """A 95 % interval of a rank correlation, by Fisher's z with the variance 1.06 / (n - 3) of ranks.

    E. C. Fieller, H. O. Hartley and E. S. Pearson, Tests for rank correlation coefficients, Biometrika 44 (1957).
    With fewer than 4 pairs nothing is known: [-1, 1].
    """
    if pairs < 4:
        return -1.0, 1.0
    z, half = math.atanh(max(-0.999999, min(0.999999, rho))), 1.96 * math.sqrt(1.06 / (pairs - 3))
    return math.tanh(z - half), math.tanh(z + half)


def above(found: Interval, level: float = 0.0) -> str:
    """Whether a value is above ``level``, given its interval."""
    low, high = found
    return YES if low > level else NO if high < level else NOT_SHOWN


def below(found: Interval, level: float = 0.0) -> str:
    """Whether a value is below ``level``, given its interval."""
    return opposite(above(found, level))


def within(found: Interval, low: float, high: float) -> str:
    """Whether a value lies between two levels, given its interval."""
    return all_of([above(found, low), below(found, high)])


def seen(held: bool) -> str:
    """The answer to a statement about the very runs or formulas at hand, such as "in every seed that ran"."""
    return YES if held else NO


def opposite(answer: str) -> str:
    """The answer to the opposite statement."""
    return {YES: NO, NO: YES}.get(answer, NOT_SHOWN)


def all_of(answers: Iterable[str]) -> str:
    """The answer to "all of these hold": one that does not refutes it, one that is not shown leaves it open."""
    answers = list(answers)
    return NO if NO in answers else NOT_SHOWN if NOT_SHOWN in answers else YES


def any_of(answers: Iterable[str]) -> str:
    """The answer to "at least one of these holds"."""
    return opposite(all_of(opposite(answer) for answer in answers))
