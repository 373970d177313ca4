"""Judging in parallel: the order, what a broken verifier costs, and that nothing survives."""

import json
import math
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
from processes import descendants, started

from espo_lightning.tasks.base import Problem, VerifierUnavailable
from espo_lightning.tasks.judge import judge, judge_all
from espo_lightning.tasks.statistics import pass_at_k, per_problem, summarise


def problem(verify) -> Problem:
    return Problem("", verify, "")


def number(text: str) -> dict[str, float]:
    time.sleep(0.02 * (int(text) % 3))
    return {"reward": float(text), "digits": len(text)}


def raises(error, text: str) -> dict[str, float]:
    raise error


def test_verdicts_come_in_the_order_of_the_texts():
    texts = [str(i) for i in range(40)]
    verdicts = judge_all([problem(number)] * 40, texts, threads=7)
    assert verdicts == [judge(problem(number), text) for text in texts]
    assert verdicts[12] == {"reward": 12.0, "digits": 2.0, "failed": 0.0, "timeout": 0.0}
    assert judge_all([], []) == []
    with pytest.raises(ValueError, match="2 problems, 1 texts"):
        judge_all([problem(number)] * 2, ["1"])


def test_verifiers_run_at_the_same_time():
    barrier = threading.Barrier(6)  # passes only if all six wait at once

    def meet(text: str) -> dict[str, float]:
        barrier.wait(10)
        return {"reward": 1.0}

    assert [v["reward"] for v in judge_all([problem(meet)] * 6, [""] * 6, threads=6)] == [1.0] * 6


@pytest.mark.parametrize(
    ("verify", "cause"),
    [
        (partial(raises, KeyError("k")), "KeyError: 'k'"),
        (partial(raises, RecursionError("deep")), "RecursionError"),
        (partial(raises, SystemExit(0)), "SystemExit"),
        (lambda text: {"reward": math.nan}, "reward is nan"),
        (lambda text: {"reward": 1.0, "exact": math.inf}, "exact is inf"),
        (lambda text: {"exact": 1.0}, "no reward"),
        (lambda text: {"reward": "high"}, "ValueError"),
        (lambda text: {"reward": None}, "TypeError"),
        (lambda text: 1.0, "AttributeError"),
    ],
)
def test_a_broken_verifier_costs_one_completion_its_reward(verify, cause):
    problems = [problem(number), problem(verify), problem(number)]
    with pytest.warns(UserWarning, match=cause):
        verdicts = judge_all(problems, ["1", "2", "3"])
    assert [v["reward"] for v in verdicts] == [1.0, 0.0, 3.0]
    assert [v["failed"] for v in verdicts] == [0.0, 1.0, 0.0]
    assert [v["timeout"] for v in verdicts] == [0.0, 0.0, 0.0]


def test_a_verifier_that_hangs_is_given_up_and_counted():
    release = threading.Event()

    def hang(text: str) -> dict[str, float]:
        release.wait(30)
        return {"reward": 1.0}

    problems = [problem(hang), problem(number), problem(hang), *[problem(number)] * 5]
    with pytest.warns(UserWarning, match="no verdict after 0.5 s"):
        verdicts = judge_all(problems, list("91929394"), limit=0.5, threads=2)
    release.set()  # the two that hang had not returned: they would have had reward 1
    assert [v["reward"] for v in verdicts] == [0.0, 1.0, 0.0, 2.0, 9.0, 3.0, 9.0, 4.0]
    assert [v["timeout"] for v in verdicts] == [v["failed"] for v in verdicts] == [1.0, 0.0, 1.0, *[0.0] * 5]


def test_a_host_that_cannot_verify_ends_the_run():
    """Not one more zero reward: no completion could ever score."""
    problems = [problem(number)] * 3 + [problem(partial(raises, VerifierUnavailable("no sandbox here")))]
    with pytest.raises(VerifierUnavailable, match="no sandbox here"):
        judge_all(problems, list("1234"))


def test_ctrl_c_starts_no_more_verifiers():
    judged = []

    def slow(text: str) -> dict[str, float]:
        judged.append(text)
        if len(judged) == 3:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return {"reward": 0.0}

    with pytest.raises(KeyboardInterrupt):
        judge_all([problem(slow)] * 200, [""] * 200, threads=2)
    time.sleep(0.3)
    assert len(judged) < 10


