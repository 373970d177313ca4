"""From completions to verdicts, and from verdicts to numbers with confidence intervals. Without torch."""

import math
import os
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence

from espo_lightning.tasks.base import Problem, Verdict, checked

LIMIT = 120.0  # seconds for one verifier; those of this library end themselves long before


def judge(problem: Problem, text: str) -> Verdict:
    """The verifier's verdict, plus "failed" and "timeout", which are 0 unless the verifier itself reports them.

    A broken verifier costs one completion its reward, see `checked`, and is reported; it never costs the run.

    Raises:
        VerifierUnavailable: this host cannot run the verifier at all, whatever the text.
    """
    verdict, cause = checked(problem.verify, text)
    if cause:
        _warn(text, cause)
    return {"timeout": 0.0, **verdict}


def _warn(text: str, cause: str) -> None:
    warnings.warn(f"a verifier failed on {text[:80]!r} ({cause}); the completion gets reward 0", stacklevel=3)


def judge_all(
    problems: Sequence[Problem], texts: Sequence[str], limit: float = LIMIT, threads: int | None = None
) -> list[Verdict]:
    """`judge` every text of its problem, in parallel; the verdicts in the order of the texts.

    Threads suffice: verifiers that take long wait for a process of their own (`tasks.sandbox`, `tasks.maths`), and the
    others take microseconds. All are done when this returns, so that nothing overlaps with the next phase; the one
    exception is a verifier that takes longer than ``limit`` seconds: its completion gets reward 0, "failed" and
    "timeout" 1, and its thread, which Python cannot kill, is left behind.

    Args:
        limit: seconds for one verifier.
        threads: verifiers at a time, default the CPUs, as many as the sandbox runs programs at a time.

    Raises:
        ValueError: not as many texts as problems.
        VerifierUnavailable: see `judge`.
    """
    if len(problems) != len(texts):
        raise ValueError(f"judge_all needs one problem per text, got {len(problems)} problems, {len(texts)} texts")
    waiting, started, done = deque(range(len(texts))), {}, queue.SimpleQueue()
    verdicts: dict[int, Verdict] = {}

    def work() -> None:
        while waiting:
            try:
                index = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            started[index] = time.monotonic()
            try:
                done.put((index, judge(problems[index], texts[index])))
            except BaseException as error:
                done.put((index, error))

    def start(count: int) -> None:
        for _ in range(count):
            threading.Thread(target=work, name="verifier", daemon=True).start()

    start(min(len(texts), threads or os.cpu_count() or 1))
    try:
        while len(verdicts) < len(texts):
            try:
                index, verdict = done.get(timeout=min(limit, 1.0))
            except queue.Empty:
                now = time.monotonic()
                for index in [i for i, then in list(started.items()) if i not in verdicts and now - then > limit]:
                    _warn(texts[index], f"no verdict after {limit:g} s")
                    verdicts[index] = {"timeout": 1.0, "failed": 1.0, "reward": 0.0}
                    start(1)  # in the place of the one that hangs
                continue
            if isinstance(verdict, BaseException):
                raise verdict
            verdicts.setdefault(index, verdict)  # one that was given up may still come
    finally:
        waiting.clear()  # after an error or Ctrl-C, start no more
    return [verdicts[index] for index in range(len(texts))]


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
