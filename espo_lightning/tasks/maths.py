r"""GSM8K and MATH: one pure verifier, from plain numbers in microseconds to math-verify in a killable worker.

The answer of a completion is, in this order:

1. the last complete ``\boxed{...}`` (braces balanced) or ``\fbox{...}``;
2. whatever comes last of ``#### ...`` and "(the) answer is ..." / "answer: ...", to the end of the sentence or line;
3. for GSM8K only: the last number, where a hyphen between digits is no sign and a time of day ("7 pm") does not count.

It is compared with the gold answer: equal text after cleaning, or equal numbers (exact fractions; thousands commas,
currency, per cent and degree signs and units are dropped), or equal for math-verify with the gold answer first.
math-verify's own time limits need SIGALRM and do nothing outside a main thread; here a worker process is killed, after
a second of processor time, so that a verdict does not depend on what else the machine does.
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
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from espo_lightning.tasks.base import Problem, Verdict, VerifierUnavailable
from espo_lightning.tasks.files import Row
from espo_lightning.tasks.maths_inner import REPLY, REQUEST
from espo_lightning.tasks.rows import RowTask

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TEXT_LIMIT = 20_000  # characters of a completion that are read, from its end
ANSWER_LIMIT = 300  # characters of an answer; a longer one is wrong (the longest of MATH-500 has 53)
STALL = 30.0  # seconds of wall time until a worker that uses no processor time is given up
START_TIMEOUT = 300.0  # seconds for a worker to import sympy
MEMORY_MB = 1024
REQUESTS_PER_CHILD = 1000  # then it is replaced, as sympy's caches grow
Outcome = Literal["equal", "different", "failed", "timeout"]
OUTCOMES: dict[int, Outcome] = {1: "equal", 0: "different", -1: "failed"}  # of `maths_inner`

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?|\.[0-9]{1,40}"
NUMBER = re.compile(rf"([-+]?)({DIGITS})(?:/([0-9]{{1,40}}))?")
FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?[0-9]{1,40})\}\{([0-9]{1,40})\}")
IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}.])-)?(?<![\w.,/])(?:{DIGITS})(?:/[0-9]{{1,40}})?(?![0-9])", re.ASCII)
CLOCK = re.compile(r"(?::[0-9]{2})?\s?[ap]\.?m\b", re.IGNORECASE)
MARKER = re.compile(r"####|\banswer\s{0,4}(?:is|:|=)(?:\s{0,4}:)?", re.IGNORECASE)
LEADING = re.compile(
    rf"\\?\$?-?\\?\$?(?:{DIGITS})(?:/[0-9]{{1,40}})?(?=\s*(?:$|[.;:!?)](?!\d)|,(?!\s*[-\\\d(])|\\?%|[^\W\d_]{{2}}))"
)
UNIT = re.compile(r"\s*\\(?:text|mathrm|mbox|textbf)\s?\{[^{}]*\}$|\s+[A-Za-z]{2,}[A-Za-z ]*$")
NOT_UNITS = {"pi", "hundred", "thousand", "million", "billion", "trillion", "dozen", "squared", "cubed"}


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` whose braces close, or None. Linear in the text."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s{0,4}\{", text))):
        depth = 1
        for place in range(match.end(), min(len(text), match.end() + ANSWER_LIMIT + 1)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[match.end() : place]
    return None


def marked(text: str) -> str | None:
    """What follows the last "####" or "answer is", up to the end of its sentence or line, or None."""
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    lines = text[markers[-1].end() : markers[-1].end() + ANSWER_LIMIT].strip().splitlines()
    rest = re.sub(r"^[\s*_:]+", "", lines[0]) if lines else ""
    if number := LEADING.match(rest):
        return number.group()
    if math := re.match(r"\$([^$]+)\$", rest):
        return math.group(1)
    return re.split(r"\.(?:\s|$)", rest)[0].strip(" *_")


def last_number(text: str) -> str | None:
    numbers = [n for n in IN_TEXT.finditer(text) if not CLOCK.match(text, n.end())]
    return numbers[-1].group() if numbers else None


def clean(answer: str) -> str:
    r"""Without spaces, ``\left``, dollar signs, ``\text`` and the like, which change how an answer looks only."""
    answer = answer.strip().rstrip(".").replace("−", "-").replace("{,}", ",")
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\?\$|~", "", answer)
    answer = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s?\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    return re.sub(r"\s+", "", answer)


def number(answer: str) -> Fraction | None:
    """The value of a plain number or fraction without its currency, per cent or degree sign and unit, or None."""
    unit = UNIT.search(answer.strip().rstrip("."))
    if unit and not NOT_UNITS & set(re.findall("[a-z]+", unit.group().lower())):
        answer = answer.strip()[: unit.start()]
    plain = re.sub(r"\^\{?\\circ\}?$|\\?%$", "", clean(answer))
    if match := NUMBER.fullmatch(plain) or FRACTION.fullmatch(plain):
        sign, above, below = match.groups()
        if below is None or int(below) != 0:
            value = Fraction(above.replace(",", "")) / int(below or 1)
            return -value if sign == "-" else value
    return None


def extract(text: str, numbers: bool) -> str | None:
    """The answer of a completion, see the module's docstring. ``numbers``: fall back to the last number."""
    text = text[-TEXT_LIMIT:]
    for found in (boxed(text), marked(text)):
        if found is not None:
            return found
    return last_number(text) if numbers else None


