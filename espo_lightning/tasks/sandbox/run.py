"""Runs model-written Python in a separate, confined process tree. The trainer's own process is never patched.

Threat model. The program is written by a policy that is optimised against the reward: assume that it tries everything
a Python program can try, but not that it carries a kernel exploit.

* It must not harm the machine: no network, no file outside a private directory read or written (except the Python
  standard library and shared objects, read-only), no new processes, no signals, no ptrace; limits on CPU, wall time,
  memory, threads, open files, file size, disk and output; the tree is killed whole after every job. What it can still
  learn with the ``stdlib`` backend is whether a path outside exists and its size (``os.stat``), never its content.
* It must not fake a reward: printing, exiting, patching built-ins or returning objects that equal everything do not
  help. Tests run in a second process, the harness. From the program it gets values only, as plain data over a pipe;
  the program never sees tests or expected values, and verdicts leave on a channel that it has no descriptor of.
  `inner` describes the processes, `wire` the values. What remains possible is what remains in any test: being right on
  the cases that are tested. Consequence: an object of a class that the program defines compares by identity in a test.

Backends, in the order tried; each must pass `PROBE`, a program that tries the doors, before it is used:

* ``bwrap``: bubblewrap, a container around each runner, and inside it the layers of ``stdlib``; where a container
  cannot nest namespaces it serves one job, where there is no Landlock its read-only view stands in.
* ``stdlib``: no dependency; user, network, pid, ipc, uts and mount namespaces, Landlock (ABI 3, Linux 6.2), seccomp.
* ``unsafe``: only with ``allow_unsafe=True``; whichever of those layers the host has. It warns with what a program can
  do then, at worst whatever this user can: files, network, processes, signals (so even end the trainer), and a disk
  full of small files. Limits of time, memory and file size, the kill of the tree and the separation of program and
  tests remain. Without ``allow_unsafe``, `SandboxUnavailable` is raised.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from espo_lightning.tasks.base import VerifierUnavailable
from espo_lightning.tasks.sandbox.isolation import DISK_LIMIT
from espo_lightning.tasks.sandbox.wire import LENGTH, MESSAGE_LIMIT

INNER = [str(Path(__file__).with_name(f"{name}.py")) for name in ("inner", "isolation", "peer", "wire")]
HEADER = struct.Struct("<dII")  # seconds for the job, megabytes of memory, bytes of the job; as in inner.py
BACKENDS = ("bwrap", "stdlib")
SOURCE_LIMIT = 1 << 20  # characters of a program; longer ones are not run
GRACE = 3.0  # seconds after a job's own deadline until its runner is taken for dead

# Tries each door and prints the open ones. Opening a socket is the door, not connecting: nobody may be listening.
PROBE = """
import ctypes, os, socket
def is_open(attempt, *args):
    try:
        return attempt(*args) or True
    except OSError:
        return False
