r"""GSM8K and MATH: gold answers score 1, everything on the adversarial table what its reason says, nothing hangs."""

import json
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import resident, scheduled, stat

from espo_lightning.tasks import maths
from espo_lightning.tasks.base import VerifierUnavailable
from espo_lightning.tasks.countdown import Countdown
from espo_lightning.tasks.maths import GSM8K, INSTRUCTION, MATH, verify_math
from espo_lightning.tasks.rewards import brevity, tags
from espo_lightning.tasks.sudoku import Sudoku

DATA = Path(__file__).parent / "data"
GSM8K_ROWS = GSM8K(path=str(DATA / "gsm8k_60.jsonl"), held_out=1.0)
MATH_ROWS = MATH(path=str(DATA / "math500_84.jsonl"), held_out=1.0)
RIGHT = ["\\boxed{{{}}}", "The answer is {}.", "The answer is {}", "so\n#### {}", "Final answer: ${}$", "\\fbox{{{}}}"]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first comparison of each of the two workers waits for it to import sympy."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: verify_math("\\boxed{9^{9^{9^{9}}}}", "7"), range(2)))


@pytest.mark.parametrize("task", [GSM8K_ROWS, MATH_ROWS], ids=["gsm8k", "math"])
def test_gold_answers_score_one_and_others_zero(task):
    for index in range(len(task.rows("test"))):
        problem = task.problem("test", 0, index)
        gold = problem.verify.keywords["gold"]
        assert problem.prompt.endswith(INSTRUCTION)
        for text in [problem.answer, *(form.format(gold) for form in RIGHT)]:
            assert problem.verify(text)["reward"] == 1.0, (text[-80:], gold)
        for wrong in (
            "",
            "no idea",
            "\\boxed{}",
            "\\boxed{98765}",
            "The answer is 98765.",
            "\\boxed{x^7+1}",
            "\\boxed{",
        ):
            assert problem.verify(wrong)["reward"] == 0.0, (wrong, gold)


