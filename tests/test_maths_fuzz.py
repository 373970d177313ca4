"""No text breaks or stalls the judge of mathematical answers."""

import random
import select
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from conftest import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from maths_cases import RIGHT
from processes import resident, scheduled

from espo_lightning.tasks import maths
from espo_lightning.tasks.countdown import Countdown
from espo_lightning.tasks.maths import verify_math
from espo_lightning.tasks.rewards import brevity, tags
from espo_lightning.tasks.sudoku import Sudoku


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first comparison of each of the two workers waits for it to import sympy."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: verify_math("\\boxed{9^{9^{9^{9}}}}", "7"), range(2)))


# ---- fuzzing ------------------------------------------------------------------------------------------------------


PIECES = [
    *(
        "\\boxed{",
        "}",
        "{",
        "\\frac{1}{2}",
        "\\sqrt{",
        "^",
        "_",
        "9",
        "0.5",
        "-",
        "+",
        "/",
        ",",
        "(",
        ")",
        "$",
        "\\$",
        "%",
    ),
    *(
        "The answer is ",
        "answer: ",
        "#### ",
        "\n",
        " ",
        ".",
        "x",
        "\\pi",
        "\\infty",
        "!",
        "**",
        "\\text{",
        "e",
        "=",
        "<",
    ),
    *(
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "&",
        "\\\\",
        "\0",
        "\ud800",
        "é",
        "４",
        "²",
        "1,000",
        "7 pm",
        "\\left(",
        "[",
        "|",
    ),
    *("\\sum_{n=1}^{9}", "\\int_0^1", "\\binom{", "\\log", "\\sin", "\\cup", "\\pm", "^\\circ", "1e9", "or", " and "),
    *("<answer>", "</answer>", "<reasoning>", "</reasoning>", "0401002010030310", "*", "//", "2*4-3"),
]


OTHERS = [Countdown().problem("train", 0, 0).verify, Sudoku().problem("train", 0, 0).verify, tags, brevity]


def garbage(draw: random.Random) -> str:
    """Pieces in a row; a few of them as an answer; or a right answer with some characters dropped or replaced."""
    kind = draw.randrange(3)
    if kind == 0:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 25)))
    if kind == 1:
        return draw.choice(RIGHT).format("".join(draw.choices(PIECES, k=draw.randint(1, 8))))
    text = list(draw.choice(RIGHT).format(draw.choice(GOLDS)))
    for _ in range(draw.randint(0, 3)):
        text[draw.randrange(len(text))] = draw.choice(["", *PIECES])
    return "".join(text)


def check(text: str, gold: str, numbers: bool) -> dict[str, float]:
    verdict = verify_math(text, gold, numbers)
    assert set(verdict) == {"reward", "exact", "format", "failed", "timeout"}, text
    assert verdict["reward"] in (0.0, 1.0)
    assert not verdict["failed"] or verdict["reward"] == 0.0
    assert all("reward" in verifier(text) for verifier in OTHERS)
    return verdict


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(), gold=st.sampled_from(["7", "\\frac{1}{2}", "(3,\\infty)", "\\text{even}"]))
def test_any_text(text, gold):
    check(text, gold, numbers=True)
    check(f"\\boxed{{{text}}}", gold, numbers=False)


GOLDS = ["7", "0.5", "\\frac{1}{2}", "(3,\\infty)", "x^2+1", "\\text{even}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"]


class Cost(NamedTuple):
    """Seconds of one call. wall: on this machine. processor: of the calling thread and its worker's child. free: wall
    without the time for which they could have run and other programs had the processors."""

    wall: float
    processor: float
    free: float


@pytest.fixture
def cost(monkeypatch):
    """A function that makes a call and returns its value and its `Cost`.

    The kernel counts per thread how long it ran and how long it waited for a processor (the latter is 0 where it does
    not, and ``free`` is then stricter than it should be). While the worker's child has the request, its waiting counts,
    not the caller's. A child that is killed is read every 20 ms until then.
    """
    compare, reply, here = maths._Worker.compare, maths._Worker._reply, threading.local()

    def watched_reply(worker, deadline):
        while time.monotonic() < deadline and not select.select([worker.process.stdout], [], [], 0.02)[0]:
            here.child = scheduled(worker.child) or here.child
        return reply(worker, deadline)

    def watched_compare(worker, gold, answer):
        mine, child, pid = scheduled(), scheduled(worker.child), worker.child
        here.child = child
        outcome = compare(worker, gold, answer)
        if worker.child == pid:
            here.child = scheduled(pid) or here.child
        here.worker = [after - before for after, before in zip(here.child, child)]
        here.meanwhile = scheduled()[1] - mine[1]
        return outcome

    def call(function, *args):
        here.worker, here.meanwhile = (0.0, 0.0), 0.0
        wall, (ran, waited) = time.perf_counter(), scheduled()
        value = function(*args)
        wall, now = time.perf_counter() - wall, scheduled()
        return value, Cost(
            wall, now[0] - ran + here.worker[0], wall - (now[1] - waited - here.meanwhile) - here.worker[1]
        )

    monkeypatch.setattr(maths._Worker, "_reply", watched_reply)
    monkeypatch.setattr(maths._Worker, "compare", watched_compare)
    return call


def test_the_cost_of_a_hanging_comparison_is_its_second(cost):
    """On a busy machine too, which is what the fuzzing below relies on."""
    verdict, spent = cost(verify_math, "\\boxed{9^{9^{9^{9}}}}", "7")
    assert verdict["timeout"] == 1.0
    assert 0.8 < spent.processor < 1.3
    assert 0.8 < spent.free < 1.5


@pytest.mark.parametrize("count", [400, pytest.param(200_000, marks=pytest.mark.slow)])
def test_fuzz(count, cost):
    """No exception, no call over 2 s on a free machine, no growth of memory, here or in the workers."""
    seen = Counter()

    def worst(indices: range) -> Cost:
        slowest = Cost(0.0, 0.0, 0.0)
        for index in indices:
            draw = random.Random(index)
            verdict, spent = cost(check, garbage(draw), draw.choice(GOLDS), draw.random() < 0.5)
            seen.update(key for key, value in verdict.items() if value)
            slowest = Cost(*map(max, slowest, spent))
        return slowest

    slowest, memory, servers, children = Cost(0.0, 0.0, 0.0), [], [], []
    with ThreadPoolExecutor(2) as threads:
        for start in range(0, count, count // 8):
            halves = [range(start + first, start + count // 8, 2) for first in (0, 1)]
            slowest = Cost(*map(max, slowest, *threads.map(worst, halves)))
            idle = [worker for worker in maths._workers()._idle.queue if worker is not None]
            memory.append(resident())
            servers.append(max(resident(worker.process.pid) for worker in idle))
            children.append(max(resident(worker.child) for worker in idle))
            print(start + count // 8, slowest, memory[-1], servers[-1], children[-1], dict(seen))  # with -s, progress
    assert slowest.processor < 2.0
    assert slowest.free < 2.0
    for held in (memory, servers, children):  # KiB
        assert max(held[4:]) - max(held[:4]) < 20_000
    assert seen["reward"] > count / 100  # the texts are near enough to right ones to test something
    assert threading.active_count() < 30


@pytest.mark.parametrize("text", ["\\boxed{" * 5000, "{" * 20_000, "$" * 20_000, "answer is " * 5000, "1," * 20_000])
def test_long_texts_are_linear(text):
    def verdicts(text: str) -> None:
        for numbers in (True, False):
            verify_math(text, "7", numbers)
            verify_math(text + "}", "\\frac{1}{2}", numbers)

    assert_linear(verdicts, text)