def verify_math(text: str, gold: str, numbers: bool = False) -> Verdict:
    """Score a completion against a gold answer.

    exact: the answers are equal, which is the reward. format: there is a complete box. failed: the comparison ran out
    of time (timeout: 1 as well) or memory or crashed, and scored 0. Equal input, equal verdict; no text takes longer
    than a second of processor time, plus the wait for a free worker.
    """
    answer = extract(text, numbers)
    verdict = {"reward": 0.0, "exact": 0.0, "format": float(boxed(text[-TEXT_LIMIT:]) is not None)}
    verdict |= {"failed": 0.0, "timeout": 0.0}
    if answer is None or not answer.strip() or len(answer) > ANSWER_LIMIT:
        return verdict
    values = number(gold), number(answer)
    if clean(answer) == clean(gold) or (values[0] is not None and values[0] == values[1]):
        outcome = "equal"
    elif None not in values:
        outcome = "different"
    else:
        outcome = _workers().compare(gold, answer)
    equal, timeout = float(outcome == "equal"), float(outcome == "timeout")
    return verdict | {
        "reward": equal,
        "exact": equal,
        "failed": max(timeout, float(outcome == "failed")),
        "timeout": timeout,
    }


class _Worker:
    """One warm `maths_inner` process. Not thread-safe: the pool lends it to one thread at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("maths_inner.py")), str(MEMORY_MB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            bufsize=0,
        )
        self.child, self.request, self.served = 0, 0, 0
        self._await_child()

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
        body = json.dumps([gold, answer]).encode()
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


class GSM8K(RowTask):
    """Grade-school mathematics: the gold answer is the number after "####". See `RowTask` for the arguments."""

    NEEDED = ("question", "answer")
    HUB = MappingProxyType({split: ("openai/gsm8k", "main", split) for split in ("train", "test")})

    def check_row(self, row: Row) -> None:
        super().check_row(row)
        if not row["answer"].rpartition("####")[2].strip() or "####" not in row["answer"]:
            raise ValueError(f"has an 'answer' without a number after '####': {row['answer'][-60:]!r}")

    def problem_of(self, row: Row) -> Problem:
        reasoning, gold = str(row["answer"]).rsplit("####", 1)
        gold = gold.strip().replace(",", "")
        answer = re.sub(r"<<[^<>]*>>", "", reasoning).strip() + f"\n\\boxed{{{gold}}}"  # without calculator marks
        prompt = f"{row['question']}\n{INSTRUCTION}"
        return Problem(prompt, partial(verify_math, gold=gold, numbers=True), answer)


class MATH(RowTask):
    """Competition mathematics; the gold answer is the row's ``answer``, or the last box of its ``solution``."""

    NEEDED = ("problem", "solution")
    HUB = MappingProxyType(
        {"train": ("ankner/math-500", None, "train"), "test": ("HuggingFaceH4/MATH-500", None, "test")}
    )

    def check_row(self, row: Row) -> None:
        super().check_row(row)
        if not self.gold(row):
            raise ValueError(f"has no 'answer', and no box in its 'solution': {row['solution'][-60:]!r}")

    def gold(self, row: Row) -> str:
        """The row's answer, which may be a number, or else what its solution boxes, also without braces; or ""."""
        answer = row.get("answer")
        if answer is not None and str(answer).strip():
            return str(answer)
        unbraced = re.findall(r"\\(?:boxed|fbox)\s*([^{}\s$]+)\s*\$", row["solution"])
        return (boxed(row["solution"]) or "".join(unbraced[-1:])).strip()

    def problem_of(self, row: Row) -> Problem:
        prompt = f"{row['problem']}\n{INSTRUCTION}"
        return Problem(prompt, partial(verify_math, gold=self.gold(row)), row["solution"])
