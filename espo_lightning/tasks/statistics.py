"""From verdicts to numbers with confidence intervals. Pure functions."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from espo_lightning.tasks.base import Messages, Verdict

Z = 1.96  # normal quantile of 95 %


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from c right ones of n (Chen et al. 2021, Eq. 1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n; fewer samples than k give no unbiased estimate.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def per_problem(verdicts: list[Verdict], samples: int) -> list[Verdict]:
    """One verdict per problem from those of its ``samples`` completions, which stand side by side.

    The mean of every metric and, with several samples, "pass@1", "pass@2", "pass@4", ... of "exact". The samples of a
    problem are not independent: intervals are over problems.
    """
    if samples == 1:
        return verdicts
    rows = []
    for first in range(0, len(verdicts), samples):
        group = verdicts[first : first + samples]
        row = {key: sum(v.get(key, 0.0) for v in group) / samples for key in {key for v in group for key in v}}
        right = sum(v.get("exact") == 1 for v in group)
        rows.append(row | {f"pass@{2**j}": pass_at_k(samples, right, 2**j) for j in range(samples.bit_length())})
    return rows


def cluster_of(prompt: str | Messages, cluster: str = "") -> str:
    """What `summarise` clusters a problem by: its own key, or else its prompt."""
    return cluster or json.dumps(prompt)


def summarise(verdicts: list[Verdict], clusters: Sequence[Hashable] | None = None) -> dict:
    """Mean of every metric, the number of samples "n", and "ci95", a 95 % confidence interval of each mean.

    Wilson's interval for metrics that are 0 or 1 throughout, the normal one otherwise. Verdicts of one cluster are not
    independent (one solution, one set of numbers, one prompt): the variance of the mean is that of the sums over
    clusters (Liang and Zeger 1986), but never below that of as many independent verdicts, and Wilson's interval is
    taken at the size of an independent sample with that variance. Where all values are equal, no variance can be
    estimated: the interval is then `constant`'s.

    Args:
        clusters: one key per verdict, see `cluster_of`; their number is "clusters". None: all are independent.

    Raises:
        ValueError: no verdict, or not one key per verdict.
    """
    n = len(verdicts)
    if n == 0:
        raise ValueError("nothing to summarise: there is not a single verdict")
    clusters = range(n) if clusters is None else clusters
    if len(clusters) != n:
        raise ValueError(f"summarise needs one cluster per verdict, got {n} verdicts, {len(clusters)} clusters")
    means, intervals = {}, {}
    for key in sorted({key for v in verdicts for key in v}):
        values = [float(v.get(key, 0.0)) for v in verdicts]
        means[key], intervals[key] = sum(values) / n, list(interval(values, clusters))
    return {**means, "n": n, "clusters": len(set(clusters)), "ci95": intervals}


def interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean of clustered values, see `summarise`."""
    n, mean = len(values), sum(values) / len(values)
    sums, sizes = defaultdict(float), Counter(clusters)
    for cluster, value in zip(clusters, values):
        sums[cluster] += value - mean
    if len(set(values)) == 1 or len(sizes) == 1:  # the most that clusters can cost: as if each were one verdict
        return constant(mean, n * n / sum(size * size for size in sizes.values()))
    independent = sum((value - mean) ** 2 for value in values) / n
    clustered = len(sizes) / (len(sizes) - 1) * sum(part * part for part in sums.values()) / n
    if set(values) <= {0.0, 1.0}:
        repeated = len(sizes) < n
        return wilson(mean, n / max(1.0, clustered / independent) if repeated else n)
    half = Z * math.sqrt(max(clustered, independent * n / (n - 1)) / n)
    return mean - half, mean + half


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share among ``n`` (1927)."""
    z2 = Z**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
    return centre - half, centre + half


def constant(value: float, n: float) -> tuple[float, float]:
    """Of ``n`` values that are all equal: Wilson's bound on the share of others, which may lie anywhere in 0..1.

    The same as `wilson` for the values 0 and 1. For a value outside 0..1, the others may lie as far from it as 0 does.
    """
    others = wilson(0.0, n)[1]
    down, up = (value, 1 - value) if 0 <= value <= 1 else (abs(value), abs(value))
    return value - others * down, value + others * up
