"""Small statistics of the notebooks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties at their mean rank. 0 if one of them does not vary.

    Raises:
        ValueError: different lengths.
    """
    if len(x) != len(y):
        raise ValueError(f"a correlation needs pairs, got {len(x)} and {len(y)} values")
    ranks = torch.stack([_ranks(torch.tensor(list(v), dtype=torch.float64)) for v in (x, y)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float(ranks.prod(0).sum() / norms) if norms > 0 else 0.0


def first_above(values: Sequence[float], level: float) -> int | None:
    """Index of the first value of at least ``level``; None if there is none."""
    return next((i for i, value in enumerate(values) if value >= level), None)


class BrokenLine(NamedTuple):
    """Least squares of y over x. slope, r2: of one straight line. knot, before, after, r2_broken: of two that meet."""

    slope: float
    r2: float
    knot: float
    before: float
    after: float
    r2_broken: float


def broken_line(x: Sequence[float], y: Sequence[float]) -> BrokenLine:
    """One straight line, and the best continuous pair of lines whose knot is one of the inner points.

    Raises:
        ValueError: fewer than 4 points, or a constant y.
    """
    if len(x) != len(y) or len(x) < 4 or len(set(y)) < 2:
        raise ValueError(f"two lines need at least 4 pairs with different y, got {len(x)} x and {len(y)} y")
    x, y = (torch.tensor(list(v), dtype=torch.float64) for v in (x, y))
    total = (y - y.mean()).square().sum()

    def fit(*columns: torch.Tensor) -> tuple[torch.Tensor, float]:
        design = torch.stack([torch.ones_like(x), *columns], 1)
        solution = torch.linalg.lstsq(design, y).solution
        return solution, float(1 - (design @ solution - y).square().sum() / total)

    straight, r2 = fit(x)
    bent = [(fit(x, (x - knot).clamp(min=0)), float(knot)) for knot in x[1:-1]]
    (coefficients, r2_broken), knot = max(bent, key=lambda candidate: candidate[0][1])
    before, change = float(coefficients[1]), float(coefficients[2])
    return BrokenLine(float(straight[1]), r2, knot, before, before + change, r2_broken)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below + (equal - 1).double() / 2
