"""The sandbox: every escape is tried on every backend, and afterwards nothing may be left."""

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import descendants
from sandbox_attacks import ESCAPES, FAKES, SECRET

from espo_lightning import evaluate, fit
from espo_lightning.tasks.sandbox import run as sandbox
from espo_lightning.tasks.sandbox.run import Sandbox, SandboxUnavailable

AVAILABLE = [backend for backend in sandbox.BACKENDS if not sandbox.probe(backend)]


def processes() -> dict[int, str]:
    """All living processes of this machine that belong to a sandbox, by their command line."""
    found = {}
    for entry in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            command = Path(entry).read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "inner.py" in command and "maths_inner.py" not in command:
            found[int(entry.split("/")[2])] = command
    return found


@pytest.fixture(scope="module", params=AVAILABLE or ["none"])
def box(request):
    """A pool of two runners. On a host without any backend each test checks that model code is refused instead."""
    if request.param == "none":
        with pytest.raises(SandboxUnavailable, match="allow_unsafe"):
            Sandbox()
        pytest.skip("no isolation on this host: the refusal was checked instead")
    pool = Sandbox(2, backend=request.param)
    yield pool
    pool.close()


def gone(left: Callable[[], set[int]]) -> set[int]:
    """The processes that are left, once there are none, or after a minute."""
    deadline = time.monotonic() + 60
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def body(source: str) -> str:
    return textwrap.dedent(source)


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


def assert_not_faked(box, fake: str) -> None:
    """No test passes, and the pool goes on."""
    tests = (
        "assert f(1) == 1234567",
        "assert all([f(1) == 1234567])",
        "assert isinstance(f(1), int) and f(1) > 9**9",
        "assert 1234567 in f(1)",
    )
    result = box.test(body(FAKES[fake]), tests, exports=("f",), timeout=2.0)
    assert result.passed == (False,) * 4, result
    assert box.run("print(1)").stdout == "1\n"


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


def assert_contained(box, escape: str, monkeypatch) -> None:
    """It ends as it must, nothing of it is left, and the pool goes on."""
    monkeypatch.setenv("ESPO_TEST_SECRET", SECRET)
    source, statuses, expected = ESCAPES[escape]
    result = box.run(source.replace("PARENT", str(os.getpid())), timeout=1.5, memory_mb=256)
    assert result.status in statuses, result
    assert "DONE" not in result.stdout
    assert expected in result.stdout
    assert len(result.stdout) <= 70_000
    assert result.seconds < 6
    assert box.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"  # the pool works, nothing of the job is left


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


# ---- the pool -----------------------------------------------------------------------------------------------------


def test_bad_programs_do_not_disturb_good_ones(box):
    programs = ["while True: pass", "import os; os._exit(1)", "x = bytearray(10**10)", "import os\nos.fork()"]

    def one(index: int) -> str:
        if index % 4 == 0:
            return box.run(programs[index // 4 % 4], timeout=0.5).status
        return box.run(f"print({index})").stdout

    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(one, range(48)))
    assert all(outputs[i] == f"{i}\n" for i in range(48) if i % 4)


def test_a_killed_runner_is_replaced(box):
    before = descendants(os.getpid())
    pool = Sandbox(2, backend=box.backend)
    pool.run("print(1)")
    for pid in (descendants(os.getpid()) - before) & processes().keys():  # not those of other pools
        with contextlib.suppress(ProcessLookupError):  # it died with the one before
            os.kill(pid, signal.SIGKILL)
    assert [pool.run("print(2)").stdout for _ in range(4)] == ["2\n"] * 4
    pool.close()


def test_nothing_is_left(box):
    """After hostile jobs and close(): no process of the pool, in whatever state, and no file of its programs."""
    before = descendants(os.getpid())
    pool = Sandbox(2, backend=box.backend)
    for escape in ("fork bomb", "many files", "a thread that outlives main", "os._exit", "infinite loop"):
        pool.run(ESCAPES[escape][0], timeout=1.0, memory_mb=256)
    assert descendants(os.getpid()) - before
    pool.close()
    assert gone(lambda: descendants(os.getpid()) - before) == set()
    assert not glob.glob(os.path.join(tempfile.gettempdir(), "espo-escape*"))
    assert not Path("/dev/shm/espo-escape").exists()


OWNER = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import types
for name in ("espo_lightning", "espo_lightning.tasks"):  # without the package's own imports, which need torch
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [str(Path(sys.argv[1], *name.split(".")))]
from espo_lightning.tasks.sandbox.run import Sandbox
pool = Sandbox(1, backend=sys.argv[2])
pool.run("print(1)")
threading.Thread(target=pool.run, args=("while True: pass",), kwargs={"timeout": 60.0}).start()
time.sleep(0.5)
print("running", flush=True)
time.sleep(60)
"""


def test_everything_dies_with_its_owner(box, tmp_path):
    """The trainer is killed with SIGKILL while a program runs: the whole tree must follow by itself."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # an owner that was killed leaves an (empty) directory
    command = [sys.executable, "-c", OWNER, root, box.backend]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert owner.stdout.readline() == b"running\n"
    tree = descendants(owner.pid)
    assert len(tree) >= 4  # runner, cage, harness, program
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(lambda: tree & processes().keys()) == set()


def test_the_parent_is_never_patched(box):
    before = (os.kill, os.remove, os.fork, shutil.rmtree, subprocess.Popen, signal.getsignal(signal.SIGALRM))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: box.run("print(1)"), range(4)))
    after = (os.kill, os.remove, os.fork, shutil.rmtree, subprocess.Popen, signal.getsignal(signal.SIGALRM))
    assert before == after
    assert threading.active_count() < 20


