"""From verdicts to numbers with confidence intervals. Pure functions."""

import math

from espo_lightning.tasks.base import Verdict


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


def summarise(verdicts: list[Verdict]) -> dict:
    """Mean of every metric, the number of samples "n", and "ci95", a 95 % confidence interval of each mean.

    Wilson's interval for metrics that are 0 or 1 throughout, the normal one otherwise.
    """
    n = len(verdicts)
    if n == 0:
        raise ValueError("nothing to summarise: there is not a single verdict")
    means, intervals = {}, {}
    for key in sorted({key for v in verdicts for key in v}):
        values = [float(v.get(key, 0.0)) for v in verdicts]
        mean = sum(values) / n
        if set(values) <= {0.0, 1.0}:
            z2 = 1.96**2 / n
            centre = (mean + z2 / 2) / (1 + z2)
            half = math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4) / (1 + z2)
        else:
            variance = sum((v - mean) ** 2 for v in values) / max(1, n - 1)
            centre, half = mean, 1.96 * math.sqrt(variance / n)
        means[key], intervals[key] = mean, [centre - half, centre + half]
    return {**means, "n": n, "ci95": intervals}
