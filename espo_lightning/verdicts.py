"""From completions to verdicts, and from verdicts to numbers with confidence intervals."""

import math

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from espo_lightning.tasks.base import Problem, Verdict


def judge(problem: Problem, text: str) -> Verdict:
    """The verifier's verdict, plus "failed": 1 with reward 0 if the verifier raised or its reward is not finite.

    A broken verifier costs one completion its reward and is reported; it never costs the run.
    """
    try:
        verdict = dict(problem.verify(text))
        cause = None if math.isfinite(verdict["reward"]) else f"its reward is {verdict['reward']}"
    except Exception as error:  # whatever a user's verifier raises
        cause = f"{type(error).__name__}: {error}"
    if cause is None:
        return {"failed": 0.0, **verdict}
    rank_zero_warn(f"a verifier failed on {text[:80]!r} ({cause}); the completion gets reward 0")
    return {"failed": 1.0, "reward": 0.0}


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
