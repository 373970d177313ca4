"""Tasks and texts that the tests of puzzles share."""

import math
import re
from fractions import Fraction
from pathlib import Path

DATA = Path(__file__).parent / "data"


def strict(verdict: dict[str, float]) -> dict[str, float]:
    """The metrics of our own reading; what the published evaluation makes of a text is tested by itself."""
    return {key: value for key, value in verdict.items() if not key.endswith("_published")}


def assert_share(hits: int, chances: list[float]) -> None:
    """A sum of independent events with these chances: within 4 standard deviations of its mean."""
    deviation = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(hits - sum(chances)) < 4 * deviation


PUZZLE, SOLUTION = "0401002010030310", "2431312412434312"


def value_of(expression: str) -> Fraction | None:
    """Python's own reading of a well-formed expression, in exact arithmetic."""
    try:
        return eval(re.sub("[0-9]+", lambda n: f"Fraction({int(n[0])})", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None
