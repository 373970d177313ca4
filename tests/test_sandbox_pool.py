"""Pools of the sandbox: bad programs do not disturb good ones, and nothing is left."""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import descendants
from sandbox_attacks import ESCAPES
from sandbox_cases import (
    box_fixture,  # noqa: F401
    gone,
)

from espo_lightning.tasks.sandbox.run import Sandbox


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
