r"""GSM8K and MATH: one pure verifier, from plain numbers in microseconds to math-verify in a killable worker.

`answers` says where the answer of a completion stands, `grammar` what it means, `equivalence` when it equals the gold
answer; docs/verifiers.md has the conventions. Whole numbers and fractions are compared here. All else goes to a worker
process with math-verify, whose own time limits need SIGALRM and do nothing outside a main thread; it is killed after a
second of processor time, so that a verdict does not depend on what else the machine does.
GSM8K: Cobbe et al. 2021. MATH: Hendrycks et al. 2021, test set of Lightman et al. 2023. Prompt as in the paper.
"""

import atexit
import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from espo_lightning.ranges import check_numbers
from espo_lightning.tasks.answers import TEXT_LIMIT, boxed, boxes, copies, locate
from espo_lightning.tasks.base import Problem, Verdict, VerifierUnavailable
from espo_lightning.tasks.files import Row
from espo_lightning.tasks.grammar import read
from espo_lightning.tasks.maths_inner import REPLY, REQUEST
from espo_lightning.tasks.notation import form
from espo_lightning.tasks.rows import RowTask
from espo_lightning.tasks.trees import exact

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
STALL = 30.0  # seconds of wall time until a worker that uses no processor time is given up
START_TIMEOUT = 300.0  # seconds for a worker to import sympy
MEMORY_MB = 1024
REQUESTS_PER_CHILD = 1000  # then it is replaced, as sympy's caches grow
INNER = Path(__file__).with_name("maths_inner.py")
Outcome = Literal["equal", "different", "failed", "timeout"]
OUTCOMES: dict[int, Outcome] = {1: "equal", 0: "different", -1: "failed"}  # of `maths_inner`


def verify_math(
    text: str, gold: str, numbers: bool = False, question: str | None = None, copied: float = 1.0
) -> Verdict:
    """Score a completion against a gold answer.

    exact: the answers are equal, which is the reward. format: there is a complete box. failed: the comparison ran out
    of time (timeout: 1 as well) or memory or crashed, and scored 0. Equal input, equal verdict; no text takes longer
    than a second of processor time, plus the wait for a free worker.

    Args:
        numbers: GSM8K: the last number is the answer where nothing marks one.
        question: adds the metric "copied": 1 if the answer is an expression of the question, not worked out.
        copied: what such an answer is worth where it is right: 1 as in the benchmarks, 0 for training, where a policy
            otherwise learns to read nothing.
    """
    answer = locate(text, numbers)
    verdict = {"reward": 0.0, "exact": 0.0, "format": float(bool(boxes(text[-TEXT_LIMIT:])))}
    verdict |= {"failed": 0.0, "timeout": 0.0}
    if question is not None:
        verdict["copied"] = float(answer is not None and copies(answer, question, gold))
    if answer is None:
        return verdict
    outcome = compare(gold, answer)
    equal, timeout = float(outcome == "equal"), float(outcome == "timeout")
    return verdict | {
        "reward": equal * (copied if verdict.get("copied") else 1.0),
        "exact": equal,
        "failed": max(timeout, float(outcome == "failed")),
        "timeout": timeout,
    }


def compare(gold: str, answer: str) -> Outcome:
    """Equal as they look, or as numbers, or for the worker; an answer that is not read as a whole is different."""
    trees = read(gold), read(answer)
    looks, measured = form(answer), [tree is not None and tree[0] == "quantity" for tree in trees]
    if looks and looks == form(gold) and measured[0] == measured[1]:  # "5 m" has a unit, 5m has not
        return "equal"
    if None in trees:
        return "different"
    values = [exact(tree[1] if tree[0] == "quantity" and tree[2] == "" else tree) for tree in trees]
    if None not in values:
        return "equal" if values[0] == values[1] else "different"
    return _workers().compare(gold, answer)