# (text, gold, reward, reason); "numbers" of GSM8K is on for the first table and off for the second
GSM8K_TABLE = [
    ("The answer is 42", "42", 1, "official regex needs a character after the number: 4"),
    ("\\boxed{1,000}", "1000", 1, "official regex reads 000"),
    ("\\boxed{18.0}", "18", 1, "official regex reads 0"),
    ("The answer is 42.0.", "42", 1, "official compares strings"),
    ("it is 3.5", "3.5", 1, "official reads 5"),
    ("5-3", "3", 1, "a hyphen between digits is no sign: official reads -3"),
    ("between 3-5", "5", 1, "official reads -5"),
    ("The answer is 7. The answer is 42.", "42", 1, "the last statement counts, official takes the first"),
    ("The answer is 7. The answer is 42.", "7", 0, "a corrected answer is not the answer"),
    ("#### 7\n#### 42", "42", 1, "the last marker counts"),
    ("so 42 at 7 pm", "42", 1, "a time of day is not the answer"),
    ("\\boxed{1,200}", "1200", 1, "thousands comma"),
    ("\\boxed{1{,}200}", "1200", 1, "TeX thousands comma"),
    ("\\boxed{\\$18}", "18", 1, "currency"),
    ("\\boxed{$18}", "18", 1, "bare dollar sign"),
    ("\\boxed{18 dollars}", "18", 1, "unit"),
    ("\\boxed{18\\text{ apples}}", "18", 1, "unit in \\text"),
    ("\\boxed{18\\%}", "18", 1, "per cent sign, as in MATH's own convention"),
    ("\\boxed{ 18 }", "18", 1, "spaces"),
    ("\\boxed {18}", "18", 1, "space before the brace"),
    ("\\boxed{\\text{18}}", "18", 1, "number in \\text"),
    ("\\boxed{+18}", "18", 1, "explicit plus"),
    ("\\boxed{018}", "18", 1, "leading zero"),
    ("\\boxed{18.}", "18", 1, "trailing point"),
    ("\\boxed{36/2}", "18", 1, "fraction that is the number"),
    ("\\boxed{17.999999999}", "18", 0, "no rounding for plain numbers"),
    ("\\boxed{7} ... wait, \\boxed{18}", "18", 1, "last box"),
    ("\\boxed{18} ... wait, \\boxed{7}", "18", 0, "first box does not count"),
    ("\\boxed{18} then \\boxed{", "18", 1, "a box cut off at the end is not an answer"),
    ("The answer is 7. \\boxed{18}", "18", 1, "a box beats a sentence"),
    ("\\boxed{18}. The answer is 7.", "18", 1, "a box beats a sentence, also a later one"),
    ("\\boxed{17, 18, 19}", "18", 0, "a list of guesses"),
    ("\\boxed{17 or 18}", "18", 0, "a hedge"),
    ("\\boxed{18 or 17}", "18", 0, "a hedge, right one first"),
    ("\\boxed{x}\\boxed{}", "18", 0, "an empty box"),
    ("18 18 18 \\boxed{7}", "18", 0, "numbers outside the box"),
    ("\\boxed{-18}", "18", 0, "sign"),
    ("\\boxed{−18}", "-18", 1, "Unicode minus"),
    ("\\boxed{18 million}", "18", 0, "a factor is not a unit"),
    ("\\boxed{18 pi}", "18", 0, "pi is not a unit"),
    ("\\boxed{1800\\%}", "18", 0, "per cent is dropped, not divided"),
    ("The answer is $18$.", "18", 1, "mathematics in a sentence"),
    ("The answer is $18.", "18", 1, "a price in a sentence"),
    ("The answer is 18 apples, because 3 are left.", "18", 1, "text after the number"),
    ("The answer is: **18**", "18", 1, "Markdown"),
    ("ANSWER: 18", "18", 1, "capitals"),
    ("The answer is eighteen", "18", 0, "words are not read"),
    ("#### 18\n", "18", 1, "the data set's own format"),
    ("####", "18", 0, "nothing after the marker"),
    ("10 + 8 = 18", "18", 1, "last number"),
    ("x18", "18", 0, "part of a word"),
    ("٤٢", "42", 0, "other digits are not ASCII digits"),
    ("²", "2", 0, "a superscript passes isdigit"),
    ("\\boxed{1e1}", "10", 0, "no scientific notation in plain numbers"),
    ("\\boxed{1/0}", "0", 0, "division by zero"),
    ("9" * 5000, "9", 0, "a number of 5000 digits"),
    ("\\boxed{" + "9" * 5000 + "}", "9", 0, "a box of 5000 digits"),
]
MATH_TABLE = [
    ("\\boxed{\\frac{1}{2}}", "0.5", 1, "fraction and decimal"),
    ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1, "short form"),
    ("\\boxed{x>3}", "(3,\\infty)", 0, "official argument order makes this 1; gold first 0"),
    ("\\boxed{(3,\\infty)}", "(3,\\infty)", 1, "interval"),
    ("\\boxed{[3,\\infty)}", "(3,\\infty)", 0, "closed is not open"),
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3, \\pi/2)", 1, "tuple with \\left and \\right"),
    ("\\boxed{(\\frac{\\pi}{2}, 3)}", "(3, \\frac{\\pi}{2})", 0, "order of a tuple"),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1, "sets have no order"),
    ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", 1, "surds"),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", 1, "expansion"),
    ("\\boxed{(x+1)^2}", "x^2+2x", 0, "not equal"),
    ("\\boxed{x=5}", "5", 1, "assignment"),
    ("\\boxed{\\text{Even}}", "\\text{even}", 1, "the case of words does not count"),
    ("\\boxed{even}", "\\text{even}", 1, "\\text is presentation"),
    ("\\boxed{30}", "30^\\circ", 1, "degrees"),
    ("\\boxed{10080}", "10,\\!080", 1, "TeX thousands separator"),
    ("\\boxed{1 \\pm \\sqrt{19}}", "1 \\pm \\sqrt{19}", 1, "plus-minus"),
    ("\\boxed{1 + \\sqrt{19}}", "1 \\pm \\sqrt{19}", 0, "half of the solutions"),
    (
        "\\boxed{\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}}",
        "\\begin{pmatrix} 0.2 \\\\ -3.6 \\end{pmatrix}",
        1,
        "matrix",
    ),
    ("so we get 7", "7", 0, "MATH wants a marked answer: the last number of a derivation is mostly not it"),
    ("\\boxed{" + "{" * 200 + "}" * 200 + "}", "7", 0, "nested braces"),
    ("\\boxed{\\boxed{7}}", "7", 1, "nested boxes"),
    ("\\boxed{7}}}}", "7", 1, "too many braces"),
    ("\\boxed{__import__('os').system('true')}", "0", 0, "code in the answer is not executed"),
    ("\\boxed{\\input{/etc/passwd}}", "0", 0, "nor is TeX"),
    ("\\boxed{\\frac{\\frac{\\frac{1}{2}}{3}}{4}}", "\\frac{1}{24}", 1, "nested fractions"),
    ("\\boxed{0}", "x", 0, "number for a symbol"),
    ("\\boxed{x}", "0", 0, "symbol for a number"),
    ("\\boxed{nan}", "0", 0, "nan"),
    ("\\boxed{\\infty}", "0", 0, "infinity"),
    ("", "7", 0, "empty"),
    ("\0\ud800\\boxed{\ud800}", "7", 0, "NUL and a lone surrogate"),
]