def test_many_programs_at_a_time_get_their_own_results(box):
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: box.run(f"print({i})"), range(40)))
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(40)]


# ---- backend selection --------------------------------------------------------------------------------------------


NO_LAYERS = """

def absent(*args):
    raise OSError(38, "not on this host")

enter_namespaces = mount_private = landlock = drop_capabilities = seccomp = absent
LAYERS = (enter_namespaces, mount_private, landlock, drop_capabilities, seccomp)
"""
DOORS = ("start processes", "signal others", "use the network", "list files", "read files", "change permissions")
# What limits, kills and the separation of program and tests contain without help from the system.
CONTAINED_ANYWHERE = (
    *("infinite loop", "sleep", "ignored signals", "memory bomb", "mmap bomb", "one large file", "output flood"),
    *("deep recursion", "deeper recursion", "os._exit", "environment", "a thread that outlives main", "thread bomb"),
    *("closing every descriptor", "a bomb of threads with small stacks"),
)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A host that offers nothing: no bubblewrap, and every layer refused by the kernel."""
    for path in sandbox.INNER:
        shutil.copy(path, tmp_path)
    with open(tmp_path / "isolation.py", "a") as file:
        file.write(NO_LAYERS)
    monkeypatch.setattr(sandbox, "INNER", [str(tmp_path / Path(path).name) for path in sandbox.INNER])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox._choose.cache_clear()
    yield
    sandbox._choose.cache_clear()


@pytest.fixture
def unsafe(bare):
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX"):
        pool = Sandbox(2, allow_unsafe=True)
    yield pool
    pool.close()


@pytest.mark.usefixtures("bare")
def test_refuses_without_isolation():
    with pytest.raises(SandboxUnavailable, match="allow_unsafe=true") as caught:
        Sandbox()
    assert "bwrap: not on PATH" in str(caught.value)
    assert "not on this host" in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_the_warning_says_what_is_not_contained():
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX.*bwrap: not on PATH; stdlib: .*not on this host") as caught:
        pool = Sandbox(1, allow_unsafe=True)
    assert pool.backend == "unsafe"
    assert [door for door in DOORS if door not in str(caught[0].message)] == []


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("main", "prefix"), [(fit.main, "data."), (evaluate.main, "")], ids=["fit", "evaluate"])
def test_a_run_that_cannot_verify_ends_before_it_starts(main, prefix, tmp_path, monkeypatch, capsys):
    """One message, nothing written; with the choice of the unsafe sandbox it runs, after the warning."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rows = Path(__file__).parent / "data" / "mbpp_60.jsonl"
    flags = [f"--{prefix}task=MBPP", f"--{prefix}task.path={rows}"]
    if main is fit.main:
        flags += ["--data.eval_problems=2", "--data.eval_batch_size=2", "--data.batches=1", "--data.batch_size=1"]
        flags += ["--model.group_size=2", "--trainer.accelerator=cpu", "--run_dir=."]
    else:
        flags += ["--problems=2", "--output=result.json", "--decoding.length=16"]
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "no isolation for model-written code on this host (bwrap: not on PATH; stdlib: " in printed
    assert "allow_unsafe=true" in printed
    assert "Traceback" not in printed
    assert list(folder.iterdir()) == []
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX"):
        main([*flags, f"--{prefix}task.allow_unsafe=true"])
    assert list(folder.iterdir())


@pytest.mark.parametrize("escape", CONTAINED_ANYWHERE)
def test_contained_without_isolation(unsafe, escape, monkeypatch):
    assert_contained(unsafe, escape, monkeypatch)


@pytest.mark.parametrize("fake", FAKES)
def test_cannot_fake_a_result_without_isolation(unsafe, fake):
    assert_not_faked(unsafe, fake)


def test_daemons_die_without_isolation(unsafe):
    """Forks are not refused there but killed, in sessions of their own too; what they left in the directory is gone."""
    source = """
        import os, signal, time
        for index in range(20):
            if os.fork() == 0:
                if index % 2: os.setsid()
                if index % 3: signal.signal(15, signal.SIG_IGN)
                if os.fork() == 0 or index % 5:
                    time.sleep(60)
                os._exit(0)
        os.makedirs('a/b'); open('a/b/c', 'w'); os.symlink('/etc/passwd', 'l')
        print('forked')
        """
    before = descendants(os.getpid())
    assert unsafe.run(body(source)).stdout == "forked\n"
    assert unsafe.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"
    unsafe.close()
    assert gone(lambda: descendants(os.getpid()) - before) == set()
    assert Path("/etc/passwd").exists()


@pytest.mark.usefixtures("bare")
def test_the_probe_sees_every_open_door(monkeypatch):
    """Whatever a backend claims, one open door ends its choice."""
    result = sandbox._probe("unsafe")
    assert [door for door in DOORS if door not in result.stdout] == []
    assert result.status == "crash"  # the last door is to become another program
    monkeypatch.setattr(sandbox, "PROBE", sandbox.PROBE.replace('is_open(os.execv, "/bin/true", ["true"])', ""))
    assert sandbox.probe("unsafe").startswith("unsafe: error: AssertionError: a program can start processes, signal")


def test_results_are_plain_data():
    result = sandbox.Result("ok", (True,), "", "", 0.0)
    assert json.loads(json.dumps(result)) == ["ok", [True], "", "", 0.0]