class _Worker:
    """One warm `maths_inner` process. Not thread-safe: the pool lends it to one thread at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # -I: no PYTHON* of the caller. Its sys.path goes along, as PYTHONPATH may be where math-verify is.
            [sys.executable, "-I", str(INNER), str(MEMORY_MB), json.dumps([os.path.abspath(p) for p in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            bufsize=0,
        )
        self.child, self.request, self.served = 0, 0, 0
        try:
            self._await_child()
        except OSError:
            self.close()
            raise

    def _await_child(self) -> None:
        """Raises OSError if no child gets ready. Drops a verdict that was on its way when its child was killed."""
        deadline = time.monotonic() + START_TIMEOUT
        while (kind := self._reply(deadline))[0] != b"R":
            pass
        self.child, self.served = kind[1], 0

    def _reply(self, deadline: float) -> tuple[bytes, int, int]:
        if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        data = self.process.stdout.read(REPLY.size)
        if len(data) < REPLY.size:
            raise OSError(f"the math-verify worker ended with code {self.process.wait()}; is math-verify installed?")
        return REPLY.unpack(data)

    def _replace_child(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self._await_child()

    def compare(self, gold: str, answer: str) -> Outcome:
        """Judge one pair. Raises OSError if the worker cannot be had at all."""
        trees = read(gold), read(answer)
        if None in trees:
            return "different"
        body = json.dumps(trees).encode()
        self.request += 1
        message = REQUEST.pack(len(body), self.request) + body
        self.process.stdin.write(message)
        deadline, deaths = time.monotonic() + STALL, 0
        while True:
            try:
                kind, value, number = self._reply(deadline)
            except TimeoutError:
                self._replace_child()
                kind, value, number = b"R", self.child, signal.SIGPROF
            if kind == b"V" and number == self.request:
                break
            if kind == b"R":  # ``value``, in the place of a child that ``number`` killed
                self.child, self.served, deaths = value, 0, deaths + 1
                if number == signal.SIGPROF or deaths == 2:
                    if deaths == 2:  # a copy of the request may wait for the next child:
                        self.process.kill()  # the next call notices, and starts a new worker
                        self.process.wait()  # or it stays a zombie until then
                    return "timeout" if number == signal.SIGPROF else "failed"
                self.process.stdin.write(message)  # an answer to a second copy is dropped, its number being old
        self.served += 1
        if self.served == REQUESTS_PER_CHILD:
            self._replace_child()
        return OUTCOMES[value]

    def close(self) -> None:
        self.process.kill()  # its child sees the pipe close
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Workers:
    """A pool that any number of threads may call. ``size``: comparisons at a time."""

    def __init__(self, size: int = min(8, os.cpu_count() or 1)) -> None:
        self.size = size
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)  # started when first needed

    def compare(self, gold: str, answer: str) -> Outcome:
        """Judge one pair. Raises VerifierUnavailable if math-verify cannot be started, which no text can cause."""
        worker = self._idle.get()
        try:
            for attempts_left in (1, 0):
                try:
                    worker = worker or _Worker()
                    return worker.compare(gold, answer)
                except OSError as error:  # it was killed while idle, say: one more try, with a new one
                    if worker is not None:
                        worker.close()
                        worker = None
                    if not attempts_left:
                        raise VerifierUnavailable(f"no worker for math-verify: {error}") from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all idle workers. The pool stays usable."""
        for _ in range(self.size):
            if (worker := self._idle.get()) is not None:
                worker.close()
        for _ in range(self.size):
            self._idle.put(None)


_pools: dict[int, Workers] = {}
_lock = threading.Lock()


def _close(pid: int) -> None:
    if pid == os.getpid():  # a forked child leaves its parent's workers alone
        _pools[pid].close()


def _workers() -> Workers:
    """The pool of this process (a forked child makes its own), closed at exit."""
    with _lock:
        if os.getpid() not in _pools:
            _pools[os.getpid()] = Workers()
            atexit.register(_close, os.getpid())
        return _pools[os.getpid()]


@dataclass(frozen=True)
class MathTask(RowTask):
    """copied: what a right answer is worth that is an expression of the question, not worked out, see `verify_math`."""

    copied: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers("[0, 1]", copied=self.copied)

    def check_host(self) -> None:
        """Raises VerifierUnavailable where math-verify cannot be started."""
        _workers().compare("x+x", "2x")


@dataclass(frozen=True)
class GSM8K(MathTask):
    """Grade-school mathematics: the gold answer is the number after "####". Arguments: `RowTask`, `MathTask`."""

    NEEDED = ("question", "answer")
    HUB = MappingProxyType({split: ("openai/gsm8k", "main", split) for split in ("train", "test")})

    def check_row(self, row: Row) -> None:
        super().check_row(row)
        if not row["answer"].rpartition("####")[2].strip() or "####" not in row["answer"]:
            raise ValueError(f"has an 'answer' without a number after '####': {row['answer'][-60:]!r}")

    def problem_of(self, row: Row) -> Problem:
        reasoning, _, gold = str(row["answer"]).rpartition("####")
        gold = gold.strip().replace(",", "")
        answer = re.sub(r"<<[^<>]*>>", "", reasoning).strip() + f"\n\\boxed{{{gold}}}"  # without calculator marks
        question = str(row["question"])
        verify = partial(verify_math, gold=gold, numbers=True, question=question, copied=self.copied)
        return Problem(f"{question}\n{INSTRUCTION}", verify, answer)


@dataclass(frozen=True)
class MATH(MathTask):
    """Competition mathematics; the gold answer is the row's ``answer``, or the last box of its ``solution``.

    Arguments: `RowTask`, `MathTask`.
    """

    NEEDED = ("problem", "solution")
    HUB = MappingProxyType(
        {"train": ("ankner/math-500", None, "train"), "test": ("HuggingFaceH4/MATH-500", None, "test")}
    )

    def check_row(self, row: Row) -> None:
        super().check_row(row)
        if not self.gold(row):
            raise ValueError(f"has no 'answer', and no box in its 'solution': {row['solution'][-60:]!r}")

    def gold(self, row: Row) -> str:
        """The row's answer, which may be a number, or else what its solution boxes; or ""."""
        answer = row.get("answer")
        if answer is not None and str(answer).strip():
            return str(answer)
        return (boxed(row["solution"]) or "").strip()

    def problem_of(self, row: Row) -> Problem:
        question, solution = str(row["problem"]), str(row["solution"])
        verify = partial(verify_math, gold=self.gold(row), question=question, copied=self.copied)
        return Problem(f"{question}\n{INSTRUCTION}", verify, solution)