def test_table_is_large_enough():
    assert len(GSM8K_TABLE) + len(MATH_TABLE) >= 60


@pytest.mark.parametrize(("text", "gold", "reward", "reason"), GSM8K_TABLE, ids=[row[3] for row in GSM8K_TABLE])
def test_gsm8k_adversarial(text, gold, reward, reason):
    assert verify_math(text, gold, numbers=True)["reward"] == reward, reason


@pytest.mark.parametrize(("text", "gold", "reward", "reason"), MATH_TABLE, ids=[row[3] for row in MATH_TABLE])
def test_math_adversarial(text, gold, reward, reason):
    assert verify_math(text, gold)["reward"] == reward, reason


HANGS = [
    "9^{9^{9^{9}}}",
    "(10^{10})!",
    "\\sum_{n=1}^{10^9} n^{-2}",
    "2^{2^{2^{2^{2^2}}}}",
    "\\binom{10^9}{5 \\cdot 10^8}",
]


def reaped_seconds(pid: int) -> float:
    """Processor time of the children that a process has outlived."""
    return sum(map(int, stat(pid)[13:15])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def fresh():
    """A pool of one worker, whose children have used next to no processor time before they hang."""
    pool = maths.Workers(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("answer", HANGS)
def test_a_comparison_that_hangs_is_killed_outside_the_main_thread(fresh, answer):
    """After a second of processor time, from a thread. Reward 0; what costs no second ends by itself."""
    pool = fresh
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(pool.compare, "\\sqrt{8}", "2\\sqrt{2}").result() == "equal"
        server = pool._idle.queue[0].process.pid
        before = reaped_seconds(server)
        assert threads.submit(pool.compare, "7", answer).result() in ("timeout", "failed", "different")
        assert reaped_seconds(server) - before < 1.5
        assert threads.submit(pool.compare, "\\sqrt{8}", "2\\sqrt{2}").result() == "equal"


def test_a_hanging_request_that_met_a_dead_child_costs_no_other():
    """It was sent twice; the second copy may not take the time of the next request."""
    pool = maths.Workers(1)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    os.kill(pool._idle.queue[0].child, signal.SIGKILL)
    assert pool.compare("7", "9^{9^{9^{9}}}") == "timeout"
    assert [pool.compare("\\sqrt{8}", f"{n}\\sqrt{{2}}") for n in (2, 3)] == ["equal", "different"]
    pool.close()


def test_a_worker_that_makes_no_progress_is_given_up(monkeypatch):
    pool = maths.Workers(1)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    monkeypatch.setattr(maths, "STALL", 0.5)
    os.kill(pool._idle.queue[0].child, signal.SIGSTOP)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "timeout"
    monkeypatch.undo()
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    pool.close()


def test_a_request_that_kills_its_children_fails_and_costs_no_other(monkeypatch):
    """Two children die on it, then the next request is judged as usual."""
    pool = maths.Workers(1)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    worker = pool._idle.queue[0]
    await_reply = worker._reply

    def kill_first(deadline):
        os.kill(worker.child, signal.SIGKILL)
        return await_reply(deadline)

    monkeypatch.setattr(worker, "_reply", kill_first)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}+" + "+".join(["x"] * 80)) == "failed"
    monkeypatch.undo()
    assert [pool.compare("\\sqrt{8}", f"{n}\\sqrt{{2}}") for n in (2, 3)] == ["equal", "different"]
    pool.close()


def test_failures_are_counted():
    verdict = verify_math("\\boxed{9^{9^{9^{9}}}}", "7")
    assert verdict == {"reward": 0.0, "exact": 0.0, "format": 1.0, "failed": 1.0, "timeout": 1.0}


def test_a_killed_worker_is_replaced():
    pool = maths.Workers(1)
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    worker = pool._idle.get()
    os.kill(worker.child, signal.SIGKILL)
    pool._idle.put(worker)
    outcomes = [pool.compare("\\sqrt{8}", f"{factor}\\sqrt{{2}}") for factor in (2, 3, 2, 4)]
    assert outcomes == ["equal", "different", "equal", "different"]
    worker.process.kill()
    assert pool.compare("\\sqrt{8}", "2\\sqrt{2}") == "equal"
    pool.close()


def test_children_are_replaced_before_caches_grow(monkeypatch):
    monkeypatch.setattr(maths, "REQUESTS_PER_CHILD", 3)
    pool = maths.Workers(1)
    children = set()
    for index in range(8):
        assert pool.compare(f"\\sqrt{{{index}}}", f"\\sqrt{{{index}}}+0") == "equal"
        worker = pool._idle.get()
        children.add(worker.child)
        pool._idle.put(worker)
    assert len(children) == 3
    pool.close()


def test_many_threads():
    def one(index: int) -> float:
        return verify_math(f"\\boxed{{\\sqrt{{{index}}}+x}}", f"x+\\sqrt{{{index if index % 2 else index + 1}}}")[
            "reward"
        ]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(2, 42))) == [float(i % 2) for i in range(2, 42)]


