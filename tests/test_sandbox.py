"""The sandbox: what programs return, and every fake and escape on every backend."""

import shutil
import socket

import pytest
from sandbox_attacks import ESCAPES, FAKES
from sandbox_cases import (
    AVAILABLE,
    assert_contained,
    assert_not_faked,
    body,
    box_fixture,  # noqa: F401
)

from espo_lightning.tasks.sandbox import run as sandbox
from espo_lightning.tasks.sandbox.run import SandboxUnavailable

# ---- what it is for -----------------------------------------------------------------------------------------------


def test_at_least_one_backend_or_a_refusal():
    if AVAILABLE:
        assert sandbox.choose_backend() == AVAILABLE[0]
        assert sandbox.run_program("print('hi')").stdout == "hi\n"
    else:
        with pytest.raises(SandboxUnavailable, match="allow_unsafe"):
            sandbox.run_program("print('hi')")


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sandbox.probe("bwrap") == "bwrap: not on PATH"
    for backend in set(sandbox.BACKENDS) - set(AVAILABLE):
        assert sandbox.probe(backend).startswith(f"{backend}: ")


def test_runs_a_program(box):
    result = box.run("import math, re, collections\nprint('hi', math.pi)")
    assert (result.status, result.stdout, result.passed, result.failed) == ("ok", "hi 3.141592653589793\n", (), False)


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [
        ("def f(:", "syntax", "SyntaxError"),
        ("x = '\0'", "syntax", "null bytes"),
        ("1/0", "error", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "error", "SystemExit"),
        ("import sys; sys.exit(0)", "ok", ""),
        ("input()", "error", "EOFError"),
        ("import numpy", "error", "ModuleNotFoundError"),
        ("import espo_lightning", "error", "ModuleNotFoundError"),
        *(
            (f"import {name}", "error", "ModuleNotFoundError")
            for name in ("peer", "isolation", "wire", "inner", "rows")
        ),
        ("import ctypes; ctypes.string_at(0)", "crash", ""),
        ("(" * 300 + ")" * 300, "syntax", "SyntaxError"),
        ("x" * (sandbox.SOURCE_LIMIT + 1), "error", "too long"),
    ],
)
def test_status(box, source, status, error):
    result = box.run(source)
    assert result.status == status, result
    assert error in result.error


def test_same_program_same_output(box):
    source = "import random\nprint(random.random(), {'a', 'b', 'c', 'd'}, hash('x'))"
    assert len({box.run(source).stdout for _ in range(5)}) == 1


TREE = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
def sort_in_place(items): items.sort()
def twice(function, x): return function(function(x))
def squares(n): return (i * i for i in range(n))
def fail(x): raise ValueError("bad", x)
def kinds(): return [1, 2.5, 'a', b'b', None, True, (1, [2]), {1: {2}}, frozenset({3}), 1j, range(3), 10**400]
def nan(): return float('nan')
"""


@pytest.mark.parametrize(
    "test",
    [
        "root = Node(1); root.left = Node(2); assert depth(root) == 2 and root.left.value == 2",
        "items = [3, 1, 2]; sort_in_place(items); assert items == [1, 2, 3]",
        "assert twice(lambda x: x + 3, 1) == 7",
        "assert list(squares(4)) == [0, 1, 4, 9] and sum(squares(3)) == 5",
        "try:\n    fail(1)\n    assert False\nexcept ValueError:\n    pass",
        "assert kinds() == [1, 2.5, 'a', b'b', None, True, (1, [2]), {1: {2}}, frozenset({3}), 1j, range(3), 10**400]",
        "assert isinstance(kinds()[6], tuple) and kinds()[5] is True",
        "assert nan() != nan()",
    ],
)
def test_values_cross_the_pipe(box, test):
    names = ("Node", "depth", "sort_in_place", "twice", "squares", "fail", "kinds", "nan")
    result = box.test(TREE, (test,), exports=names)
    assert result.passed == (True,), result


def test_partial_credit_survives_a_timeout(box):
    source = "def f(x):\n    while x == 2: pass\n    return x"
    tests = ("assert f(1) == 1", "assert f(3) == 4", "assert f(2) == 2", "assert f(5) == 5")
    result = box.test(source, tests, exports=("f",), timeout=1.0)
    assert (result.status, result.passed) == ("timeout", (True, False, False, False))


def test_a_test_that_hangs_is_stopped(box):
    result = box.test("def f(): return 1", ("assert f() == 1", "while True: pass"), exports=("f",), timeout=1.0)
    assert (result.status, result.passed) == ("timeout", (True, False))
    assert result.seconds < 3


# ---- faking the result --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", FAKES)
def test_cannot_fake_a_result(box, fake):
    assert_not_faked(box, fake)


def test_harness_offers_only_the_functions_it_passed(box):
    source = """
        import json, os, struct
        def f(callback):
            seen = []
            for attack in (lambda: callback.__globals__, lambda: callback.__code__, lambda: callback['x']):
                try: seen.append(str(attack()))
                except Exception as error: seen.append(type(error).__name__)
            return seen, callback(20)
        """
    result = box.test(body(source), ("assert f(lambda x: x + 1) == (['PermissionError'] * 3, 21)",), exports=("f",))
    assert result.passed == (True,), result


# ---- escapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ESCAPES)
def test_contained(box, escape, monkeypatch):
    assert_contained(box, escape, monkeypatch)


def test_asyncio_and_threads_still_work(box):
    source = """
        import asyncio, threading, tempfile
        async def main(): await asyncio.sleep(0.01); return 5
        print(asyncio.run(main()))
        t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()
        with tempfile.TemporaryFile() as f: f.write(b'x')
        open('own', 'w').write('mine'); print(open('own').read())
        """
    assert box.run(body(source)).stdout == "5\nthread\nmine\n"


def test_a_listening_parent_is_not_reached(box):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.5)
        port = server.getsockname()[1]
        result = box.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        assert result.status == "error"
        with pytest.raises(TimeoutError):
            server.accept()