OWNER = """
import sys, time, types
from pathlib import Path
for name in ("espo_lightning", "espo_lightning.tasks"):  # without the packages' own imports, which need torch
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [str(Path(sys.argv[1], *name.split(".")))]
from functools import partial
from espo_lightning.tasks.base import Problem
from espo_lightning.tasks.code import judge
from espo_lightning.tasks.maths import _workers, verify_math
from espo_lightning.tasks.sandbox.run import SandboxUnavailable
from espo_lightning.tasks.judge import judge_all
assert "torch" not in sys.modules
code = Problem("", partial(judge, tests=("assert f() == 1",), exports=("f",), timeout=1.0), "")
maths = Problem("", partial(verify_math, gold="\\\\sqrt{8}"), "")
programs = ["def f(): return 1", "while True: pass", "import os; os._exit(0)"]
answers = ["\\\\boxed{2\\\\sqrt{2}}", "\\\\boxed{9^{9^{9^{9}}}}"]
try:
    verdicts = judge_all([code] * 3 + [maths] * 2, programs + answers)
except SandboxUnavailable:  # a host without isolation
    verdicts = [dict(reward=r, failed=f, timeout=t) for r, f, t in ((1, 0, 0), (0, 1, 1), (0, 1, 0))]
    verdicts += judge_all([maths] * 2, answers)
print([[v[key] for v in verdicts] for key in ("reward", "failed", "timeout")], flush=True)
if sys.argv[2] == "killed":  # with a program and a comparison on the way
    from threading import Thread
    for problem, text in ((code, "while True: pass"), (maths, answers[1])):
        Thread(target=judge_all, args=([problem], [text]), daemon=True).start()
    while _workers()._idle.qsize() == _workers().size:
        time.sleep(0.01)
    time.sleep(0.1)
    print("busy", flush=True)
input()
"""


@pytest.mark.filterwarnings("ignore:a verifier failed")
@pytest.mark.parametrize("end", ["normal", "killed"])
def test_nothing_survives_the_process_that_judged(end):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(Path(__file__).parents[1]), end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert json.loads(owner.stdout.readline()) == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]]
    if end == "killed":
        assert owner.stdout.readline() == "busy\n"
    tree = {pid: started(pid) for pid in descendants(owner.pid)}
    assert len(tree) >= 2  # a worker and its child at least
    if end == "killed":
        owner.kill()
    owner.communicate("\n")
    deadline = time.monotonic() + 60  # seconds on a free machine: workers notice that their owner is gone
    while time.monotonic() < deadline and any(started(pid) == then for pid, then in tree.items()):
        time.sleep(0.1)
    assert not [pid for pid, then in tree.items() if started(pid) == then]


def test_intervals_by_hand():
    summary = summarise([{"reward": 0.5, "exact": 1.0}, {"reward": 0.1, "exact": 0.0}, {"reward": 0.3}])
    assert (summary["n"], summary["reward"], summary["exact"]) == (3, pytest.approx(0.3), pytest.approx(1 / 3))
    assert summary["ci95"]["reward"] == pytest.approx([0.3 - 1.96 * 0.2 / 3**0.5, 0.3 + 1.96 * 0.2 / 3**0.5])
    # Wilson's interval of 1 in 3, the roots of (p - 1/3)^2 = 1.96^2 p (1 - p) / 3
    a, b, c = 1 + 1.96**2 / 3, -(2 / 3 + 1.96**2 / 3), 1 / 9
    half = math.sqrt(b * b - 4 * a * c)
    assert summary["ci95"]["exact"] == pytest.approx([(-b - half) / (2 * a), (-b + half) / (2 * a)])
    with pytest.raises(ValueError, match="not a single verdict"):
        summarise([])


def test_pass_at_k_is_the_average_over_subsets():
    for n, c, k in [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 3, 4), (6, 0, 2), (6, 6, 6), (7, 1, 7)]:
        subsets = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)]:
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(*bad)


def test_per_problem_means_and_pass_at_k():
    right, wrong = {"reward": 1.0, "exact": 1.0}, {"reward": 0.5, "exact": 0.0}
    rows = per_problem([right, wrong, wrong, wrong, right, right, right, right], 4)
    assert rows[0] == {"reward": 0.625, "exact": 0.25, "pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0}
    assert set(rows[1].values()) == {1.0}
    assert per_problem([right, wrong], 1) == [right, wrong]
    assert set(per_problem([right] * 3, 3)[0]) == {"reward", "exact", "pass@1", "pass@2"}
