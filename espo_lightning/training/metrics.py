"""Metrics of all processes: sums and counts that add up."""

import math

from torch import Tensor

# logged as NaN if no completion of a rollout had a gradient
UPDATE_METRICS = ("loss", "log_ratio", "log_ratio_max", "clip_low", "clip_high", "kl", "score_per_token")


Share = tuple[float, float]  # sum and count of one process's values of a metric


def share(values: Tensor) -> Share:
    """Sum and count of the values of this process."""
    return float(values.double().sum()), values.numel()


def pool(shares: list[dict[str, Share]]) -> dict[str, float]:
    """Means over the values of all processes, each with its weight; NaN where there is not a single value."""
    totals = {key: tuple(map(sum, zip(*(part[key] for part in shares)))) for key in shares[0]}
    return {key: total / count if count else math.nan for key, (total, count) in totals.items()}
