"""The processes that compare mathematical answers: hangs, deaths, what they import."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from maths_cases import GSM8K_ROWS, MATH_ROWS
from processes import stat

from espo_lightning.tasks import maths
from espo_lightning.tasks.base import VerifierUnavailable
from espo_lightning.tasks.maths import verify_math


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first comparison of each of the two workers waits for it to import sympy."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: verify_math("\\boxed{9^{9^{9^{9}}}}", "7"), range(2)))


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