shared = f"/dev/shm/espo-probe-{os.getpid()}"
doors = {
    "start processes": is_open(lambda: os.fork() or os._exit(0)),
    "signal others": is_open(os.kill, os.getppid(), 0),
    "use the network": is_open(socket.socket),
    "list files": is_open(os.listdir, "/home") or is_open(os.listdir, "/proc/1"),
    "read files": is_open(open, "/etc/passwd"),
    "write files": is_open(open, shared, "w") and is_open(os.remove, shared),
    "change permissions": is_open(os.chmod, os.__file__, os.stat(os.__file__).st_mode),
    "make namespaces": ctypes.CDLL(None).unshare(0x10000000) == 0,
}
open("here", "w").write("x")
found = ", ".join(door for door, opened in doors.items() if opened)
print(found, flush=True)
is_open(os.execv, "/bin/true", ["true"])  # last: it does not return if it works
assert not found, f"a program can {found}"
"""


class SandboxUnavailable(VerifierUnavailable):
    """This host offers no backend that holds, and the unsafe one was not asked for."""


class Result(NamedTuple):
    """What a program did.

    status: "ok" (ran to its end) | "syntax" | "error" (raised, exited early) | "timeout" | "crash" (killed: memory, CPU
        limit, `os._exit`, segmentation fault) | "setup" (the tests' own set-up failed) | "broken" (the sandbox failed).
    passed: one outcome per test; a test that was not reached is False. Empty without tests.
    stdout: the first 64 KiB that the program wrote to stdout and stderr; empty if the harness itself had to be killed.
    error: one line for a human.
    """

    status: str
    passed: tuple[bool, ...]
    stdout: str
    error: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Did the verdict come from a limit or a fault and not from a test?"""
        return self.status in ("timeout", "crash", "broken")


class _Runner:
    """One warm runner process and the pipes to it. Not thread-safe: the pool lends it to one thread at a time."""

    def __init__(self, backend: str) -> None:
        self.workdir = tempfile.mkdtemp(prefix="espo-sandbox-")
        python = os.path.realpath(sys.executable)
        # As ``-I`` (no user site, no script directory, no PYTHON* of the caller) with a fixed hash seed: a program that
        # prints a set gets the same verdict every time. ``-S``: no site-packages.
        command = [python, "-s", "-P", "-S", "-X", "utf8"]
        if backend == "bwrap":
            command = [*_bwrap(python), *command, "/sandbox/inner.py", backend, "/tmp"]
        else:
            command += [INNER[0], backend, self.workdir]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": self.workdir},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def run(self, job: dict, timeout: float, memory_mb: int) -> list[dict]:
        """The events of one job. Raises OSError if the runner died or stopped answering."""
        body = json.dumps(job).encode()
        deadline = time.monotonic() + timeout + GRACE
        self._send(HEADER.pack(timeout, memory_mb, len(body)) + body, deadline)
        (size,) = LENGTH.unpack(self._receive(LENGTH.size, deadline))
        if size > 2 * MESSAGE_LIMIT:
            raise OSError("runner sent nonsense")
        lines = self._receive(size, deadline).split(b"\n")
        return [json.loads(line) for line in lines[:-1]]  # after the last newline: nothing, or a line cut by a kill

    def _send(self, data: bytes, deadline: float) -> None:
        fd, view = self.process.stdin.fileno(), memoryview(data)
        while view:
            if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
                raise OSError("runner does not read")
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(fd, view[:65536]) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        fd, data = self.process.stdout.fileno(), bytearray()
        while len(data) < size:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise OSError("runner does not answer")
            if not (part := os.read(fd, min(size - len(data), 1 << 20))):
                raise OSError("runner died")
            data += part
        return bytes(data)

    def close(self) -> None:
        """Ask the runner to end (it sees its stdin close), then insist. Everything below it dies with it."""
        self.process.stdin.close()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.workdir, ignore_errors=True)


