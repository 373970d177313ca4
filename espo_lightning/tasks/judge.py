"""From completions to verdicts: verifiers in parallel, none of which can cost the run."""

import os
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence

from espo_lightning.tasks.base import Problem, Verdict
from espo_lightning.tasks.verifiers import Failed, check_works, checked, name_of

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
    complete = {"timeout": 0.0, **verdict}
    return Failed(complete, verdict.causes) if isinstance(verdict, Failed) else complete


def _warn(text: str, cause: str) -> None:
    warnings.warn(f"a verifier failed on {text[:80]!r} ({cause}); the completion gets reward 0", stacklevel=3)


def judge_all(
    problems: Sequence[Problem],
    texts: Sequence[str],
    limit: float = LIMIT,
    threads: int | None = None,
    *,
    must_work: bool = False,
) -> list[Verdict]:
    """`judge` every text of its problem, in parallel; the verdicts in the order of the texts.

    Threads suffice: verifiers that take long wait for a process of their own (`tasks.sandbox`, `tasks.maths`), and the
    others take microseconds. All are done when this returns, so that nothing overlaps with the next phase; the one
    exception is a verifier that takes longer than ``limit`` seconds: its completion gets reward 0, "failed" and
    "timeout" 1, and its thread, which Python cannot kill, is left behind.

    Args:
        limit: seconds for one verifier.
        threads: verifiers at a time, default the CPUs, as many as the sandbox runs programs at a time.
        must_work: refuse a verifier that fails on every text; for the first rollout.

    Raises:
        ValueError: not as many texts as problems.
        BrokenVerifier: with ``must_work``, see `check_works`.
        VerifierUnavailable: see `judge`.
    """
    if len(problems) != len(texts):
        raise ValueError(f"judge_all needs one problem per text, got {len(problems)} problems, {len(texts)} texts")
    judged = _in_parallel(problems, texts, limit, min(len(texts), threads or os.cpu_count() or 1))
    if must_work:
        check_works(judged)
    return judged


def _in_parallel(problems: Sequence[Problem], texts: Sequence[str], limit: float, threads: int) -> list[Verdict]:
    """The verdicts, in the order of the texts; what takes longer than ``limit`` seconds has failed."""
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

    start(threads)
    try:
        while len(verdicts) < len(texts):
            try:
                index, verdict = done.get(timeout=min(limit, 1.0))
            except queue.Empty:
                now = time.monotonic()
                for index in [i for i, then in list(started.items()) if i not in verdicts and now - then > limit]:
                    cause = f"no verdict after {limit:g} s"
                    _warn(texts[index], cause)
                    late = {name_of(problems[index].verify): cause}
                    verdicts[index] = Failed({"timeout": 1.0, "failed": 1.0, "reward": 0.0}, late)
                    start(1)  # in the place of the one that hangs
                continue
            if isinstance(verdict, BaseException):
                raise verdict
            verdicts.setdefault(index, verdict)  # one that was given up may still come
    finally:
        waiting.clear()  # after an error or Ctrl-C, start no more
    return [verdicts[index] for index in range(len(texts))]
