"""Ranges of numeric arguments: what is out of one is refused with its name, what was expected, and what came.

Every constructor checks its own numbers with these functions, so that nonsense ends a program before anything is
written. NaN lies in no range. None passes, as it means "off" where it is allowed.
"""

from numbers import Integral

INT64 = 2**63 - 1  # the largest seed: keys are int64


def check_whole(**values: int | None) -> None:
    """Raises ValueError for the first value that is no whole number up to 2^63 - 1."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value}")
        if value is not None and value > INT64:
            raise ValueError(f"{name} must be at most 2^63 - 1, got {value}")


def check_counts(least: int, /, **values: int | None) -> None:
    """Raises ValueError for the first value that is no whole number from ``least`` to 2^63 - 1."""
    check_whole(**values)
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_numbers(interval: str, /, **values: float | None) -> None:
    """Raises ValueError for the first value outside an interval such as ``"(0, 1]"`` or ``"[0, inf)"``."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        if value is None or low < value < high:
            continue
        if not (interval[0] == "[" and value == low) and not (interval[-1] == "]" and value == high):
            raise ValueError(f"{name} must lie in {interval}, got {value}")
