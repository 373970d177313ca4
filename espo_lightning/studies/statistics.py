"""Small statistics of the notebooks."""

from collections.abc import Sequence

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


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1).double()
    return below + ((values.unsqueeze(0) == values.unsqueeze(1)).sum(1).double() - 1) / 2