def _bwrap(python: str) -> list[str]:
    """A container with read-only system libraries and Python, an own /dev and a small /tmp; no network, no /proc."""
    command = ["bwrap", "--unshare-all", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
    command += ["--dev", "/dev", "--proc", "/proc", "--size", str(DISK_LIMIT)]
    command += ["--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in INNER:
        command += ["--ro-bind", path, f"/sandbox/{Path(path).name}"]
    for path in dict.fromkeys(["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", sys.base_prefix]):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    return [*command, "--ro-bind", python, python]


class Sandbox:
    """A pool of warm runners; any number of threads may call it. ``workers``: programs at a time, default the CPUs.

    Raises:
        SandboxUnavailable: no backend passes `PROBE` and ``allow_unsafe`` is false.
    """

    def __init__(self, workers: int | None = None, *, backend: str | None = None, allow_unsafe: bool = False) -> None:
        self.backend = backend or choose_backend(allow_unsafe)
        self._idle: queue.LifoQueue[_Runner | None] = queue.LifoQueue()
        for _ in range(workers or os.cpu_count() or 1):
            self._idle.put(None)  # started when first needed
        self._size = self._idle.qsize()

    def run(self, source: str, *, timeout: float = 5.0, memory_mb: int = 512) -> Result:
        """Run ``source`` as ``__main__``. "ok" says that it ended by itself, and nothing about what it computed."""
        return self.test(source, (), timeout=timeout, memory_mb=memory_mb)

    def test(
        self,
        source: str,
        tests: tuple[str, ...],
        *,
        setup: str = "",
        exports: tuple[str, ...] = (),
        modules: tuple[str, ...] = (),
        entry_point: str = "",
        timeout: float = 5.0,
        memory_mb: int = 512,
    ) -> Result:
        """Run ``source``, then each of ``tests`` (Python statements; a test passes if nothing is raised).

        setup: executed before the tests, in their namespace. exports: names that the tests take from the program.
        modules: standard modules that the tests use. entry_point: the export that the tests also call ``candidate``;
        it replaces a definition of the same name in ``setup``. timeout: seconds for everything together.
        """
        start = time.monotonic()
        if len(source) > SOURCE_LIMIT:
            return Result("error", (False,) * len(tests), "", "program too long", 0.0)
        names = tuple(dict.fromkeys((*exports, entry_point))) if entry_point else exports
        job = dict(source=source, tests=tests, setup=setup, exports=names, modules=modules, entry_point=entry_point)
        runner = self._idle.get()
        try:
            for attempts_left in (1, 0):
                try:
                    runner = runner or _Runner(self.backend)
                    events = runner.run(job, timeout, memory_mb)
                    break
                except OSError as error:  # it was killed while idle, say: one more try, with a new one
                    if runner is not None:
                        runner.close()
                        runner = None
                    if not attempts_left:
                        return Result("broken", (False,) * len(tests), "", str(error), time.monotonic() - start)
            result = _result(events, len(tests), time.monotonic() - start)
            if result.status == "broken" or (self.backend == "bwrap" and _shares_container(events)):
                runner.close()
                runner = None
            return result
        finally:
            self._idle.put(runner)

    def close(self) -> None:
        """End all idle runners and delete their directories. The pool stays usable: runners start when needed."""
        for _ in range(self._size):
            if (runner := self._idle.get()) is not None:
                runner.close()
        for _ in range(self._size):
            self._idle.put(None)


def _shares_container(events: list[dict]) -> bool:
    """Had the job no namespaces of its own inside the container? Then the container is used once."""
    return any(text.startswith("enter_namespaces") for text in events[0]["missing"])


def _result(events: list[dict], tests: int, seconds: float) -> Result:
    told = {key: value for event in events for key, value in event.items() if "test" not in event}
    outcomes = {event["test"]: event for event in events if "test" in event}
    passed = tuple(bool(outcomes.get(index, {}).get("passed")) for index in range(tests))
    if not told.get("ready") or "broken" in told:
        status = "broken"
    else:  # without "done" the harness was stuck in a test and killed
        status = told.get("stopped") or ("ok" if told.get("done") else "timeout")
    errors = [told.get("broken"), told.get("error"), *(event.get("error") for event in outcomes.values())]
    return Result(status, passed, told.get("stdout", ""), next(filter(None, errors), ""), seconds)


def probe(backend: str) -> str:
    """Why ``backend`` cannot be used here; "" if it can. Runs `PROBE` in it."""
    if backend == "bwrap" and shutil.which("bwrap") is None:
        return "bwrap: not on PATH"
    if backend == "stdlib" and sys.platform != "linux":
        return "stdlib: needs Linux"
    result = _probe(backend)
    return "" if result.status == "ok" else f"{backend}: {result.status}: {result.error}"


def _probe(backend: str) -> Result:
    pool = Sandbox(1, backend=backend)
    result = pool.run(PROBE, timeout=10.0)
    pool.close()
    return result


@functools.cache
def _choose(allow_unsafe: bool) -> str:
    reasons = []
    for backend in BACKENDS:
        if not (reason := probe(backend)):
            return backend
        reasons.append(reason)
    why = "; ".join(reasons)
    if not allow_unsafe:
        raise SandboxUnavailable(
            f"no isolation for model-written code on this host ({why}). Install bubblewrap, enable unprivileged user "
            "namespaces and Landlock, or set allow_unsafe=true of the task to run it with whatever isolation there is."
        )
    doors = _probe("unsafe").stdout.strip() or "do nothing that the probe tried"
    warnings.warn(
        f"UNSAFE SANDBOX: on this host model-written code can {doors}. Its time, memory and file sizes are limited and "
        f"its processes are killed all the same. Full isolation is missing ({why}).",
        stacklevel=3,
    )
    return "unsafe"


def choose_backend(allow_unsafe: bool = False) -> str:
    """The first backend whose probe passes, decided once per process. Raises SandboxUnavailable."""
    return _choose(allow_unsafe)


_shared: dict[tuple[int, bool], Sandbox] = {}
_lock = threading.Lock()


def _close_shared(key: tuple[int, bool]) -> None:
    if key[0] == os.getpid():  # a forked child leaves its parent's runners alone
        _shared[key].close()


def shared(allow_unsafe: bool = False) -> Sandbox:
    """The pool of this process (a forked child makes its own), closed at exit. Raises SandboxUnavailable."""
    key = (os.getpid(), allow_unsafe)
    with _lock:
        if key not in _shared:
            _shared[key] = Sandbox(allow_unsafe=allow_unsafe)
            atexit.register(_close_shared, key)
        return _shared[key]


def run_program(source: str, *, timeout: float = 5.0, memory_mb: int = 512, allow_unsafe: bool = False) -> Result:
    """Run one program in the shared pool, see `Sandbox.run`. Raises SandboxUnavailable."""
    return shared(allow_unsafe).run(source, timeout=timeout, memory_mb=memory_mb)