def test_worker_imports_neither_torch_nor_this_package():
    code = "import sys; sys.argv = ['x', '64']; import maths_inner as m; m.equivalent('1', '2'); print(*sys.modules)"
    folder = Path(maths.__file__).parent
    modules = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout.split()
    assert "sympy" in modules
    assert not {"torch", "lightning", "espo_lightning"} & set(modules)


def test_problems_pickle_and_streams_are_functions_of_seed_and_index():
    for task in (GSM8K_ROWS, MATH_ROWS):
        problem = pickle.loads(pickle.dumps(task.problem("test", 3, 5)))
        assert problem.verify(problem.answer)["reward"] == 1.0
        assert problem.prompt == task.problem("test", 3, 5).prompt
        size = len(task.rows("test"))
        epochs = [[task.problem("test", seed, i).prompt for i in range(size)] for seed in (0, 1)]
        assert epochs[0] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1])


def test_splits(tmp_path):
    task = GSM8K(path=str(DATA / "gsm8k_60.jsonl"))
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (54, 6)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "so\n#### 1,234"}))
    named = GSM8K(path=str(tmp_path / "{split}.jsonl"))
    assert named.problem("test", 0, 7).prompt.startswith("test")
    assert named.problem("train", 0, 0).verify("\\boxed{1234}")["reward"] == 1.0
    with pytest.raises(ValueError, match="held_out"):
        GSM8K(path=str(DATA / "gsm8k_60.jsonl"), held_out=0.0).problem("test", 0, 0)


def test_gold_from_the_solution(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}."}))
    problem = MATH(path=str(tmp_path / "m.jsonl"), held_out=0.0).problem("train", 0, 0)
    assert problem.verify("\\boxed{0.5}")["reward"] == 1.0


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


# ---- the worker's surroundings ------------------------------------------------------------------------------------


def test_packages_that_only_pythonpath_shows_reach_the_worker():
    """The interpreter below the virtual environment sees math-verify through PYTHONPATH alone."""
    import math_verify

    code = f"""
import sys, types
for name in ("espo_lightning", "espo_lightning.tasks"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [{str(Path(maths.__file__).parents[2])!r} + "/" + name.replace(".", "/")]
from espo_lightning.tasks.maths import verify_math
print(verify_math("\\\\boxed{{2x}}", "x+x")["reward"])
"""
    python, site = os.path.realpath(sys.executable), str(Path(math_verify.__file__).parents[1])
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": site})
    assert run.stdout == "1.0\n", run.stderr


@pytest.mark.parametrize("task", [GSM8K_ROWS, MATH_ROWS], ids=["gsm8k", "math"])
def test_a_host_without_math_verify_is_found_before_a_run(task, monkeypatch):
    task.check_host()
    monkeypatch.setattr(maths, "_pools", {})
    monkeypatch.setattr(maths, "INNER", Path("no such file.py"))
    with pytest.raises(VerifierUnavailable, match="is math-verify installed"):
        task.check_host()
    assert verify_math("\\boxed{7}", "7")["reward"] == 1.0  # what needs no worker still works
